"""Pages of detections, from results on disk and from models, on scenes and on real images."""

from __future__ import annotations

import json
import uuid
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from flsl_d2.annotations import register_builtin, register_scenes
from flsl_d2.errors import InputError
from flsl_d2.scenes import CLASS_NAMES, make_scenes
from flsl_d2.visualization import detections_beside_ground_truth
from flsl_d2.visualization.detections import (
    DrawnObjects,
    choose_records,
    draw_objects,
    found_objects,
    ground_truth,
)

SIZE = (96, 80)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    name = f"test_{uuid.uuid4().hex}"
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(root, num_train=1, num_val=7, image_size=SIZE)
    register_scenes(root, name)
    yield f"{name}_val"
    for split in ("train", "val"):
        DatasetCatalog.remove(f"{name}_{split}")
        MetadataCatalog.remove(f"{name}_{split}")


def as_instances(objects: DrawnObjects, scores: list[float]) -> Instances:
    instances = Instances(SIZE[::-1])
    instances.pred_boxes = Boxes(torch.as_tensor(objects.boxes).float())
    instances.pred_classes = torch.as_tensor(objects.classes)
    instances.scores = torch.as_tensor(scores)
    instances.pred_masks = torch.as_tensor(np.stack(objects.masks))
    return instances


def coco_results(name: str, score: float = 0.9) -> list[dict[str, Any]]:
    """Perfect results, made by Detectron2's own evaluator, category ids mapped back as it does."""
    results = []
    for record in DatasetCatalog.get(name):
        truth = ground_truth(record)
        found = as_instances(truth, [score] * len(truth.classes))
        results += instances_to_coco_json(found, record["image_id"])
    for result in results:
        result["category_id"] += 1
    return results


def test_results_give_the_truth_again(scenes):
    record = DatasetCatalog.get(scenes)[2]
    contiguous = MetadataCatalog.get(scenes).thing_dataset_id_to_contiguous_id
    truth = ground_truth(record)
    results = coco_results(scenes, 0.6)
    found = found_objects(results, record, 0.5, contiguous)
    assert found.classes == truth.classes
    assert found.scores == pytest.approx([0.6] * len(truth.classes))
    # Detectron2 has rounded the boxes to single precision.
    np.testing.assert_allclose(found.boxes, truth.boxes, atol=1e-3)
    for mask, expected in zip(found.masks, truth.masks, strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert found_objects(results, record, 0.7, contiguous).classes == []


def test_page_from_a_results_file(scenes, tmp_path):
    results = tmp_path / "coco_instances_results.json"
    results.write_text(json.dumps(coco_results(scenes)))
    detections_beside_ground_truth(scenes, results, tmp_path / "p/page.png", num_images=3)
    page = cv2.imread(str(tmp_path / "p/page.png"))
    assert page.shape[0] > page.shape[1] * 0.7
    detections_beside_ground_truth(scenes, [], tmp_path / "empty.png", num_images=3)
    empty = cv2.imread(str(tmp_path / "empty.png"))
    assert empty.shape == page.shape
    third = page.shape[1] // 3
    np.testing.assert_array_equal(empty[150:, : third - 20], page[150:, : third - 20])
    assert (empty[:, -third:] != page[:, -third:]).any()
    assert len(choose_records(DatasetCatalog.get(scenes), 99)) == 7


def test_objects_are_drawn_where_they_are():
    mask = np.zeros((50, 60), bool)
    mask[10:30, 20:50] = True
    objects = DrawnObjects(np.array([[20.0, 10, 50, 30]]), [mask], [2], [0.87])
    blank = np.zeros((50, 60, 3), np.uint8)
    drawn = draw_objects(blank, objects, list(CLASS_NAMES))
    assert min(drawn.shape[:2]) == 384
    factor = 384 / 50
    assert drawn[int(25 * factor), int(40 * factor)].sum() > 0
    assert drawn[int(45 * factor), int(55 * factor)].sum() == 0
    assert drawn[int(3 * factor), int(5 * factor)].sum() == 0
    without = DrawnObjects(np.array([[5.0, 5, 40, 40], [1, 1, 9, 9]]), [None, None], [0, 50], None)
    assert draw_objects(blank, without, []).sum() > 0, "no masks, and classes without a name"


def test_bad_requests(scenes, tmp_path):
    page = tmp_path / "a.png"
    with pytest.raises(InputError, match="is not registered"):
        detections_beside_ground_truth("nothing_val", [], page)
    with pytest.raises(InputError, match="num_images=0"):
        detections_beside_ground_truth(scenes, [], page, num_images=0)
    with pytest.raises(InputError, match=r"none\.json cannot be read"):
        detections_beside_ground_truth(scenes, tmp_path / "none.json", page)
    (tmp_path / "torn.json").write_text('[{"image_id": 1, ')
    with pytest.raises(InputError, match=r"torn\.json cannot be read"):
        detections_beside_ground_truth(scenes, str(tmp_path / "torn.json"), page)
    foreign = [{**result, "category_id": 77} for result in coco_results(scenes)]
    with pytest.raises(InputError, match="category_id 77"):
        detections_beside_ground_truth(scenes, foreign, page)
    assert not page.exists()


@pytest.mark.parametrize(
    ("name", "folder"), [("coco_2017_val", "coco"), ("pennfudan_val", "pennfudan")]
)
def test_real_images(name, folder, datasets_root, tmp_path):
    if not (datasets_root / folder).is_dir():
        pytest.skip(f"no {folder} in {datasets_root}")
    register_builtin(datasets_root)
    records = DatasetCatalog.get(name)
    category = {
        v: k for k, v in MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.items()
    }
    results = [
        {"image_id": r["image_id"], "category_id": category[c], "bbox": [*b[:2], *(b[2:] - b[:2])],
         "score": 0.9}
        for r in records for t in [ground_truth(r)] for b, c in zip(t.boxes, t.classes, strict=True)
    ]  # fmt: skip
    detections_beside_ground_truth(name, results, tmp_path / "page.png", num_images=2)
    assert cv2.imread(str(tmp_path / "page.png")).std() > 30
