"""Tables of measures: rows of what was run, a cell for each measure, mean and spread over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from flsl_d2.comparison.jobs import Record
from flsl_d2.files import write_text

__all__ = ["Cell", "Measure", "Row", "Shown", "Table", "cell_of"]

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
