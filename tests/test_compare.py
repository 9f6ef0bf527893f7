"""Comparisons as commands: a failing cell, continued runs, bad input, and an installed wheel."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from forked import FORKED_SUBPROCESS

from flsl_d2.annotations import register_scenes
from flsl_d2.modeling import FLSLViT
from flsl_d2.scenes import make_scenes
from flsl_d2.studies.compare import main
from flsl_d2.weights import write_encoder

ROOT = Path(__file__).resolve().parents[1]
DATA = ["--train", "flsl_scenes_train", "--val", "flsl_scenes_val", "--max-images", "4"]
DATA += ["--short-side", "96"]
DETECTION = "configs/demo/mask_rcnn_flsl_vit_scenes.py"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    make_scenes(root / "flsl_scenes", num_train=8, num_val=4, image_size=(96, 96))
    return root


@pytest.fixture
def compare(datasets, monkeypatch, run_main):
    """Run the tool in this process, and its jobs in forked ones."""
    monkeypatch.setattr("flsl_d2.studies.machine.subprocess", FORKED_SUBPROCESS)
    register_scenes(datasets / "flsl_scenes")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *arguments: run_main(main, "--device", "cpu", *arguments)


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
        assert status == 2, (arguments, status, errors)
        assert errors.startswith("error: "), (arguments, errors)
        assert part in errors, (arguments, errors)
        assert errors.count("\n") == 1, (arguments, errors)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder with the package as its wheel installs it."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


INSTALLED = """
import sys, flsl_d2, flsl_d2.model_zoo as zoo
from flsl_d2.studies.compare import main
print(flsl_d2.__file__)
for path in sorted(zoo.configs_folder().rglob("*.*")):
    name = path.relative_to(zoo.configs_folder())
    # Those of pre-training need the checkout.
    if not {"common", "pretrain", "demo", "__pycache__"} & set(name.parts):
        cfg = zoo.get_config(str(name))
        built = "ROI_HEADS" in cfg.MODEL if name.suffix == ".yaml" else cfg.train.max_iter > 0
        print("recipe" if built else "unreadable", name)
main(sys.argv[1:])
"""


def test_installed_wheel_reads_recipes_and_compares_in_an_empty_folder(
    installed, datasets, encoder_file, tmp_path
):
    """Every process runs from the installed files, without the checkout."""
    folder = tmp_path / "empty"
    folder.mkdir()
    command = [
        *(sys.executable, "-c", INSTALLED, "--device", "cpu", "--output", "out", *DATA),
        *("--weights", f"one={encoder_file}"),
        *("--measures", "knn_segmentation", "--pictures", "1"),
    ]
    settings = {"DETECTRON2_DATASETS": str(datasets), "PYTHONPATH": str(installed)}
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | settings | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[0] == str(installed / "flsl_d2" / "__init__.py")
    shipped = {line[7:] for line in result.stdout.splitlines() if line.startswith("recipe ")}
    files = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*")]
    assert shipped == {
        str(name)
        for name in files
        if name.suffix in (".py", ".yaml") and not {"common", "pretrain", "demo"} & set(name.parts)
    }
    assert {"lvis", "objects365", "uavdt", "ade20k", "coco"} == {Path(n).parts[0] for n in shipped}
    (one,) = rows(folder / "out")
    assert float(one["knn_segmentation/mIoU"]) > 0
    (log,) = (file.read_text() for file in (folder / "out").glob("jobs/*/console.txt"))
    assert " -m flsl_d2.evaluation " in log
    assert not any(str(ROOT / part) in log for part in ("tools", "flsl_d2"))
    assert "</html>" in (folder / "out" / "index.html").read_text()
