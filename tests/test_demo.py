"""The demo, shortened to a few steps."""

from __future__ import annotations

import cv2
from forked import FORKED_SUBPROCESS

from pretrain.studies.demo import main


def test_leaves_a_page_with_verdicts_and_pictures(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr("pretrain.studies.demo.subprocess", FORKED_SUBPROCESS)
    monkeypatch.setattr("flsl_d2.studies.machine.subprocess", FORKED_SUBPROCESS)
    monkeypatch.setattr("pretrain.studies.demo.SEEDS", "0")
    # With one core the demo trains in one process, which saves the time of starting others.
    monkeypatch.setattr("pretrain.studies.demo.usable_cores", lambda: 1)
    for name in ("DETECTRON2_DATASETS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the demo sets them, and this restores them
    arguments = ["--output", str(tmp_path), "--train-scenes", "16", "--val-scenes", "6"]
    status, output, errors = run_main(
        main, *arguments, "--pretrain-iters", "2", "--detection-iters", "2"
    )
    # Detectors of two steps find nothing, which is a failed cell; the page is there all the same.
    assert status in (0, 1), output + errors
    assert "--num-gpus 1" in output
    assert output.index("photograph.png") < output.index("-m pretrain")
    page = (tmp_path / "index.html").read_text()
    for text in ("What to do next", "knn_segmentation/mIoU", "tools/finetune.py"):
        assert text in page
    for name in ("photograph", "pretraining_curves", "clusters"):
        assert cv2.imread(str(tmp_path / f"{name}.png")) is not None, name
