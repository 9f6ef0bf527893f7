"""Comparisons as commands: a failing cell, continued runs and bad input."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import cv2
import pytest
import torch
from forked import assert_refused

from flsl_d2.modeling import FLSLViT
from flsl_d2.studies.compare import main
from flsl_d2.weights import write_encoder

DATA = ["--train", "flsl_scenes_train", "--val", "flsl_scenes_val", "--max-images", "4"]
DATA += ["--short-side", "96"]
DETECTION = "configs/demo/mask_rcnn_flsl_vit_scenes.py"


@pytest.fixture
def compare(run_study):
    return lambda *arguments: run_study(main, "--device", "cpu", *arguments)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> str:
    torch.manual_seed(5)  # not the seed of the untrained encoder
    path = tmp_path_factory.mktemp("encoder") / "teacher.pth"
    write_encoder(FLSLViT(img_size=48, patch_size=16, embed_dim=32, depth=1, num_heads=2), path)
    return str(path)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_encoders_side_by_side_with_a_failed_row(compare, encoder_file, tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"PK" + bytes(100))
    output = tmp_path / "out"
    given = [
        *("--weights", "random", "--weights", f"small={encoder_file}"),
        *("--weights", f"damaged={tmp_path / 'damaged.pth'}"),
        *("--measures", "knn_segmentation", *DATA, "--output", str(output), "--pictures", "2"),
    ]
    status, said, errors = compare(*given)
    assert status == 1, said + errors
    failed, cells = re.match(r"error: (\d+) of (\d+) cells of the table failed", errors).groups()
    assert "One seed each" in said
    assert 0 < int(failed) == int(cells) / 3  # one of three encoders
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
    assert "://" not in page

    before = {file: file.stat().st_mtime_ns for file in output.glob("jobs/*/*")}
    status, again, _ = compare(*given[:4], *given[6:], "--weights", f"same={encoder_file}")
    assert status == 0, again
    assert "2 of 2 jobs are done already" in again
    assert {file: file.stat().st_mtime_ns for file in output.glob("jobs/*/*")} == before
    scores = {row["encoder"]: row["knn_segmentation/mIoU"] for row in rows(output)}
    assert scores["same"] == scores["small"] == small["knn_segmentation/mIoU"]


@pytest.mark.slow
def test_detection_with_two_seeds_and_few_labels_on_two_processes(compare, encoder_file, tmp_path):
    """Mask R-CNN of a few steps from two encoders: AP by labelled images, curves, detections."""
    output = tmp_path / "out"
    status, said, errors = compare(
        *("--weights", "random", "--weights", f"small={encoder_file}", "--detection", DETECTION),
        *("--seeds", "0,1", "--output", str(output), "--num-gpus", "2"),
        *("--detection-override", "train.max_iter=30", "train.log_period=5"),
        *("--label-fraction", "4,1.0"),
        "dataloader.train.total_batch_size=2",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
    )
    assert status == 0, said + errors
    assert "4_images_seed_1.txt: 4 of 8 labelled images" in said
    few, every = (
        set((output / "subsets" / f"mask_rcnn_flsl_vit_scenes_{n}_images_seed_0.txt").open())
        for n in (4, 8)
    )
    assert few < every
    for row in rows(output):
        for count in (4, 8):
            assert float(row[f"detection {count} images/box AP"]) >= 0
            assert row[f"detection {count} images/box AP seeds"] == "2"
    with (output / "label_curves.csv").open() as stream:
        assert {row["images"] for row in csv.DictReader(stream)} == {"4", "8"}
    assert "±" in (output / "table.md").read_text()
    assert len(list((output / "pictures").glob("detection*.png"))) == 2
    for name in ("labels_box_AP", "detection_8_images_curves"):
        assert cv2.imread(str(output / "plots" / f"{name}.png")) is not None


def test_bad_input_is_one_sentence_before_any_run(compare, encoder_file, tmp_path):
    encoder, knn = ["--weights", f"small={encoder_file}"], ["--measures", "knn_segmentation"]
    detection = ["--detection", DETECTION]
    cases = [
        ([*encoder], "nothing to evaluate"),
        ([*knn, *DATA], "no encoder"),
        ([*encoder, *knn], "--train NAME"),
        ([*encoder, "--measures", "knn_segmentaton", *DATA], "knn_segmentaton"),
        ([*encoder, *detection, *detection], "two evaluations"),
        (["--weights", "=x.pth", *knn, *DATA], "NAME=FILE"),
        ([*encoder, *knn, *DATA, "--short-side", "small"], "--short-side"),
        ([*encoder, *knn, *DATA, "--nonsense"], "--nonsense"),
        ([*encoder, *knn, "--train", "flsl_scenes_tarin", *DATA[2:]], "flsl_scenes_tarin"),
        ([*encoder, *knn, *DATA, "optimizer.lr=1"], "detection config"),
        ([*encoder, *detection, "optimizer.rl=1"], "optimizer.lr"),
        ([*encoder, *detection, "model.roi_heads.num_classes=3"], "6 categories"),
        ([*encoder, "--davis-root", "/nowhere"], "/nowhere"),
        ([*encoder, *knn, *DATA, "--seeds", "-1"], "--seeds"),
        ([*encoder, *knn, *DATA, "--cluster-option", "a=b"], "--cluster slurm"),
        ([*encoder, *knn, *DATA, "--label-fraction", "0.1"], "add --detection"),
        ([*encoder, *detection, "--label-fraction", "0.5,9"], "8 are labelled"),
        ([*encoder, *detection, "--label-fraction", "0.5,4"], "two evaluations"),
        ([*encoder, *knn, *DATA, "--output", "/proc/no"], "'/proc/no' cannot be written"),
        (["--weights", "random", *knn, *DATA, "--output", "/proc/no"], "cannot be written"),
    ]
    for arguments, part in cases:
        status, _, errors = compare("--output", str(tmp_path / "out"), *arguments)
        assert_refused(status, errors, part, arguments)
    assert not (tmp_path / "out").exists()
