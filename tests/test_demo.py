"""The demo, shortened to a few steps."""

from __future__ import annotations

import cv2
from forked import FORKED_SUBPROCESS

from pretrain.studies.demo import main


def test_leaves_a_table_and_pictures(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("pretrain.studies.demo.subprocess", FORKED_SUBPROCESS)
    # With one core the demo trains in one process, which saves the time of starting others.
    monkeypatch.setattr("pretrain.studies.demo.usable_cores", lambda: 1)
    # The linear probe takes as long as everything else.
    scores = {"patch k-NN, mIoU": "knn_segmentation/mIoU"}
    monkeypatch.setattr("pretrain.studies.demo.SCORES", scores)
    monkeypatch.setattr("pretrain.studies.demo.SEEDS", (0, 1))
    arguments = ["--output", str(tmp_path), "--train-scenes", "16", "--val-scenes", "6"]
    arguments += ["--pretrain-iters", "2", "--detection-iters", "2"]
    status, output, errors = run_main(main, *arguments)
    assert status == 0, output + errors
    assert "--num-gpus 1" in output
    assert "| random weights |" in output
    assert "| FLSL |" in output
    assert "encoder weights: " in output
    assert output.count(" ± ") >= 2
    assert "| frozen features | patch k-NN, mIoU |" in (tmp_path / "results.md").read_text()
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
