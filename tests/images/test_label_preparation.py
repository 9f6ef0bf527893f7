"""Label images renumbered as Detectron2 expects them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from forked import run_tool
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images.label_images import ade20k_labels, prepare_coco_stuff, stuff_labels


def test_ade20k():
    labels = np.array([[0, 1], [2, 150]], np.uint8)
    assert ade20k_labels(labels).tolist() == [[255, 0], [1, 149]]


def test_stuff():
    panoptic = np.zeros((2, 3, 3), np.uint8)
    panoptic[0, 0] = (7, 1, 0)  # 263
    panoptic[0, 1] = (0, 0, 2)  # 131072
    panoptic[1] = (5, 0, 0)
    segments = [
        {"id": 263, "category_id": 92},
        {"id": 131072, "category_id": 1},
        {"id": 5, "category_id": 200},
    ]
    labels = stuff_labels(panoptic, segments, {92: 1, 200: 53})
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[1, 0, 255], [53, 53, 53]]


def test_coco_stuff_numbers_its_classes_as_detectron2_does(tmp_path):
    """Stuff in the order of Detectron2's list of categories, from 1; things are 0."""
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    stuff = [c["id"] for c in COCO_CATEGORIES if not c["isthing"]]
    things = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]
    drawn = [things[0], stuff[0], stuff[-1], things[-1]]
    for split in ("train2017", "val2017"):
        (coco / f"panoptic_{split}").mkdir()
        pixels = np.zeros((1, 5, 3), np.uint8)
        pixels[0, :4, 0] = [1, 2, 3, 4]
        Image.fromarray(pixels).save(coco / f"panoptic_{split}" / "a.png")
        segments = [{"id": i, "category_id": c} for i, c in enumerate(drawn, start=1)]
        content = {"annotations": [{"file_name": "a.png", "segments_info": segments}]}
        (coco / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
    prepare_coco_stuff(tmp_path, num_workers=1)
    for split in ("train2017", "val2017"):
        labels = np.asarray(Image.open(coco / f"panoptic_stuff_{split}" / "a.png"))
        assert labels.tolist() == [[0, 1, len(stuff), 0, 255]]
    with pytest.raises(InputError, match=r"panoptic_val2017\.json does not exist"):
        prepare_coco_stuff(tmp_path / "nowhere")


def test_the_tool_and_taking_up_an_interrupted_run(tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        (folder / "annotations" / split).mkdir(parents=True)
        for name in ("a", "b"):
            labels = np.array([[0, 150]], np.uint8)
            Image.fromarray(labels).save(folder / "annotations" / split / f"{name}.png")

    def run(root: Path) -> subprocess.CompletedProcess:
        arguments = ("ade20k", "--workers", "1")
        return run_tool("prepare_labels", *arguments, DETECTRON2_DATASETS=str(root))

    assert "2 label images, 2 of them new" in run(tmp_path).stderr
    written = folder / "annotations_detectron2" / "training"
    assert np.asarray(Image.open(written / "a.png")).tolist() == [[255, 149]]
    (written / "b.png").unlink()
    done = run(tmp_path)
    assert done.returncode == 0
    assert "2 label images, 1 of them new" in done.stderr
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
