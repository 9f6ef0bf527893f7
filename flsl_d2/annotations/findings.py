"""Uses of a data set, and findings that matter to them, collected by kind."""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from flsl_d2.errors import InputError
from flsl_d2.images.opening import printable


class Use(enum.Flag):
    """Parts of a data set that a run reads; several are combined by ``|``."""

    PICTURES = 0  # nothing but the pictures, as in pre-training by name
    BOXES = enum.auto()  # boxes and classes
    MASKS = enum.auto()
    # What COCO's evaluation computes with: id, area and iscrowd. Annotations may be missing as a
    # whole, as in COCO's test sets.
    EVALUATION = enum.auto()


# COCO train2017 itself has a few boxes without width. A few are left out and do no harm; a larger
# share is a mistake in whatever wrote the file.
MAX_UNUSABLE_SHARE = 0.01


class Problem(NamedTuple):
    """A reason why a part of an annotation cannot be used."""

    kind: str  # plural noun phrase that names the annotations concerned
    fatal: bool = False  # the file has to be corrected; other annotations are left out and counted
    of_mask: bool = False  # the box can be used in place of the mask


class Findings:
    """Kinds of faults, unusable annotations and remarks, each with its count and first examples.

    A kind is a text; the count stands before it, or in place of ``{count}`` within it.
    """

    def __init__(self, max_report: int = 10) -> None:
        self._max_report = max(max_report, 1)
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, list[str]] = {}
        self._sentences: dict[str, list[str]] = defaultdict(list)
        self._unusable: set[str] = set()
        self._of_mask: set[str] = set()

    def _note(self, level: str, kind: str, example: object, count: int = 1) -> None:
        self._counts[level][kind] += count
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

    def problem(self, problem: Problem, name: object, remedy: str = "") -> None:
        """Note a problem of an annotation at the level that it has."""
        (self.fault if problem.fatal else self.unusable)(problem.kind + remedy, name)
        if problem.of_mask:
            self._of_mask.add(problem.kind + remedy)

    def remark(self, kind: str, example: object, count: int = 1) -> None:
        """Note something harmless that a user should know."""
        self._note("remark", kind, example, count)

    def whole_file(self, level: str, sentence: str) -> None:
        """Note a ``fault`` or ``remark`` that concerns the file as a whole."""
        self._sentences[level].append(sentence)

    def discard_unusable(self) -> None:
        """Forget annotations that are left out, as consequences of a fault of the whole file."""
        self._counts["unusable"].clear()
        self._unusable.clear()

    @property
    def unusable_count(self) -> int:
        """Number of annotations that are left out for any reason."""
        return len(self._unusable)

    def has_fault(self, *parts: str) -> bool:
        """Whether there is a fault, of a kind that contains one of the texts if any is given."""
        kinds = [*self._counts["fault"], *self._sentences["fault"]]
        return any(part in kind for kind in kinds for part in parts or ("",))

    def _lines(self, level: str, end: bool = False) -> list[str]:
        lines = []
        for kind, count in self._counts[level].items():
            examples = self._examples[kind]
            rest = count - len(examples)
            more = f" and {rest} more" if rest > 0 and len(examples) == self._max_report else ""
            text = kind if "{count}" in kind else "{count} x " + kind
            line = f"{text.replace('{count}', str(count))}: {', '.join(examples)}{more}"
            done = (
                "their boxes stand for their masks"
                if kind in self._of_mask
                else "they are left out"
            )
            lines.append(f"{line}; {done}" if end else line)
        return lines + self._sentences[level]

    def report(self, place: str, allowed: float = 0) -> list[str]:
        """Return a line for each harmless kind, those of annotations that are left out first.

        Raises:
            InputError: with all faults, one a line; or more than ``allowed`` annotations unusable.
        """
        faults = self._lines("fault")
        if self.unusable_count > allowed:
            faults += self._lines("unusable")
        if faults:
            several = "\n  - ".join([", correct the following:", *faults])
            raise InputError(
                f"{place} cannot be used{several if len(faults) > 1 else f': {faults[0]}'}"
            )
        return self._lines("unusable", end=True) + self._lines("remark")


def name_of(entry: Any, index: int, key: str) -> object:
    """Return the id of an entry if it can be printed, else its place in the file."""
    value = entry.get("id") if isinstance(entry, dict) else None
    usable = isinstance(value, (int, str)) and not isinstance(value, bool)
    return value if usable else f"{key}[{index}]"
