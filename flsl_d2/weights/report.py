"""The account of every weight in a file, as one line, a table or JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LoadReport:
    """The account of one load.

    Attributes:
        path: path of the file.
        source: layout of the file.
        location: containers and prefix of the encoder's tensors in the file.
        matched: name in the encoder: name or names in the file, for every tensor that was loaded.
        resampled: sentences on tables of another size.
        new: names in the encoder that the file lacks and that stay as they were.
        dropped: name in the file: why it was left out on purpose.
        unused: names in the file that no rule accounts for.
        note: advice to users of such a file.
        other_sets: names of further sets of weights in the file.
        encoder: arguments of ``FLSLViT`` of the encoder that was loaded.
    """

    path: str
    source: str
    location: str = ""
    matched: dict[str, str] = field(default_factory=dict)
    resampled: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    note: str = ""
    other_sets: list[str] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Summarise the counts in one line, for logs."""
        parts = [*self.resampled]
        if self.new:
            parts.append(f"{len(self.new)} relative position tables are new and start as they are")
        if self.unused:
            parts.append(f"not used: {listed(self.unused)}")
        parts += [f"{len(n)} left out ({reason})" for reason, n in self._dropped_by_reason()]
        if self.other_sets:
            parts.append(f"the file also holds {listed(self.other_sets)} (?which=NAME takes one)")
        total = len(self.matched) + len(self.new)
        head = f"encoder weights: {len(self.matched)} of {total} matched ({self.path})"
        return "; ".join([head, *parts])

    def table(self) -> str:
        """Lay out counts with names, reasons, and the encoder's arguments, for a person."""
        renamed = [
            f"{theirs} -> {ours}"
            for ours, theirs in self.matched.items()
            if not theirs.endswith(ours)
        ]
        total = len(self.matched) + len(self.new)
        rows = [
            ("file", self.path),
            ("layout", self.source),
            *([("found at", self.location)] if self.location else []),
            *(
                [("further", f"{', '.join(self.other_sets)} (take one by which=NAME)")]
                if self.other_sets
                else []
            ),
            ("matched", f"{len(self.matched)} of the encoder's {total} tensors"),
            ("renamed", f"{len(renamed)}: {listed(renamed, 4)}" if renamed else "none"),
            *(("resampled", sentence) for sentence in self.resampled or ["none"]),
            *(
                ("dropped", f"{len(names)} ({reason}): {listed(names, 3)}")
                for reason, names in self._dropped_by_reason()
            ),
            ("not used", f"{len(self.unused)}: {listed(self.unused)}" if self.unused else "none"),
            *([("new", f"{len(self.new)}: {listed(self.new, 3)}")] if self.new else []),
            *([("note", self.note)] if self.note else []),
            ("encoder", ", ".join(f"{key}={value!r}" for key, value in self.encoder.items())),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers, for JSON."""
        return asdict(self)

    def _dropped_by_reason(self) -> list[tuple[str, list[str]]]:
        reasons = dict.fromkeys(self.dropped.values())
        return [(r, [n for n, why in self.dropped.items() if why == r]) for r in reasons]


def listed(names: Iterable[str], most: int = 8) -> str:
    """Join names with commas, and count those beyond the first."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
