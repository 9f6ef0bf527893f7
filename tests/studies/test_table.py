"""Table maths with known answers, and the three formats."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.studies.jobs import Outcome, Record
from flsl_d2.studies.tables import Cell, Measure, Row, Table, cell_of

AP = Measure("detection/box AP", "higher", 1)
LOSS = Measure("loss", "", 3)


def example() -> Table:
    return Table(
        [
            Row({"encoder": "random"}, {AP.name: Cell((10.0, 14.0)), LOSS.name: Cell((0.5,))}),
            Row({"encoder": "a|b_50%"}, {AP.name: Cell((20.25,), ("out of memory | 5 GiB",))}),
            Row({"encoder": "lost"}, {AP.name: Cell(failures=("no such file", "no such file"))}),
        ],
        [AP, LOSS],
    )


def test_mean_and_spread_are_of_the_sample():
    cell = Cell((2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0))
    assert cell.mean == 5.0
    assert cell.std == pytest.approx((32 / 7) ** 0.5)
    assert Cell((3.0,)).std is None
    assert Cell().mean is None
    assert Cell((1.0, 2.0)).text(2) == "1.50 ± 0.71"
    assert Cell((1.0,), ("why",)).text(1) == "1.0 (1 failed)"
    assert Cell(failures=("why",)).text(1) == "failed"
    assert Cell().text(1) == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-1e3, 1e3))
def test_a_shift_moves_the_mean_and_leaves_the_spread(values, shift):
    cell, moved = Cell(tuple(values)), Cell(tuple(v + shift for v in values))
    # Values up to 1e6 in float64, and the spread of values whose difference is small beside them.
    assert moved.mean == pytest.approx(cell.mean + shift, abs=1e-6)
    assert moved.std == pytest.approx(cell.std, abs=1e-3)


def test_best_is_by_mean_and_only_where_there_is_a_better():
    table = example()
    assert table.best(AP) == [1]
    assert table.best(LOSS) == []
    same = Table([Row({"e": "a"}, {AP.name: Cell((1.0,))})] * 2, [AP])
    assert same.best(AP) == []
    lower = Measure(AP.name, "lower")
    assert table.best(lower) == [0]


def test_markdown_marks_the_best_and_tells_of_failures():
    lines = example().markdown().splitlines()
    assert lines[0] == "| encoder | detection/box AP | loss |"
    assert lines[2] == "| random | 12.0 ± 2.8 | 0.500 |"
    assert lines[3] == r"| a\|b_50% | **20.2 (1 failed)** |  |"
    assert lines[4] == "| lost | failed |  |"
    assert "- failed: lost: detection/box AP: no such file" in lines
    assert sum("no such file" in line for line in lines) == 1


def test_many_measures_of_few_rows_are_read_downwards():
    measures = [Measure(f"m{i}", "higher", 1) for i in range(9)]
    rows = [
        Row({"encoder": name}, {m.name: Cell((value + i,)) for i, m in enumerate(measures)})
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    lines = Table(rows, measures).markdown().splitlines()
    assert lines[0] == "| measure | a | b |"
    assert lines[2] == "| m0 | 1.0 | **2.0** |"
    assert len(lines) == 2 + len(measures)
    assert r"\begin{tabular}{lrr}" in Table(rows, measures).latex()
    assert Table(rows, measures[:8]).markdown().startswith("| encoder | m0 |")
    assert Table(rows * 5, measures).markdown().startswith("| encoder | m0 |")
    assert Table(rows, measures).csv().startswith("encoder,m0,")
    points = [Row({"volume_weight": "5"}, row.cells) for row in rows]
    assert Table(points, measures).markdown().startswith("| volume_weight | m0 |")


def test_a_cell_without_a_meaning_says_why():
    omitted = Outcome({"a": 1.0}, omitted={"b": "no attention"})
    cells = {name: cell_of([Record("done", omitted)], name) for name in "ab"}
    assert cells["b"] == Cell(omitted="no attention")
    both = Row({"encoder": "vit"}, {"a": Cell((2.0,)), "b": Cell((3.0,))})
    table = Table([both, Row({"encoder": "cnn"}, cells)], [Measure("a"), Measure("b")])
    lines = table.markdown().splitlines()
    assert lines[3] == "| cnn | 1.00 | n/a |"
    assert lines[5] == "- n/a: cnn: b: no attention"
    assert "% n/a: cnn: b: no attention" in table.latex()
    assert table.csv().splitlines()[2] == "cnn,1.0,,"


def test_csv_has_every_number_in_full():
    rows = list(csv.DictReader(io.StringIO(example().csv())))
    assert float(rows[0]["detection/box AP"]) == 12.0
    assert float(rows[0]["detection/box AP std"]) == pytest.approx(8**0.5)
    assert rows[0]["detection/box AP seeds"] == "2"
    assert rows[1]["detection/box AP"] == "20.25"
    assert rows[2]["detection/box AP"] == ""
    assert rows[2]["failures"] == "detection/box AP: no such file"


def test_csv_of_one_seed_has_no_columns_of_spread():
    table = Table([Row({"e": "a"}, {AP.name: Cell((1.0,))}, {"sha256": "f0"})], [AP])
    assert table.csv() == "e,detection/box AP,sha256,failures\na,1.0,f0,\n"


SPECIAL = r"50% of $x_1 & {y}^2 ~ #3 \ <a|b>"


def test_latex_escapes_what_latex_reads():
    row = Row({"encoder": SPECIAL}, {AP.name: Cell((10.0, 14.0))})
    text = Table([row, Row({"encoder": "b"}, {AP.name: Cell((1.0,), ("50% lost",))})], [AP]).latex()
    assert (
        r"50\% of \$x\_1 \& \{y\}\textasciicircum{}2 \textasciitilde{} \#3 \textbackslash{} "
        r"\textless{}a\textbar{}b\textgreater{} & \textbf{12.0 $\pm$ 2.8} \\"
    ) in text
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\n")
    assert "% failed: b: detection/box AP: 50% lost" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path):
    body = Table([Row({"encoder": SPECIAL}, {AP.name: Cell((1.0, 2.0))})], [AP]).latex()
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}"
    (tmp_path / "t.tex").write_text(document + r"\end{document}")
    done = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path)
    assert done.returncode == 0


def test_cells_take_values_and_reasons_from_records():
    records = [
        Record("done", Outcome({"x": 1.0})),
        Record("failed", Outcome({"x": 3.0}, {"y": "y is missing"}), "y: y is missing"),
        Record("failed", error="no memory"),
    ]
    assert cell_of(records, "x") == Cell((1.0, 3.0), ("no memory",))
    assert cell_of(records, "y").failures == ("y is missing", "no memory")
    assert cell_of(records[:1], "y") == Cell()
