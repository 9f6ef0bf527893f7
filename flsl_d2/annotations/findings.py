"""Uses of a data set, and findings that matter to them, collected by kind."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from flsl_d2.images.opening import printable


class Use(enum.Flag):
    """Parts of a data set that a run reads; several are combined by ``|``.

    Attributes:
        PICTURES: nothing but the pictures, as in pre-training by name.
        BOXES: boxes and classes, as in training a detector, box-aligned k-NN and figures.
        MASKS: masks, too.
        EVALUATION: what COCO's evaluation computes with: ``id``, ``area`` and ``iscrowd``.
            Annotations may be missing as a whole, as in COCO's test sets.
    """

    PICTURES = 0
    BOXES = enum.auto()
    MASKS = enum.auto()
    EVALUATION = enum.auto()


# COCO train2017 itself has a few boxes without width. A few are left out and do no harm; a larger
# share is a mistake in whatever wrote the file.
MAX_UNUSABLE_SHARE = 0.01


class Problem(NamedTuple):
    """A reason why a part of an annotation cannot be used.

    Attributes:
        kind: plural noun phrase that names the annotations concerned.
        fatal: whether the value has no meaning at all, so that the file has to be corrected; other
            annotations are left out and counted.
    """

    kind: str
    fatal: bool


class Findings:
    """Kinds of findings, each with its count and its first examples.

    A kind is a text; the count stands before it, or in place of ``{count}`` within it.

    Args:
        max_report: number of examples kept of each kind.
    """

    def __init__(self, max_report: int) -> None:
        self._max_report = max(max_report, 1)
        self._counts: dict[str, dict[str, int]] = {"fault": {}, "unusable": {}, "remark": {}}
        self._examples: dict[str, list[str]] = {}
        self._sentences: dict[str, list[str]] = {"fault": [], "unusable": [], "remark": []}
        self._unusable: set[str] = set()

    def _note(self, level: str, kind: str, example: object) -> None:
        counts = self._counts[level]
        counts[kind] = counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < self._max_report:
            examples.append(printable(str(example)[:200]))

    def fault(self, kind: str, example: object) -> None:
        """Note something that makes the file unusable."""
        self._note("fault", kind, example)

    def unusable(self, kind: str, name: object) -> None:
        """Note an annotation that is left out, while the others can be used."""
        self._note("unusable", kind, name)
        self._unusable.add(str(name))

    def discard_unusable(self) -> None:
        """Forget annotations that are left out, as consequences of a fault of the whole file."""
        self._counts["unusable"].clear()
        self._unusable.clear()

    def problem(self, problem: Problem, name: object) -> None:
        """Note a problem of an annotation at the level that it has."""
        (self.fault if problem.fatal else self.unusable)(problem.kind, name)

    def remark(self, kind: str, example: object) -> None:
        """Note something harmless that a user should know."""
        self._note("remark", kind, example)

    def remark_many(self, kind: str, example: object, count: int) -> None:
        """Note as many harmless things of one kind and example."""
        self._note("remark", kind, f"{example} ({count})")
        self._counts["remark"][kind] += count - 1

    def whole_file(self, level: str, sentence: str) -> None:
        """Note a ``fault`` or ``remark`` that concerns the file as a whole."""
        self._sentences[level].append(sentence)

    def lines(self, level: str) -> list[str]:
        """One line for each kind of ``fault``, ``unusable`` or ``remark``."""
        lines = []
        for kind, count in self._counts[level].items():
            examples = self._examples[kind]
            rest = count - len(examples)
            more = f" and {rest} more" if rest > 0 and len(examples) == self._max_report else ""
            text = kind if "{count}" in kind else "{count} x " + kind
            lines.append(f"{text.replace('{count}', str(count))}: {', '.join(examples)}{more}")
        return lines + self._sentences[level]

    @property
    def unusable_count(self) -> int:
        """Number of annotations that are left out for any reason."""
        return len(self._unusable)

    def has_fault(self, *parts: str) -> bool:
        """Whether a kind of fault contains one of the texts."""
        return any(part in kind for kind in self._counts["fault"] for part in parts)


def name_of(entry: Any, index: int, key: str) -> object:
    """Return the id of an entry if it can be printed, else its place in the file."""
    value = entry.get("id") if isinstance(entry, dict) else None
    usable = isinstance(value, (int, str)) and not isinstance(value, bool)
    return value if usable else f"{key}[{index}]"
