"""Means, spreads and verdicts with known answers, the three formats, plots and the page."""

from __future__ import annotations

import csv
import io
import itertools
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.studies.compare import section
from flsl_d2.studies.jobs import Job, Outcome, Record
from flsl_d2.studies.plots import bars, heat_maps, label_curves, overlaid_curves
from flsl_d2.studies.table import Cell, Measure, Row, Subject, Table, cell_of, differ, results_table
from flsl_d2.visualization.html import render

AP = Measure("detection/box AP", "higher", 1)
LOSS = Measure("loss", "", 3)
HOSTILE = "<script>alert(1)</script> | $x_1$ 50% & {y} \\ \n~"


def table(*values: tuple[float, ...], measure: Measure = AP) -> Table:
    rows = [Row({"encoder": name}, {AP.name: Cell(v)}) for name, v in zip("abcdef", values)]  # noqa: B905
    return Table(rows, [measure])


def cells(text: str) -> list[list[str]]:
    """Cells of the lines of a Markdown table."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_mean_and_spread_are_of_the_sample():
    cell = Cell((2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0))
    assert cell.mean == 5.0
    assert cell.std == pytest.approx((32 / 7) ** 0.5)
    assert (Cell((3.0,)).std, Cell().mean) == (None, None)
    texts = [Cell((1.0, 2.0)), Cell((1.0,), ("why",)), Cell(failures=("why",)), Cell()]
    assert [c.text(1) for c in texts] == ["1.5 ± 0.7", "1.0 (1 failed)", "failed", ""]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-1e3, 1e3))
def test_a_shift_moves_the_mean_and_leaves_the_spread(values, shift):
    cell, moved = Cell(tuple(values)), Cell(tuple(v + shift for v in values))
    # Values up to 1e6 in float64, and the spread of values whose difference is small beside them.
    assert moved.mean == pytest.approx(cell.mean + shift, abs=1e-6)
    assert moved.std == pytest.approx(cell.std, abs=1e-3)
    assert not differ(cell, cell)


@pytest.mark.parametrize(
    ("values", "best", "verdict"),
    [
        ([(30, 31), (14, 15)], [0], "a is best, beyond the spread"),
        ([(26.0, 27.4), (26.5, 28.1)], [], "no difference beyond the spread"),
        ([(30, 31), (30, 32), (1, 2)], [0, 1], "b, a differ by no more than the spread"),
        ([(26.2,), (27.3,)], [], "one seed each"),
        ([(5, 5), (5, 5)], [], "no difference"),
        ([(5, 5), (6, 6)], [1], "b is best"),
    ],
)
def test_nothing_is_best_within_the_spread(values, best, verdict):
    found = table(*values)
    assert found.best(AP) == best
    assert verdict in found.verdicts()[0].lower()
    assert ("**" in found.markdown()) == (r"\textbf" in found.latex()) == bool(best)


def test_low_may_be_better_and_a_loss_has_no_best():
    lower = Measure(AP.name, "lower")
    assert table((1, 2), (10, 11), measure=lower).best(lower) == [0]
    plain = Measure(AP.name)
    assert table((1, 2), (10, 11), measure=plain).verdicts() == []


def failing() -> Table:
    return Table(
        [
            Row({"encoder": "random"}, {AP.name: Cell((10.0, 14.0)), LOSS.name: Cell((0.5,))}),
            Row({"encoder": "a|b"}, {AP.name: Cell((20.25, 20.25), ("out of | memory",))}),
            Row({"encoder": "lost"}, {AP.name: Cell(failures=("no such file", "no such file"))}),
        ],
        [AP, LOSS],
    )


def test_markdown_tells_of_failures():
    text = failing().markdown()
    assert cells(text)[0] == ["encoder", "detection/box AP", "loss"]
    assert cells(text)[2:] == [
        ["random", "12.0 ± 2.8", "0.500"],
        [r"a\|b", "**20.2 ± 0.0 (1 failed)**", ""],
        ["lost", "failed", ""],
    ]
    assert text.count("no such file") == 1
    assert "- failed: lost: detection/box AP: no such file" in text


def test_many_measures_of_few_rows_are_read_downwards():
    measures = [Measure(f"m{i}", "higher", 1) for i in range(9)]
    rows = [
        Row({"encoder": name}, {m.name: Cell((v, v)) for m in measures})
        for name, v in (("a", 1), ("b", 2))
    ]
    assert cells(Table(rows, measures).markdown())[0] == ["measure", "a", "b"]
    assert len(cells(Table(rows, measures).markdown())) == 2 + len(measures)
    for shown in (Table(rows, measures[:8]), Table(rows * 5, measures)):
        assert cells(shown.markdown())[0][:2] == ["encoder", "m0"]
    points = [Row({"volume_weight": "5"}, row.cells) for row in rows]
    assert cells(Table(points, measures).markdown())[0][:2] == ["volume_weight", "m0"]
    assert Table(rows, measures).csv().startswith("encoder,m0,")


def test_csv_has_every_number_in_full():
    rows = list(csv.DictReader(io.StringIO(failing().csv())))
    assert float(rows[0]["detection/box AP std"]) == pytest.approx(8**0.5)
    assert [row["detection/box AP"] for row in rows] == ["12.0", "20.25", ""]
    assert rows[0]["detection/box AP seeds"] == "2"
    assert rows[2]["failures"] == "failed: lost: detection/box AP: no such file"
    single = Table([Row({"e": "a"}, {AP.name: Cell((1.0,))}, {"sha256": "f0"})], [AP])
    assert single.csv() == "e,detection/box AP,sha256,failures\na,1.0,f0,\n"


def hostile() -> Table:
    rows = [Row({"encoder": HOSTILE}, {AP.name: Cell((10.0, 14.0))})]
    return Table([*rows, Row({"encoder": "b"}, {AP.name: Cell((1, 1), (HOSTILE,))})], [AP])


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path):
    document = (
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{hostile().latex()}"
    )
    (tmp_path / "t.tex").write_text(document + r"\end{document}")
    done = subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path)
    assert done.returncode == 0


def test_names_stay_in_their_cells():
    text = hostile().latex()
    assert all(mark in text for mark in (r"\$x\_1\$", r"50\%", r"\& \{y\}", r"\textbar{}"))
    assert all(
        line.startswith("%") or "alert" not in line or "&" in line for line in text.split("\n")
    )
    assert {len(row) for row in cells(hostile().markdown())[2:]} == {2}
    assert all(line.startswith(("|", "- ")) for line in hostile().markdown().split("\n") if line)


def job(kind: str, name: str) -> Job:
    return Job(kind, name, {"name": name}, lambda *_: [], lambda _: Outcome())


def test_rows_of_jobs_that_failed_were_left_out_or_have_not_run():
    a, b, c = (job("knn", name) for name in "abc")
    subjects = [
        Subject({"encoder": "both seeds"}, {"knn": [a, b]}),
        Subject({"encoder": "not yet"}, {"knn": [c]}),
        Subject({"encoder": "damaged"}, {}, failure="cannot be read"),
    ]
    records = {
        a.key: Record("done", Outcome({"knn/mIoU": 3.0, "knn/clusters": 7.0}), seconds=4.0),
        b.key: Record("failed", error="no memory", seconds=2.0),
    }
    found = results_table(subjects, records, ["knn"], timed=["knn"])
    names = [(m.name, m.better) for m in found.measures]
    assert names == [("knn/mIoU", "higher"), ("knn/clusters", ""), ("knn seconds", "")]
    first, second, third = found.rows
    assert first.cells["knn/mIoU"] == Cell((3.0,), ("no memory",))
    assert first.cells["knn seconds"] == Cell((4.0,))
    assert second.cell(found.measures[0]) == Cell()
    assert third.cells["knn/mIoU"] == Cell(failures=("cannot be read",))
    nothing = results_table(subjects[2:], {}, ["knn"])
    assert [m.name for m in nothing.measures] == ["knn"]
    assert nothing.rows[0].cells["knn"].failures


def test_cells_take_values_and_reasons_from_records():
    records = [
        Record("done", Outcome({"x": 1.0}, omitted={"z": "no attention"})),
        Record("failed", Outcome({"x": 3.0}, {"y": "y is missing"}), "y: y is missing"),
        Record("failed", error="no memory"),
    ]
    assert cell_of(records, "x") == Cell((1.0, 3.0), ("no memory",))
    assert cell_of(records, "y").failures == ("y is missing", "no memory")
    assert cell_of(records[:1], "y") == Cell()
    assert cell_of(records[:1], "z").text(1) == "n/a"


def test_a_page_needs_nothing_but_itself(tmp_path):
    bars(hostile(), AP, tmp_path / "bars.png")
    pictures = {f"one > two {HOSTILE}": tmp_path / "bars.png", "absent": tmp_path / "absent.png"}
    page = render(
        "study.html.j2",
        title=f'A "page" & {HOSTILE}',
        intro=[HOSTILE],
        table=hostile(),
        sections=[section(HOSTILE, pictures, 400, [HOSTILE], captions=True)],
        columns=["v", "folder"],
        rows=[[HOSTILE, "jobs/a"]],
        versions={"torch": "2", "timm": "1"},
        details=[("config", "a < b")],
    )
    assert not re.search("<(b|link)[ >]|alert\\(1\\)</script>", page)
    assert re.findall(r'\s(?:src|href)="(.{22})', page) == ["data:image/png;base64,"]
    assert "is best, beyond the spread" in page
    assert "a &lt; b" in page


@pytest.mark.parametrize("third", [{}, {"seed_of_views": ["0", "$1_2", "2"]}])
def test_heat_maps_of_a_grid_are_drawn(tmp_path, third):
    keys = {"v": ["0.01", "0.03"], "gamma": ["1", "5", "9"], **third}
    labels = [dict(zip(keys, each, strict=True)) for each in itertools.product(*keys.values())]
    cells = [Cell((10.0 + i, 12.0 + i)) for i in range(len(labels) - 1)]
    cells.append(Cell(failures=("no memory",)))
    rows = [Row(own, {AP.name: cell}) for own, cell in zip(labels, cells, strict=True)]
    heat_maps(Table(rows, [AP]), AP, "v", "gamma", tmp_path / "map.png")
    image = cv2.imread(str(tmp_path / "map.png"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_curves_over_labels_have_a_panel_for_each_detector(tmp_path):
    names = [f"{kind}detection {n} images" for kind in ("", "frozen ") for n in (12, 24)]
    measures = [Measure(f"{name}/box AP", "higher") for name in names]
    cells_of = {m.name: Cell((float(i), i + 1.0)) for i, m in enumerate(measures)}
    found = Table([Row({"encoder": e}, cells_of) for e in ("a", HOSTILE)], measures)
    detectors = [(name.rpartition(" ")[0][:-3], name, int(name.split()[-2])) for name in names]
    rows, figures = label_curves(found, detectors, tmp_path)
    assert list(figures) == ["box AP"]
    assert len(rows) == 8
    assert rows[0] == ["a", "detection", 12, "box AP", 0.5, pytest.approx(0.5**0.5), 2]
    assert cv2.imread(str(figures["box AP"])).shape[1] > 900


def test_curves_leave_out_runs_without_metrics(tmp_path):
    (tmp_path / "a.json").write_text('{"iteration": 0, "loss": 2}\n{"iteration": 1, "loss": 1}\n')
    (tmp_path / "torn.json").write_text('{"iteration": 0, "lo')
    files = {"a": tmp_path / "a.json", "b": tmp_path / "absent.json", "c": tmp_path / "torn.json"}
    assert overlaid_curves(files, {"loss": "loss", "x": "x"}, tmp_path / "c.png", "runs")
    assert cv2.imread(str(tmp_path / "c.png")) is not None
    assert not overlaid_curves(files, {"x": "x"}, tmp_path / "d.png", "runs")
