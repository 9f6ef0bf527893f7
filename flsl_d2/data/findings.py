"""What a check of a file found, counted by kind, so that everything can be said together."""

from __future__ import annotations

from typing import Any


class Findings:
    """Kinds of findings, each with its count and its first examples.

    A kind is a text; the count comes before it, or where it says `{count}`.

    Args:
        max_report: how many examples of a kind are kept.
    """

    def __init__(self, max_report: int) -> None:
        self._max_report = max(max_report, 1)
        self._counts: dict[str, dict[str, int]] = {"fault": {}, "degenerate": {}, "remark": {}}
        self._examples: dict[str, list[str]] = {}
        self._degenerate_ids: set[Any] = set()

    def _note(self, level: str, kind: str, example: object) -> None:
        counts = self._counts[level]
        counts[kind] = counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < self._max_report:
            examples.append(str(example)[:120])

    def fault(self, kind: str, example: object) -> None:
        """Something that makes the file unusable."""
        self._note("fault", kind, example)

    def annotation_degenerate(self, kind: str, annotation_id: object) -> None:
        """An annotation that cannot be learned from, while the others can."""
        self._note("degenerate", kind, annotation_id)
        self._degenerate_ids.add(str(annotation_id))

    def remark(self, kind: str, example: object) -> None:
        """Something that is right and still good to know."""
        self._note("remark", kind, example)

    def _lines(self, level: str) -> list[str]:
        lines = []
        for kind, count in self._counts[level].items():
            examples = self._examples[kind]
            more = f" and {count - len(examples)} more" if count > len(examples) else ""
            what = kind if "{count}" in kind else "{count} x " + kind
            lines.append(f"{what.replace('{count}', str(count))}: {', '.join(examples)}{more}")
        return lines

    def faults(self) -> list[str]:
        """One line a kind of fault."""
        return self._lines("fault")

    def degenerate(self) -> list[str]:
        """One line a kind of degenerate annotation."""
        return self._lines("degenerate")

    def remarks(self) -> list[str]:
        """One line a kind of remark."""
        return self._lines("remark")

    @property
    def degenerate_count(self) -> int:
        """How many annotations are degenerate in any way."""
        return len(self._degenerate_ids)
