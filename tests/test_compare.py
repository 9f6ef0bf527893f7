"""tools/compare.py as a command: encoders x evaluations with a failing cell, resumed; bad input."""

from __future__ import annotations

import csv
import os
import runpy
import sys
import warnings
from pathlib import Path

import cv2
import pytest
import torch

from flsl_d2.data import register_scenes
from flsl_d2.data.scenes import make_scenes
from flsl_d2.modeling import FLSLViT

ROOT = Path(__file__).resolve().parents[1]
DATA = ["--train", "flsl_scenes_train", "--val", "flsl_scenes_val", "--max-images", "4"]
DATA += ["--short-side", "96"]
DETECTION = "detection=configs/demo/mask_rcnn_flsl_vit_scenes.py"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    make_scenes(root / "flsl_scenes", num_train=8, num_val=4, image_size=(96, 96))
    return root


@pytest.fixture
def compare(datasets, monkeypatch, capsys):
    """Runs the tool in this process, whose imports are done; its jobs are processes as always."""
    register_scenes(datasets / "flsl_scenes")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS", ""))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tools/compare.py", "--device", "cpu", *arguments])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            runpy.run_path("tools/compare.py", run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> str:
    torch.manual_seed(5)  # another than that of the untrained encoder
    encoder = FLSLViT(img_size=48, patch_size=16, embed_dim=32, depth=1, num_heads=2)
    path = tmp_path_factory.mktemp("encoder") / "teacher.pth"
    content = {"model": encoder.state_dict(), "encoder": encoder.architecture}
    torch.save({**content, "format": "flsl_d2 encoder", "matching_heuristics": True}, path)
    return str(path)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_encoders_side_by_side_with_a_failed_row(compare, encoder_file, tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"PK" + bytes(100))
    output = tmp_path / "out"
    given = [
        *("--encoder", "random", "--encoder", f"small={encoder_file}"),
        *("--encoder", f"damaged={tmp_path / 'damaged.pth'}"),
        *("--eval", "knn_segmentation", *DATA, "--output", str(output), "--pictures", "2"),
    ]
    status, said, errors = compare(*given)
    assert status == 1, said + errors
    assert errors.startswith("error: 2 of 6 cells of the table failed")
    assert "damaged is left out: weights" in said
    random, small, damaged = rows(output)
    assert 0 < float(random["knn_segmentation/mIoU"]) != float(small["knn_segmentation/mIoU"])
    assert damaged["knn_segmentation/mIoU"] == ""
    assert "damaged.pth" in damaged["failures"]
    assert small["torch"] == str(torch.__version__)
    assert len(small["sha256"]) == 64
    assert "knn\\_segmentation/mIoU" in (output / "table.tex").read_text()
    assert "- failed: damaged: " in (output / "table.md").read_text()
    assert cv2.imread(str(output / "pictures" / "tokens.png")) is not None
    page = (output / "index.html").read_text()
    assert '<td class="failed">failed</td>' in page
    assert "data:image/png;base64," in page
    assert "http" not in page

    before = {file: file.stat().st_mtime_ns for file in output.glob("jobs/*/*")}
    status, again, _ = compare(*given[:4], *given[6:], "--encoder", f"same={encoder_file}")
    assert status == 0, again
    assert "2 of 2 jobs are done already" in again
    assert {file: file.stat().st_mtime_ns for file in output.glob("jobs/*/*")} == before
    scores = {row["encoder"]: row["knn_segmentation/mIoU"] for row in rows(output)}
    assert scores["same"] == scores["small"] == small["knn_segmentation/mIoU"]


@pytest.mark.slow
def test_detection_with_two_seeds_on_two_processes(compare, encoder_file, tmp_path):
    """Mask R-CNN of a few steps from two encoders: AP with spread, curves and detections."""
    output = tmp_path / "out"
    status, said, errors = compare(
        *("--encoder", "random", "--encoder", f"small={encoder_file}", "--eval", DETECTION),
        *("--seeds", "0,1", "--output", str(output), "--num-gpus", "2"),
        *("train.max_iter=30", "train.log_period=5", "dataloader.train.total_batch_size=2"),
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
    )
    assert status == 0, said + errors
    for row in rows(output):
        assert float(row["detection/box AP"]) >= 0
        assert row["detection/box AP seeds"] == "2"
        assert float(row["detection/box AP std"]) >= 0
    assert "±" in (output / "table.md").read_text()
    assert len(list((output / "pictures").glob("detection-*.png"))) == 2
    assert cv2.imread(str(output / "plots" / "detection_curves.png")) is not None


def test_bad_input_is_one_sentence_before_any_run(compare, encoder_file, tmp_path):
    encoder, knn = ["--encoder", f"small={encoder_file}"], ["--eval", "knn_segmentation"]
    cases = [
        ([*encoder], "nothing to evaluate"),
        ([*knn, *DATA], "no encoder"),
        ([*encoder, *knn], "--train NAME"),
        ([*encoder, "--eval", "knn_segmentaton", *DATA], "knn_segmentaton"),
        ([*encoder, *knn, *knn, *DATA], "twice"),
        ([*encoder, *knn, "--train", "flsl_scenes_tarin", *DATA[2:]], "flsl_scenes_tarin"),
        ([*encoder, *knn, *DATA, "optimizer.lr=1"], "detection config"),
        ([*encoder, "--eval", DETECTION, "optimizer.rl=1"], "optimizer.lr"),
        ([*encoder, "--eval", DETECTION, "model.roi_heads.num_classes=3"], "6 categories"),
        ([*encoder, "--eval", "davis=/nowhere"], "/nowhere"),
        ([*encoder, *knn, *DATA, "--seeds", "-1"], "--seeds"),
        ([*encoder, *knn, *DATA, "--output", "/proc/no"], "'/proc/no' cannot be written"),
        (["--encoder", "random", *knn, *DATA, "--output", "/proc/no"], "cannot be written"),
    ]
    for arguments, part in cases:
        status, _, errors = compare("--output", str(tmp_path / "out"), *arguments)
        assert status == 2, (arguments, status, errors)
        assert errors.startswith("error: "), (arguments, errors)
        assert part in errors, (arguments, errors)
        assert errors.count("\n") == 1, (arguments, errors)
    assert not (tmp_path / "out").exists()


def test_help_explains(compare):
    status, output, _ = compare("--help")
    assert status == 0
    for part in ("random:NAME", "detection=", "--seeds", "the same command"):
        assert part in output
