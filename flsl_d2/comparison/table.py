"""Tables of measures: rows of what was run, a cell for each measure, mean and spread over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from flsl_d2.comparison.jobs import Record
from flsl_d2.files import write_text

__all__ = ["Cell", "Measure", "Row", "Table", "cell_of"]


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
class Table:
    """Rows by measures.

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

    def _notes(self, start: str) -> list[str]:
        """A line for each reason, with the rows that it stopped."""
        rows: dict[str, list[str]] = {}
        for row in self.rows:
            for reason in self.failures(row):
                rows.setdefault(reason, []).append(", ".join(row.labels.values()))
        return [f"{start}{' | '.join(names)}: {reason}" for reason, names in rows.items()]

    def markdown(self) -> str:
        """A table of GitHub's Markdown, best values in bold, the reasons of failures below it."""
        lines = self._lines(lambda text: text.replace("|", r"\|"), lambda text: f"**{text}**")
        rows = [f"| {' | '.join(cells)} |" for cells in lines]
        rows.insert(1, "| --- " * len(lines[0]) + "|")
        notes = self._notes("- failed: ")
        return "\n".join(rows + (["", *notes] if notes else [])) + "\n"

    def latex(self) -> str:
        """A ``tabular`` for the package booktabs, best values in bold, failures as comments."""
        lines = self._lines(_latex_escaped, lambda text: rf"\textbf{{{text}}}")
        columns = "l" * len(self.label_names) + "r" * len(self.measures)
        body = [" & ".join(cells) + r" \\" for cells in lines]
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:]]
        notes = self._notes("% failed: ")
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

    def _lines(self, escaped: Callable[[str], str], bold: Callable[[str], str]) -> list[list[str]]:
        """Heading and rows as text."""
        lines = [[escaped(text) for text in self.label_names + [m.name for m in self.measures]]]
        best = {measure.name: self.best(measure) for measure in self.measures}
        for i, row in enumerate(self.rows):
            cells = [escaped(text) for text in row.labels.values()]
            for measure in self.measures:
                text = escaped(row.cell(measure).text(measure.digits))
                cells.append(bold(text) if i in best[measure.name] else text)
            lines.append(cells)
        return lines


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
