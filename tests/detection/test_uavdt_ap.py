"""AP of vehicles: known answers, an independent slow implementation, ignored regions."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.annotations import register_coco_format
from flsl_d2.detection.uavdt_ap import UAVDTEvaluator, average_precision


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def slow_average_precision(detections, truth, threshold) -> float:
    """One detection after the other, area under the curve as a sum over recalls."""
    ranked = sorted(
        (
            (-score, image, box)
            for image, (boxes, scores) in detections.items()
            for box, score in zip(boxes, scores, strict=True)
        ),
        key=lambda entry: entry[0],
    )
    total = sum(map(len, truth.values()))
    found, taken, points = 0, set(), []
    for seen, (_, image, box) in enumerate(ranked, start=1):
        overlaps = [overlap(box, other) for other in truth.get(image, [])]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= threshold and (image, best) not in taken:
            taken.add((image, best))
            found += 1
        points.append((found / total, found / seen))
    area, last = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        area += (recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return 100 * area


def one(boxes, scores):
    return {1: (np.array(boxes, float).reshape(-1, 4), np.array(scores, float))}


TWO = {1: np.array([[0, 0, 10, 10], [20, 0, 30, 10]], float)}


def test_known_answers():
    right, other, wrong = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]
    assert average_precision(one([right, other], [0.9, 0.8]), TWO, 0.7) == 100
    assert average_precision(one([right], [0.9]), TWO, 0.7) == 50
    assert average_precision(one([wrong, right], [0.9, 0.8]), TWO, 0.7) == 25
    assert average_precision(one([right, right, other], [0.9, 0.8, 0.7]), TWO, 0.7) == (
        pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    )
    assert average_precision(one([], []), TWO, 0.7) == 0
    assert np.isnan(average_precision(one([right], [0.9]), {1: np.zeros((0, 4))}, 0.7))


def test_the_threshold_is_0_7():
    almost = [0, 0, 10, 7]  # IoU 0.7 exactly
    assert average_precision(one([almost], [0.9]), TWO, 0.7) == 50
    assert average_precision(one([[0, 0, 10, 6.9]], [0.9]), TWO, 0.7) == 0
    assert average_precision(one([[0, 0, 10, 6.9]], [0.9]), TWO, 0.5) == 50


box = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), box), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 2), box), max_size=12),
    st.randoms(use_true_random=False),
    st.sampled_from([0.5, 0.7]),
)
def test_equals_the_slow_definition(objects, found, random, threshold):
    truth, detections = {}, {}
    for image, each in objects:
        truth.setdefault(image, []).append(each)
    scores = random.sample(range(1, 100), len(found))  # no ties
    for (image, each), score in zip(found, scores, strict=True):
        boxes, values = detections.setdefault(image, ([], []))
        boxes.append(each)
        values.append(score / 100)
    arrays = {k: (np.array(b, float), np.array(s)) for k, (b, s) in detections.items()}
    expected = slow_average_precision(detections, truth, threshold) if found else 0.0
    result = average_precision(arrays, {k: np.array(v, float) for k, v in truth.items()}, threshold)
    assert result == pytest.approx(expected)


@pytest.fixture
def name(tmp_path):
    """Register a car and a truck in one image, a region to ignore in another."""
    entries = [
        (1, 1, [0, 0, 10, 10], 0),
        (1, 2, [20, 0, 10, 10], 0),
        *((2, category, [50, 50, 40, 40], 1) for category in (1, 2, 3)),
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": i, "name": n} for i, n in enumerate(("car", "truck", "bus"), 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": b, "iscrowd": crowd}
            for i, (image, category, b, crowd) in enumerate(entries, start=1)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    name = f"test_{uuid.uuid4().hex}"
    register_coco_format(name, tmp_path / "truth.json", tmp_path)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def evaluate(name: str, found: dict[int, list[tuple[list[float], float, int]]]) -> dict:
    evaluator = UAVDTEvaluator(name)
    evaluator.reset()
    for image in (1, 2):
        instances = Instances((100, 100))
        entries = found.get(image, [])
        instances.pred_boxes = Boxes(torch.tensor([b for b, _, _ in entries]).reshape(-1, 4))
        instances.scores = torch.tensor([s for _, s, _ in entries])
        instances.pred_classes = torch.tensor([c for _, _, c in entries], dtype=torch.long)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()["uavdt"]


CAR, TRUCK = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]


def test_all_vehicles_and_each_class(name):
    scores = evaluate(name, {1: [(CAR, 0.9, 0), (TRUCK, 0.8, 0)]})  # the truck is called a car
    assert scores["AP70"] == 100
    assert scores["AP70-car"] == 100
    assert scores["AP70-truck"] == 0
    assert np.isnan(scores["AP70-bus"])
    assert scores["mAP70"] == scores["mAP50"] == 50


def test_detections_in_an_ignored_region_count_neither_way(name):
    within, half_out = [60.0, 60.0, 70.0, 70.0], [40.0, 60.0, 58.0, 70.0]
    right = {1: [(CAR, 0.5, 0), (TRUCK, 0.4, 1)]}
    assert evaluate(name, {**right, 2: [(within, 0.9, 0)]})["AP70"] == 100
    assert evaluate(name, {**right, 2: [(half_out, 0.9, 0)]})["AP70"] == pytest.approx(200 / 3)


def test_nothing_found(name):
    assert evaluate(name, {})["AP70"] == 0
