"""The demo as a command, shortened to a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[1]

# With one core the demo trains in one process, which saves the time of starting a second.
ONE_CORE = hasattr(os, "sched_setaffinity")


def _keep_one_core() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])


def test_leaves_a_table_and_pictures(tmp_path):
    arguments = ["--output", str(tmp_path), "--train-scenes", "16", "--val-scenes", "6"]
    arguments += ["--pretrain-iters", "2", "--detection-iters", "2"]
    result = subprocess.run(
        [sys.executable, "tools/demo.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=_keep_one_core if ONE_CORE else None,
    )
    assert not ONE_CORE or "--num-gpus 1" in result.stdout
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| random weights |" in result.stdout
    assert "| FLSL |" in result.stdout
    assert "encoder weights: " in result.stdout
    for name in (
        "pretraining_curves",
        "detection_curves_random",
        "detection_curves_flsl",
        "detections_random",
        "detections_flsl",
        "clusters_flsl",
        "clusters_random_weights",
        "overview",
    ):
        assert cv2.imread(str(tmp_path / f"{name}.png")) is not None, name
