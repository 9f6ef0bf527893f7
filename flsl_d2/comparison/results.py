"""From the records of jobs to a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flsl_d2.comparison.jobs import Job, Record
from flsl_d2.comparison.table import Cell, Measure, Row, Table, cell_of

__all__ = ["Subject", "results_table"]

# What describes a measurement and is no quality, by the last part of its name.
_NEITHER = (
    "clusters",
    "tuned_clusters",
    "kernel_width",
    "loss",
    "centroids_in_use",
    "entropy",
    "feature_std",
)
# Values of single classes stay in result.json: COCO has 80.
_OF_ONE_CLASS = ("IoU-", "AP-")


@dataclass(frozen=True)
class Subject:
    """One row of a table, before its jobs have run.

    Attributes:
        labels: what it is.
        jobs: by stage (an evaluation's name, or "pretrain"), one for each seed.
        about: see :attr:`flsl_d2.comparison.table.Row.about`.
        failure: why it has no jobs; every cell of its row is then failed.
    """

    labels: dict[str, str]
    jobs: Mapping[str, Sequence[Job]]
    about: dict[str, str] = field(default_factory=dict)
    failure: str = ""


def results_table(
    subjects: Sequence[Subject],
    records: Mapping[str, Record],
    stages: Sequence[str],
    timed: Sequence[str] = (),
) -> Table:
    """A row for each subject, a column for each number that a job of any subject gave.

    Jobs without a record have not run yet: their cells are empty.

    Args:
        subjects: the rows.
        records: of their jobs, by key.
        stages: in the order of their columns.
        timed: stages whose duration is a column, too.
    """
    names = {stage: _value_names(subjects, stage, records) for stage in stages}
    rows = []
    for subject in subjects:
        cells = {}
        if subject.failure:
            failed = Cell(failures=(subject.failure,))
            cells = {name: failed for stage in stages for name in names[stage]}
        for stage, jobs in subject.jobs.items():
            known = [records[job.key] for job in jobs if job.key in records]
            cells |= {name: cell_of(known, name) for name in names[stage] if known}
            if stage in timed:
                done = tuple(record.seconds for record in known if record.status == "done")
                cells[_seconds(stage)] = Cell(done)
        rows.append(Row(subject.labels, cells, subject.about))
    columns = [
        name
        for stage in stages
        for name in [*names[stage], *([_seconds(stage)] if stage in timed else [])]
    ]
    return Table(rows, [_measure(name) for name in columns])


def _value_names(
    subjects: Sequence[Subject], stage: str, records: Mapping[str, Record]
) -> list[str]:
    """Names of a stage's values, in the order of their appearance; the stage's own without any."""
    jobs = [job for subject in subjects for job in subject.jobs.get(stage, ())]
    found = [records[job.key].outcome.values for job in jobs if job.key in records]
    names = dict.fromkeys(name for values in found for name in values)
    shown = [n for n in names if not n.rpartition("/")[2].startswith(_OF_ONE_CLASS)]
    return shown or [stage]


def _seconds(stage: str) -> str:
    return f"{stage} seconds"


def _measure(name: str) -> Measure:
    if name == "images/s" or name.endswith(" seconds"):
        return Measure(name, digits=1)
    last = name.rpartition("/")[2]
    neither = last.startswith(_NEITHER) or "token_limit" in last or last.endswith("_r2")
    digits = 0 if last == "centroids_in_use" else 3 if last.startswith(_NEITHER) else 2
    return Measure(name, "" if neither else "higher", digits)
