"""What DAVIS measured: for each object, each sequence and overall; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flsl_d2.evaluation.davis.measures import Statistics

__all__ = ["Results", "Scores", "average"]

_COLUMNS = ("J&F", "J", "J rec.", "J dec.", "F", "F rec.", "F dec.")


@dataclass(frozen=True)
class Scores:
    """J and F of an object, or the average of several."""

    region: Statistics
    boundary: Statistics

    @property
    def both(self) -> float:
        """J&F: the average of the two means."""
        return (self.region.mean + self.boundary.mean) / 2

    def as_json(self) -> dict[str, Any]:
        """By the names that papers use."""
        return {"J&F": self.both, "J": self.region._asdict(), "F": self.boundary._asdict()}


def average(scores: Sequence[Scores]) -> Scores:
    """The average of each number over objects; one or more."""
    region = np.mean([each.region for each in scores], axis=0)
    boundary = np.mean([each.boundary for each in scores], axis=0)
    return Scores(Statistics(*region.tolist()), Statistics(*boundary.tolist()))


@dataclass
class Results:
    """Of a run, in the order of the sequences.

    Attributes:
        objects: by sequence, its objects' scores by their index in the masks; no objects where
            masks were written without being scored.
        frames: by sequence, how many it has.
        failed: by sequence, why it has no result.
    """

    objects: dict[str, Mapping[int, Scores]] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def overall(self) -> Scores | None:
        """The average over all objects of all sequences, as the benchmark has it; None without."""
        every = [scores for objects in self.objects.values() for scores in objects.values()]
        return average(every) if every else None

    def as_json(self) -> dict[str, Any]:
        """All of it; measures are 0 to 1."""
        overall = self.overall()
        return {
            "overall": overall.as_json() if overall else None,
            "counts": {
                "objects": sum(map(len, self.objects.values())),
                "sequences": len(self.objects),
                "failed": len(self.failed),
            },
            "sequences": {
                name: {
                    **(average(list(objects.values())).as_json() if objects else {}),
                    "frames": self.frames[name],
                    "objects": {str(i): scores.as_json() for i, scores in objects.items()},
                }
                for name, objects in self.objects.items()
            },
            "failed": dict(self.failed),
        }

    def table(self) -> str:
        """For people: a row for each sequence and one overall; measures in percent."""
        width = max(len(name) for name in (*self.objects, *self.failed, "overall"))
        head = "".join(f"{name:>8}" for name in _COLUMNS)
        lines = [f"{'sequence':<{width}}  objects{head}"]
        for name, objects in self.objects.items():
            row = (
                _row(average(list(objects.values()))) if objects else "  masks written, not scored"
            )
            lines.append(f"{name:<{width}}{len(objects) or '':>9}{row}")
        lines += [f"{name:<{width}}  failed: {reason}" for name, reason in self.failed.items()]
        overall = self.overall()
        if overall:
            number = sum(map(len, self.objects.values()))
            lines.append(f"{'overall':<{width}}{number:>9}{_row(overall)}")
        of = len(self.objects) + len(self.failed)
        lines.append(f"{len(self.objects)} of {of} sequences count.")
        return "\n".join(lines)


def _row(scores: Scores) -> str:
    numbers = (scores.both, *scores.region, *scores.boundary)
    return "".join(f"{100 * number:8.1f}" for number in numbers)
