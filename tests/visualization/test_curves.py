"""metrics.json as runs leave it behind, and the page drawn from it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from flsl_d2.errors import InputError
from flsl_d2.visualization import loss_curves
from flsl_d2.visualization.curves import _default_keys, read_metrics


def write(path: Path, records: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def test_what_detectron2_writes_is_read(tmp_path):
    path = tmp_path / "metrics.json"
    writer = JSONWriter(str(path), window_size=1)
    with EventStorage(0) as storage:
        for iteration in range(5):
            storage.iter = iteration
            storage.put_scalars(total_loss=5.0 - iteration, lr=0.1)
            writer.write()
    writer.close()
    series, resumed = read_metrics(path)
    iterations, values = series["total_loss"]
    assert len(iterations) == len(values)
    assert values == sorted(values, reverse=True)
    assert resumed == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"iteration": 0, "loss": 2}\n{"iteration": 3, "lo', {"loss": ([0], [2.0])}),
        ('{"iteration": 1, "loss": 2}\n{"itera\n\n{"iteration": 2, "loss": 1}\n[3]\n',
         {"loss": ([1, 2], [2.0, 1.0])}),
        ('{"iteration": 1, "loss": NaN, "a": "x", "b": true, "c": null, "d": 4}\n',
         {"d": ([1], [4.0])}),
        ('{"iteration": 9, "loss": 1}\n{"iteration": 9, "bbox/AP": 30}\n',
         {"loss": ([9], [1.0]), "bbox/AP": ([9], [30.0])}),
    ],
    ids=["torn at the end", "torn in the middle", "no numbers", "two lines of an iteration"],
)  # fmt: skip
def test_lines_that_are_read_in_part(text, expected, tmp_path):
    (tmp_path / "m.json").write_text(text)
    assert read_metrics(tmp_path / "m.json")[0] == expected


def test_repeated_iterations_count_once(tmp_path):
    first = [{"iteration": i, "loss": 100.0 + i} for i in range(0, 60, 10)]
    second = [{"iteration": i, "loss": float(i)} for i in range(30, 90, 10)]
    series, resumed = read_metrics(write(tmp_path / "m.json", first + second))
    assert series["loss"][0] == list(range(0, 90, 10))
    assert series["loss"][1] == [100, 110, 120, 30, 40, 50, 60, 70, 80]
    assert resumed == [30]


def test_a_run_from_the_start_replaces_all(tmp_path):
    runs = [[{"iteration": i, "loss": float(n)} for i in range(n, 5)] for n in (1, 2, 0)]
    series, resumed = read_metrics(write(tmp_path / "m.json", [r for run in runs for r in run]))
    assert series["loss"] == ([0, 1, 2, 3, 4], [0.0] * 5)
    assert resumed == [0]


def test_default_keys():
    varying, constant = ([0, 1], [1.0, 2.0]), ([0, 1], [1.0, 1.0])
    series = {
        "lr": varying, "loss_cls": varying, "total_loss": varying, "eta_seconds": varying,
        "weight_decay": constant, "bbox/AP": constant, "bbox/AP-person": varying, "new": varying,
    }  # fmt: skip
    assert _default_keys(series) == ["total_loss", "loss_cls", "bbox/AP", "lr", "new"]


def test_page_is_drawn(tmp_path):
    records = [
        {"iteration": i, "loss": 5.0 / (i + 1), "loss_volume": 10.0 ** (-i / 10), "lr": 1e-3 * i}
        for i in (*range(0, 30), *range(20, 40))
    ]
    path = write(tmp_path / "metrics.json", records)
    loss_curves(path, tmp_path / "pictures" / "curves.png")
    page = cv2.imread(str(tmp_path / "pictures" / "curves.png"))
    assert page.std() > 10
    loss_curves(write(tmp_path / "m.json", [{"iteration": 0, "loss": 0.0}]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000, "a single line is enough"


@pytest.mark.parametrize("text", ["", "not json\n", '{"loss": 1}\n', '{"iteration": 3}\n'])
def test_files_without_metrics(text, tmp_path):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError, match="no metrics"):
        loss_curves(tmp_path / "m.json", tmp_path / "a.png")
    with pytest.raises(InputError, match="cannot be read"):
        loss_curves(tmp_path / "none.json", tmp_path / "a.png")
