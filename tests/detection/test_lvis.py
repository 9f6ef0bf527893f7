"""What LVIS needs, with and without its package."""

from __future__ import annotations

import importlib.util
import json
import uuid

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import register_lvis_instances
from detectron2.structures import Boxes, Instances

from flsl_d2.detection.lvis import (
    LVISEvaluator,
    check_lvis_dataset,
    federated_loss_weights,
    require_lvis,
)
from flsl_d2.errors import InputError

NUM_CLASSES = 1203


@pytest.fixture
def name(tmp_path):
    """One image with one box of the first class, as LVIS v1 has it."""
    categories = [
        {"id": i, "name": f"c{i}", "frequency": "rcf"[i % 3], "synset": "", "synonyms": []}
        for i in range(1, NUM_CLASSES + 1)
    ]
    url = "http://images.cocodataset.org/train2017/000000000001.jpg"
    image = {"id": 1, "coco_url": url, "width": 100, "height": 100}
    image |= {"not_exhaustive_category_ids": [], "neg_category_ids": [2]}
    polygon = [10, 10, 50, 10, 50, 50, 10, 50]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40]}
    annotation |= {"area": 1600, "segmentation": [polygon]}
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    name = f"lvis_v1_{uuid.uuid4().hex}"
    register_lvis_instances(name, {}, str(tmp_path / "lvis.json"), f"{tmp_path}/")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_without_its_package_one_sentence_says_what_to_do(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for call in (require_lvis, lambda: check_lvis_dataset(name), lambda: LVISEvaluator(name)):
        with pytest.raises(InputError, match="pip install --no-deps lvis"):
            call()


def test_missing_files_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    check_lvis_dataset(name)
    (tmp_path / "lvis.json").unlink()
    with pytest.raises(InputError, match=r"lvis\.json .* does not exist"):
        check_lvis_dataset(name)


def test_federated_weights_are_roots_of_the_image_counts():
    weights = federated_loss_weights("lvis_v1_train", power=0.5)()
    counts = MetadataCatalog.get("lvis_v1_train").class_image_count
    by_id = torch.tensor([c["image_count"] for c in sorted(counts, key=lambda c: c["id"])])
    assert weights.shape == (NUM_CLASSES,)
    torch.testing.assert_close(weights, by_id.float().sqrt())


def test_the_evaluator_on_todays_numpy(name):
    pytest.importorskip("lvis", reason="LVIS's package is not installed")
    had_float = hasattr(np, "float")
    for box, expected in (([10.0, 10.0, 50.0, 50.0], 100.0), ([60.0, 60.0, 90.0, 90.0], 0.0)):
        evaluator = LVISEvaluator(name)
        evaluator.reset()
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(torch.tensor([box]))
        instances.scores = torch.tensor([0.9])
        instances.pred_classes = torch.tensor([0])
        evaluator.process([{"image_id": 1}], [{"instances": instances}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(expected)
    assert hasattr(np, "float") == had_float
