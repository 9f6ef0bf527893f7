"""Sweeps as commands: a real grid, interrupted and continued, evaluated, and bad input."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
from forked import FORK, assert_refused

from flsl_d2.visualization.curves import read_metrics
from pretrain.run import run_pretraining
from pretrain.studies.sweep import Axis, grid_points, main

CONFIG = "configs/demo/flsl_vit_scenes.py"
TINY = """
    train.max_iter=3 train.log_period=1 dataloader.total_batch_size=4 views.global_size=48
    views.local_size=32 model.backbone.embed_dim=32 model.backbone.depth=1 model.head.hidden_dim=32
    model.backbone.num_heads=2 model.head.num_centroids=16 model.head.bottleneck_dim=16
""".split()
GRID = ["--grid", "schedules.intra_weight=0.01,0.3", "--grid", "model.loss.volume_weight=1,5"]
LOW = "schedules.intra_weight=[0.01,0.01]"
# What is measured in seconds differs from run to run.
TIMES = ("images/s", "pretrain seconds", "folder")


def arguments_of(output: Path, *arguments: str) -> list[str]:
    return ["--config-file", CONFIG, "--output", str(output), *arguments, *TINY]


@pytest.fixture
def sweep(run_study):
    return lambda *arguments: run_study(main, *arguments)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        table = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in table]


def records(output: Path) -> dict[Path, dict]:
    return {file: json.loads(file.read_text()) for file in output.glob("jobs/*/result.json")}


def interrupt_in_the_second_run(sweep, output: Path) -> None:
    """Start a grid in a process of its own, and send SIGINT in its second run."""
    process = FORK.Process(target=lambda: sys.exit(sweep(*arguments_of(output, *GRID))[0]))
    process.start()
    end = time.monotonic() + 200
    while len(list(output.glob("jobs/*/metrics.json"))) < 2:
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130


def test_interrupted_grid_goes_on_to_the_table_of_an_uninterrupted_one(sweep, tmp_path, capsys):
    grid = tmp_path / "grid"
    interrupt_in_the_second_run(sweep, grid)
    before = records(grid)
    assert sorted(record["status"] for record in before.values()) == ["done", "interrupted"]
    done = next(file for file, record in before.items() if record["status"] == "done")
    times = {file: file.stat().st_mtime_ns for file in done.parent.iterdir()}

    status, output, _ = sweep(*arguments_of(grid, *GRID))
    assert status == 0
    assert "4 runs of 3 steps: 4 setting(s)" in output
    assert "1 of 4 jobs are done already" in output
    assert "ETA of all" in output
    assert {file: file.stat().st_mtime_ns for file in done.parent.iterdir()} == times
    table = rows(grid / "table.csv")
    settings = [(row["intra_weight"], row["volume_weight"]) for row in table]
    assert settings == [("0.01", "1"), ("0.01", "5"), ("0.3", "1"), ("0.3", "5")]
    assert len({row["loss"] for row in table}) == 4
    assert all(float(row["centroids_in_use"]) >= 1 for row in table)
    assert re.search(r"\| +intra_weight +\| +volume_weight +\| +loss +\|", output)
    for name in ("loss", "loss_curves", "entropy"):
        assert cv2.imread(str(grid / "plots" / f"{name}.png")) is not None
    page = (grid / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') >= 8
    assert "://" not in page

    # What the setting that was cut off gives without interruption and without the sweep.
    points = grid_points(CONFIG, [Axis("model.loss.volume_weight", ("5",))], [*TINY, LOW], [])
    points[0].cfg.train.output_dir = str(tmp_path / "whole")
    process = FORK.Process(target=run_pretraining, args=(points[0].cfg, False))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    whole, _ = read_metrics(tmp_path / "whole" / "metrics.json")
    continued = rows(grid / "runs.csv")[1]
    for key in ("loss", "loss_intra", "loss_inter", "loss_volume", "feature_std"):
        # Resumed on the same processor, to the bit; the log has about six digits.
        assert float(continued[key]) == pytest.approx(whole[key][1][-1], rel=1e-5), key

    # Another grid in the same folder: its run is there already and only has to be evaluated.
    capsys.readouterr()
    measured = ["--train", "flsl_scenes_train", "--val", "flsl_scenes_val"]
    status, output, errors = sweep(
        *arguments_of(grid, "--grid", "model.loss.volume_weight=5", LOW),
        *(*measured, "--measures", "knn_segmentation"),
        *("--short-side", "96", "--weights", "cnn=timm:resnet18?pretrained=false"),
    )
    assert status == 0, output + errors
    assert "1 of 3 jobs are done already" in output
    own, cnn = rows(grid / "table.csv")
    assert (own["volume_weight"], cnn["volume_weight"]) == ("5", "cnn")
    assert 0 < float(cnn["knn_segmentation/mIoU"]) <= 100
    assert cnn["loss"] == ""
    (row,) = rows(grid / "runs.csv")
    assert 0 < float(row["knn_segmentation/mIoU"]) <= 100
    assert row["loss"] == continued["loss"]


def test_bad_input_is_one_sentence_before_any_run(sweep, tmp_path):
    grid = ("--grid", "model.loss.volume_weight=1,5")
    train, val = "flsl_scenes_train", "flsl_scenes_val"
    cases = [
        (["--grid", "model.loss.volume_wieght=1,5"], "model.loss.volume_weight"),
        (["--grid", "model.loss.volume_weight=1,many"], "volume_weight=many"),
        (["--grid", "model.loss.volume_weight"], "key=value,value"),
        (["--grid", "model.loss.volume_weight=1,1"], "a value twice"),
        ([*grid, *grid], "set twice"),
        ([*grid, "model.loss.volume_weight=2"], "set twice"),
        (["--grid", "model.backbone.patch_size=8,7"], "model.backbone.patch_size=7: "),
        (["--grid", "train.precision=fp32,fp8"], "train.precision=fp8: "),
        (["--grid", "views.global_scale=0.5"], "holds a list"),
        (["--grid", "train.seed=0,1"], "--seeds"),
        ([*grid, "train.output_dir=x"], "--output"),
        ([*grid, "--seeds", "0,one"], "--seeds: '0,one'"),
        ([*grid, "--num-gpus", "0"], "--num-gpus"),
        ([*grid, "--val", val], "--train and --val"),
        ([*grid, "--train", "flsl_scenes_tarin", "--val", val], "flsl_scenes_tarin"),
        ([*grid, "--train", train, "--val", val, "--measures", "knn_boxes"], "knn_boxes"),
        ([*grid, "--detection", "configs/pretrain/flsl_vit_small_p16_in1k.py"], "backbone.net"),
        ([*grid, "--detection-override", "a=b"], "add --detection"),
        ([*grid, "--weights", "random"], "--weights needs an evaluation"),
        ([*grid, "dataset.name=", "dataset.root=/nowhere"], "/nowhere"),
        ([*grid, "--output", "/proc/no"], "'/proc/no' cannot be written"),
    ]
    if not torch.cuda.is_available():
        cases.append(([*grid, "train.device=cuda"], "train.device=cpu"))
    for arguments, part in cases:
        status, _, errors = sweep(*arguments_of(tmp_path / "out", *arguments))
        assert_refused(status, errors, part, arguments)
    assert not (tmp_path / "out").exists()
