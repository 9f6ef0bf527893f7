"""The table of a study: means, spreads and verdicts, made from the records of jobs."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from tabulate import tabulate

from flsl_d2.evaluation.measures import MEASURES, better
from flsl_d2.files import write_text
from flsl_d2.studies.jobs import Job, Record

_MAX_COLUMNS = 8  # as many as a page of paper or a screen has room for
# Until the format's own marks replace them: around cells in bold, and bars within cells.
_BOLD, _END, _BAR = "\x01", "\x02", "\x03"


@dataclass(frozen=True)
class Measure:
    """Column of numbers: heading, ``higher`` or ``lower`` if that is better, digits shown."""

    name: str
    better: str = ""
    digits: int = 2


@dataclass(frozen=True)
class Cell:
    """One measure of one row: values of the seeds that succeeded, reasons of those that did not.

    ``omitted`` is the reason why the measure has no meaning for the row; empty where it has one.
    """

    values: tuple[float, ...] = ()
    failures: tuple[str, ...] = ()
    omitted: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without values."""
        return mean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None with fewer than two values."""
        return stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """Return mean and spread, and how many seeds failed."""
        failed = len(self.failures)
        if not self.values:
            return "failed" if failed else "n/a" * bool(self.omitted)
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}" + (f" ({failed} failed)" if failed else "")


def differ(one: Cell, other: Cell) -> bool | None:
    """Whether two means are further apart than their two standard deviations together.

    None where nothing tells, because one of them has fewer than two seeds.
    """
    if one.std is None or other.std is None:
        return None
    return abs(mean(one.values) - mean(other.values)) > one.std + other.std


@dataclass(frozen=True)
class Row:
    """Line of a table: labels (which setting was run), cells by measure, facts for the CSV."""

    labels: dict[str, str]
    cells: dict[str, Cell]
    about: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the row in sentences."""
        if len(self.labels) == 1:
            return next(iter(self.labels.values()))
        return ", ".join(f"{key}={value}" for key, value in self.labels.items() if value)

    def cell(self, measure: Measure) -> Cell:
        """Return the cell of a measure; an empty one where there is none."""
        return self.cells.get(measure.name, Cell())


class Shown(NamedTuple):
    """Text of a cell, and its kind: ``label``, ``number``, ``best`` or ``failed``."""

    text: str
    kind: str


@dataclass(frozen=True)
class Table:
    """Rows by measures.

    In Markdown, LaTeX and on the page, a table of few encoders and many measures is transposed. A
    table of a grid is not, because its headings name the keys. All rows have the same labels.
    """

    rows: Sequence[Row]
    measures: Sequence[Measure]

    @property
    def label_names(self) -> list[str]:
        """Headings of the label columns."""
        return list(self.rows[0].labels) if self.rows else []

    def ranking(self, measure: Measure) -> tuple[list[int], list[int]]:
        """Return the rows that may be the best, the one of the best mean first, and the rest.

        The rest differ from the best by more than the spread (:func:`differ`). Both are indexes;
        rows without a value are in neither, and where neither high nor low is better both are
        empty.
        """
        cells = {i: c for i, row in enumerate(self.rows) if (c := row.cell(measure)).values}
        if not measure.better or len(cells) < 2:
            return [], []
        sign = 1 if measure.better == "higher" else -1
        top = max(cells, key=lambda i: sign * mean(cells[i].values))
        rest = [i for i in cells if differ(cells[top], cells[i])]
        return [top, *(i for i in cells if i != top and i not in rest)], rest

    def best(self, measure: Measure) -> list[int]:
        """Return the rows to mark: those that may be the best, if some differ from them."""
        first, rest = self.ranking(measure)
        return sorted(first) if rest else []

    def verdicts(self) -> list[str]:
        """Say in a sentence for each measure what differs beyond the spread over the seeds."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for measure in self.measures:
            first, rest = self.ranking(measure)
            if not first:
                continue
            names = [self.rows[i].name for i in first]
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))
            if all(self.rows[i].cell(measure).std is None for i in (*first, *rest)):
                text = "One seed each, no spread that tells differences from noise (--seeds 0,1,2)"
            elif not rest:
                text = "No difference beyond the spread"
            elif len(first) == 1:
                text = f"{listed} is best, beyond the spread"
            else:
                text = f"{listed} differ by no more than the spread, and are better than the rest"
            found[text].append(measure.name)
        return [" ".join(f"{text}: {', '.join(of)}.".split()) for text, of in found.items()]

    def notes(self, rows: Sequence[Row] | None = None) -> list[str]:
        """Say why cells have no number, in a line for each reason: rows, measures, reason."""
        # Keys of dictionaries, because each name is listed once and in order.
        found: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
        for row in self.rows if rows is None else rows:
            for measure in self.measures:
                cell = row.cell(measure)
                gaps = [("failed", reason) for reason in cell.failures]
                for gap in [*gaps, *([("n/a", cell.omitted)] if cell.omitted else [])]:
                    names, measures = found.setdefault(gap, ({}, {}))
                    names[row.name] = measures[measure.name] = None
        every = len(self.measures)
        return [
            " ".join(f"{kind}: {' | '.join(names)}: {of}: {reason}".split())
            for (kind, reason), (names, measures) in found.items()
            for of in ["everything" if len(measures) == every > 1 else ", ".join(measures)]
        ]

    def lines(self) -> list[list[Shown]]:
        """Return the heading and the lines as shown, all of the same length."""
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
        few = len(self.measures) <= max(_MAX_COLUMNS, len(self.rows))
        if few or self.label_names != ["encoder"]:
            return lines
        lines[0] = [Shown(text, "label") for text in ("measure", *(m.name for m in self.measures))]
        lines[1:] = [[Shown(line[0].text, "number"), *line[1:]] for line in lines[1:]]
        return [list(line) for line in zip(*lines, strict=True)]

    def _formatted(self, style: str, marks: Mapping[str, str]) -> str:
        lines = self.lines()
        align = ["left" if shown.kind == "label" else "right" for shown in lines[0]]
        texts = [
            [
                " ".join(shown.text.split())
                .replace("|", _BAR)
                .join((_BOLD, _END) if shown.kind == "best" else ("", ""))
                for shown in line
            ]
            for line in lines
        ]
        text = tabulate(texts[1:], texts[0], style, disable_numparse=True, colalign=align)
        for mark, shown in marks.items():
            text = text.replace(mark, shown)
        return text

    def markdown(self) -> str:
        """Return a GitHub table with the best in bold; verdicts and reasons of gaps below it."""
        below = [f"- {line}" for line in (*self.verdicts(), *self.notes())]
        text = self._formatted("github", {_BOLD: "**", _END: "**", _BAR: r"\|"})
        return "\n".join([text, *(["", *below] if below else [])]) + "\n"

    def latex(self) -> str:
        """Return a booktabs table with the best in bold; verdicts and gaps are comments."""
        marks = {_BOLD: r"\textbf{", _END: "}", "±": r"$\pm$", _BAR: r"\textbar{}"}
        below = [f"% {line}" for line in (*self.verdicts(), *self.notes())]
        return "\n".join([self._formatted("latex_booktabs", marks), *below]) + "\n"

    def csv(self) -> str:
        """Return all numbers in full; with several seeds, also their spread and number."""
        about = list(dict.fromkeys(name for row in self.rows for name in row.about))
        several = any(len(cell.values) > 1 for row in self.rows for cell in row.cells.values())
        parts = ("", " std", " seeds") if several else ("",)
        measures = [measure.name + part for measure in self.measures for part in parts]
        lines: list[list[object]] = [[*self.label_names, *measures, *about, "failures"]]
        for row in self.rows:
            cells = [row.cell(measure) for measure in self.measures]
            numbers = [n for c in cells for n in (c.mean, c.std, len(c.values))[: len(parts)]]
            failures = "; ".join(note for note in self.notes([row]) if note.startswith("failed"))
            facts = [row.about.get(name, "") for name in about]
            lines.append([*row.labels.values(), *numbers, *facts, failures])
        return csv_text(lines)

    def write(self, folder: Path) -> None:
        """Write ``table.csv``, ``table.md`` and ``table.tex``."""
        for suffix, text in (("csv", self.csv()), ("md", self.markdown()), ("tex", self.latex())):
            write_text(folder / f"table.{suffix}", text)


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Return lines as the text of a CSV file."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def cell_of(records: Iterable[Record], name: str) -> Cell:
    """Make the cell of a measure from the records of its seeds.

    A record that failed as a whole is a failure of each of its measures. A record that is done
    without the measure (the speed of a run of one step, a class that no image has) leaves it out.
    """
    values, failures, omitted = [], [], ""
    for record in records:
        if name in record.outcome.values:
            values.append(record.outcome.values[name])
        elif name in record.outcome.omitted:
            omitted = record.outcome.omitted[name]
        elif record.status != "done":
            failures.append(record.outcome.failures.get(name, record.error or record.status))
    return Cell(tuple(values), tuple(failures), omitted)


@dataclass(frozen=True)
class Subject:
    """Row of a table before its jobs have run.

    Each stage (an evaluation's name, or ``pretrain``) has a job for each seed. ``failure`` is the
    reason why there are no jobs; every cell of the row is then failed.
    """

    labels: dict[str, str]
    jobs: Mapping[str, Sequence[Job]]
    about: dict[str, str] = field(default_factory=dict)
    failure: str = ""


# Measures of which neither higher nor lower is better, by the start of the last part of the name.
_DESCRIPTIVE = (
    *("clusters", "tuned_clusters", "kernel_width"),
    *("loss", "centroids_in_use", "entropy", "feature_std"),
)
# Values of single classes stay in result.json, because COCO has 80 classes.
_SINGLE_CLASS = ("IoU-", "AP-")


def results_table(
    subjects: Sequence[Subject],
    records: Mapping[str, Record],
    stages: Sequence[str],
    timed: Sequence[str] = (),
) -> Table:
    """Make a table with a row for each subject and a column for each number that any job gave.

    Jobs without a record, by key, have not run yet, and their cells are empty. The stages give the
    order of the columns; the duration of those that are ``timed`` is a column as well.
    """
    columns: dict[str, list[str]] = {}
    for stage in stages:
        jobs = [job for subject in subjects for job in subject.jobs.get(stage, ())]
        found = [records[job.key].outcome.values for job in jobs if job.key in records]
        names = dict.fromkeys(name for values in found for name in values)
        shown = [n for n in names if not n.rpartition("/")[2].startswith(_SINGLE_CLASS)]
        columns[stage] = shown or [stage]
    rows = []
    for subject in subjects:
        cells = {}
        if subject.failure:
            failed = Cell(failures=(subject.failure,))
            cells = {name: failed for stage in stages for name in columns[stage]}
        for stage, own in subject.jobs.items():
            known = [records[job.key] for job in own if job.key in records]
            cells |= {name: cell_of(known, name) for name in columns[stage] if known}
            if stage in timed:
                done = tuple(record.seconds for record in known if record.status == "done")
                cells[f"{stage} seconds"] = Cell(done)
        rows.append(Row(subject.labels, cells, subject.about))
    seconds = {stage: [f"{stage} seconds"] for stage in timed}
    shown = [name for stage in stages for name in (*columns[stage], *seconds.get(stage, ()))]
    return Table(rows, [_measure(name) for name in shown])


def _measure(name: str) -> Measure:
    if name == "images/s" or name.endswith(" seconds"):
        return Measure(name, digits=1)
    last = name.rpartition("/")[2]
    descriptive = last.startswith(_DESCRIPTIVE)
    is_feature_measure = name.partition("/")[0] in MEASURES
    direction = better(name) if is_feature_measure else "" if descriptive else "higher"
    digits = 1 if last.endswith("clusters") else 3 if descriptive else 2
    return Measure(name, direction, 0 if last == "centroids_in_use" else digits)
