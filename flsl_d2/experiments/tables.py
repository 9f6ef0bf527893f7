"""From the records of jobs to a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from flsl_d2.experiments.jobs import Job, Record
from flsl_d2.files import write_text

__all__ = [
    "Cell",
    "Measure",
    "Row",
    "Shown",
    "Subject",
    "Table",
    "cell_of",
    "results_table",
]

_MOST_COLUMNS = 8  # that a page of paper or a screen has room for


@dataclass(frozen=True)
class Measure:
    """A column of numbers.

    Attributes:
        name: heading, with the unit.
        better: ``higher``, ``lower``, or empty where neither is.
        digits: behind the decimal point, in Markdown and LaTeX; CSV keeps all.
    """

    name: str
    better: str = ""
    digits: int = 2


@dataclass(frozen=True)
class Cell:
    """One measure of one row.

    Attributes:
        values: one for each seed that succeeded.
        failures: the reason for each seed that did not.
    """

    values: tuple[float, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without values."""
        return mean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None with fewer than two values."""
        return stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """As people read it: mean and spread, and how many seeds failed."""
        failed = len(self.failures)
        if not self.values:
            return "failed" if failed else ""
        shown = f"{self.mean:.{digits}f}"
        if self.std is not None:
            shown += f" ± {self.std:.{digits}f}"
        return shown + (f" ({failed} failed)" if failed else "")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        labels: what was run, by the table's label columns.
        cells: by name of measure; those that are missing were not measured.
        about: what else belongs to it (hashes, versions); in the CSV and on the page.
    """

    labels: dict[str, str]
    cells: dict[str, Cell]
    about: dict[str, str] = field(default_factory=dict)

    def cell(self, measure: Measure) -> Cell:
        """The cell of a measure, empty where there is none."""
        return self.cells.get(measure.name, Cell())


@dataclass(frozen=True)
class Shown:
    """What stands in one place of a table.

    Attributes:
        text: for people.
        kind: ``label``, ``number``, ``best`` (a number, too) or ``failed``.
    """

    text: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Rows by measures.

    For people, in Markdown, LaTeX and on the page, a table of few encoders and many measures is
    turned over: a line for each measure. The values of a grid would not tell which key they are of.

    Attributes:
        rows: all with the same label columns.
        measures: the columns of numbers.
    """

    rows: Sequence[Row]
    measures: Sequence[Measure]

    @property
    def label_names(self) -> list[str]:
        """Headings of the label columns."""
        return list(self.rows[0].labels) if self.rows else []

    def best(self, measure: Measure) -> list[int]:
        """Indexes of the rows with the best mean; empty where nothing can be compared."""
        means = {i: row.cell(measure).mean for i, row in enumerate(self.rows)}
        means = {i: value for i, value in means.items() if value is not None}
        if not measure.better or len(means) < 2 or len(set(means.values())) == 1:
            return []
        chosen = (max if measure.better == "higher" else min)(means.values())
        return [i for i, value in means.items() if value == chosen]

    def failures(self, row: Row) -> list[str]:
        """What failed in a row, each reason once."""
        told: dict[str, list[str]] = {}
        for measure in self.measures:
            for reason in dict.fromkeys(row.cell(measure).failures):
                told.setdefault(reason, []).append(measure.name)
        every = len(self.measures)
        return [
            f"{'everything' if len(names) == every > 1 else ', '.join(names)}: {reason}"
            for reason, names in told.items()
        ]

    def lines(self) -> list[list[Shown]]:
        """Heading and lines for people, all of the same length."""
        best = {measure.name: self.best(measure) for measure in self.measures}
        lines = [[Shown(name, "label") for name in self.label_names]]
        lines[0] += [Shown(measure.name, "number") for measure in self.measures]
        for i, row in enumerate(self.rows):
            line = [Shown(text, "label") for text in row.labels.values()]
            for measure in self.measures:
                cell = row.cell(measure)
                kind = "failed" if cell.failures else "number"
                kind = "best" if i in best[measure.name] else kind
                line.append(Shown(cell.text(measure.digits), kind))
            lines.append(line)
        few = len(self.measures) <= max(_MOST_COLUMNS, len(self.rows))
        if few or self.label_names != ["encoder"]:
            return lines
        lines[0] = [Shown("measure", "label")] + [
            Shown(measure.name, "label") for measure in self.measures
        ]
        for line in lines[1:]:
            line[0] = Shown(line[0].text, "number")
        return [list(line) for line in zip(*lines, strict=True)]

    def notes(self, start: str = "") -> list[str]:
        """A line for each reason of a failure, with the rows that it stopped."""
        rows: dict[str, list[str]] = {}
        for row in self.rows:
            for reason in self.failures(row):
                rows.setdefault(reason, []).append(", ".join(row.labels.values()))
        return [f"{start}{' | '.join(names)}: {reason}" for reason, names in rows.items()]

    def markdown(self) -> str:
        """A table of GitHub's Markdown, best values in bold, the reasons of failures below it."""

        def text(shown: Shown) -> str:
            escaped = shown.text.replace("|", r"\|")
            return f"**{escaped}**" if shown.kind == "best" else escaped

        lines = [[text(shown) for shown in line] for line in self.lines()]
        rows = [f"| {' | '.join(cells)} |" for cells in lines]
        rows.insert(1, "| --- " * len(lines[0]) + "|")
        notes = self.notes("- failed: ")
        return "\n".join(rows + (["", *notes] if notes else [])) + "\n"

    def latex(self) -> str:
        """A ``tabular`` for the package booktabs, best values in bold, failures as comments."""

        def text(shown: Shown) -> str:
            escaped = _latex_escaped(shown.text)
            return rf"\textbf{{{escaped}}}" if shown.kind == "best" else escaped

        lines = self.lines()
        columns = "".join("l" if shown.kind == "label" else "r" for shown in lines[0])
        body = [" & ".join(map(text, line)) + r" \\" for line in lines]
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:]]
        notes = self.notes("% failed: ")
        return "\n".join([*body, r"\bottomrule", r"\end{tabular}", *notes]) + "\n"

    def csv(self) -> str:
        """Every number in full; where there are several seeds, their spread and number, too."""
        about = list(dict.fromkeys(name for row in self.rows for name in row.about))
        seeds = max(
            (len(cell.values) for row in self.rows for cell in row.cells.values()), default=0
        )
        parts = ("", " std", " seeds") if seeds > 1 else ("",)
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        measures = [measure.name + part for measure in self.measures for part in parts]
        writer.writerow([*self.label_names, *measures, *about, "failures"])
        for row in self.rows:
            cells: list[object] = []
            for measure in self.measures:
                cell = row.cell(measure)
                cells += (cell.mean, cell.std, len(cell.values))[: len(parts)]
            rest = [*(row.about.get(name, "") for name in about), "; ".join(self.failures(row))]
            writer.writerow([*row.labels.values(), *cells, *rest])
        return stream.getvalue()

    def write(self, folder: Path, name: str, latex: bool = False) -> None:
        """Write ``name.csv``, ``name.md`` and, if asked for, ``name.tex``."""
        write_text(folder / f"{name}.csv", self.csv())
        write_text(folder / f"{name}.md", self.markdown())
        if latex:
            write_text(folder / f"{name}.tex", self.latex())


def cell_of(records: Iterable[Record], name: str) -> Cell:
    """The cell of a measure from the records of its seeds.

    A record that failed as a whole is a failure of each of its measures. One that is done without
    the measure (the speed of a run of one step, a class that no image has) leaves it out.
    """
    values, failures = [], []
    for record in records:
        if name in record.outcome.values:
            values.append(record.outcome.values[name])
        elif record.status != "done":
            failures.append(record.outcome.failures.get(name, record.error or record.status))
    return Cell(tuple(values), tuple(failures))


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def _latex_escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


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
        about: see :attr:`flsl_d2.experiments.tables.Row.about`.
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
