"""Pages and plots: complete, self-contained, safe against the content of names."""

from __future__ import annotations

from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from jinja2 import UndefinedError

from flsl_d2.studies.jobs import Job, Outcome, Record
from flsl_d2.studies.plots import bars, heat_maps, lines, overlaid_curves
from flsl_d2.studies.tables import Cell, Measure, Row, Subject, Table, results_table
from flsl_d2.visualization.html import render
from pretrain.studies.grid import Axis

SCORE = Measure("knn/mIoU", "higher")


def grid(keys: dict[str, list[str]]) -> Table:
    """Make a row for each combination; the last one has failed."""
    combinations = [{}]
    for key, values in keys.items():
        combinations = [{**c, key: value} for c in combinations for value in values]
    rows = [
        Row(labels, {SCORE.name: Cell((10.0 + i, 12.0 + i))})
        for i, labels in enumerate(combinations)
    ]
    rows[-1] = Row(rows[-1].labels, {SCORE.name: Cell(failures=("no memory",))})
    return Table(rows, [SCORE])


class Reader(HTMLParser):
    """Collects tags, and what would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def parsed(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


HOSTILE = "<script>alert(1)</script>"


def test_a_page_needs_nothing_but_itself(tmp_path):
    table = grid({"v": ["0.01", HOSTILE]})
    bars(table, SCORE, tmp_path / "bars.png")
    pictures = {f"one > two {HOSTILE}": tmp_path / "bars.png", "absent": tmp_path / "absent.png"}
    page = render(
        "sweep.html.j2",
        title=f'A "page" & {HOSTILE}',
        axes=[Axis("v", ("0.01", HOSTILE))],
        overrides=[f"a={HOSTILE}"],
        table=table,
        plots=pictures,
        curves=tmp_path / "no_curves.png",
        run_columns=["v", "folder"],
        run_rows=[[HOSTILE, "jobs/a"]],
        versions={"torch": "2", "timm": "1"},
        details=[("config", "a < b")],
    )
    reader = parsed(page)
    assert not {"b", "link"} & set(reader.tags)
    assert reader.tags.count("script") == 1, "the page's own"
    assert len(reader.sources) == 1
    assert reader.sources[0].startswith("data:image/png;base64,")
    assert '<td class="failed">failed</td>' in page
    assert "no memory</li>" in page
    assert "<pre>a &lt; b</pre>" in page
    assert "torch 2, timm 1" in page
    assert "url(" not in page
    for tag in ("html", "table", "figure", "details"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>") > 0


def test_comparisons_show_what_there_is(tmp_path):
    table = grid({"encoder": ["flsl", "random"]})
    values = {
        "title": "Comparison", "seeds": (0, 1), "table": table, "bars": {}, "dataset": "scenes",
        "encoder_columns": ["encoder"], "encoder_rows": [["flsl"]], "versions": {}, "details": [],
    }  # fmt: skip
    short = render("comparison.html.j2", **values, detections=[], tokens=None)
    assert "seeds (0, 1)" in short
    assert "img" not in parsed(short).tags
    bars(table, SCORE, tmp_path / "bars.png")
    section = {"title": "detection: c.py", "curves": tmp_path / "bars.png", "pictures": {}}
    full = render(
        "comparison.html.j2", **values, detections=[section], tokens=tmp_path / "bars.png"
    )
    assert parsed(full).tags.count("img") == 2
    assert "<h2>Tokens on scenes</h2>" in full


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        render("comparison.html.j2")


@pytest.mark.parametrize("third", [{}, {"seed_of_views": ["0", "1", "2"]}])
def test_plots_of_a_grid_are_drawn(tmp_path, third):
    one = grid({"v": ["0.01", "0.03", "0.1"], **third})
    lines(one, SCORE, "v", tmp_path / "lines.png")
    two = grid({"v": ["0.01", "0.03"], "gamma": ["1", "5", "9"], **third})
    heat_maps(two, SCORE, "v", "gamma", tmp_path / "map.png")
    for name in ("lines", "map"):
        image = cv2.imread(str(tmp_path / f"{name}.png"))
        assert image is not None
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


def test_curves_leave_out_runs_without_metrics(tmp_path):
    (tmp_path / "a.json").write_text('{"iteration": 0, "loss": 2}\n{"iteration": 1, "loss": 1}\n')
    (tmp_path / "torn.json").write_text('{"iteration": 0, "lo')
    files = {"a": tmp_path / "a.json", "b": tmp_path / "absent.json", "c": tmp_path / "torn.json"}
    assert overlaid_curves(files, {"loss": "loss", "x": "x"}, tmp_path / "c.png", "runs")
    assert cv2.imread(str(tmp_path / "c.png")) is not None
    assert not overlaid_curves(files, {"x": "x"}, tmp_path / "d.png", "runs")
    assert not (tmp_path / "d.png").exists()


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
    table = results_table(subjects, records, ["knn"], timed=["knn"])
    assert [m.name for m in table.measures] == ["knn/mIoU", "knn/clusters", "knn seconds"]
    assert [m.better for m in table.measures] == ["higher", "", ""]
    first, second, third = table.rows
    assert first.cells["knn/mIoU"] == Cell((3.0,), ("no memory",))
    assert first.cells["knn seconds"] == Cell((4.0,))
    assert second.cell(table.measures[0]) == Cell()
    assert third.cells["knn/mIoU"] == Cell(failures=("cannot be read",))
    nothing = results_table(subjects[1:2], {}, ["knn"])
    assert [m.name for m in nothing.measures] == ["knn"]
