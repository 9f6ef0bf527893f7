"""Matches, thresholds and words of the report, on detections made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flsl_d2.detection.detections import Detections
from flsl_d2.detection.finetune_report import (
    CROWD,
    NOTHING,
    _best_threshold,
    _compare,
    _figures,
    _notes,
    _verdict,
)


def record(*objects: tuple[list[float], int], crowd: list[float] | None = None) -> dict:
    annotations = [{"bbox": box, "category_id": c, "iscrowd": 0} for box, c in objects]
    if crowd:
        annotations.append({"bbox": crowd, "category_id": 0, "iscrowd": 1})
    return {"annotations": annotations, "height": 100, "width": 100}


def detections(*found: tuple[list[float], int, float]) -> Detections:
    boxes = np.array([[x, y, x + w, y + h] for (x, y, w, h), *_ in found], np.float32)
    classes = np.array([c for _, c, _ in found], int)
    return Detections(boxes.reshape(-1, 4), np.array([s for *_, s in found], np.float32), classes)


A, B, C, D = [0, 0, 20, 20], [40, 0, 20, 20], [0, 40, 20, 20], [60, 60, 30, 30]


def test_an_object_is_matched_once_and_first_by_its_own_class():
    truth = record((A, 0), (B, 1), (C, 0), crowd=D)
    found = detections(
        (A, 1, 0.9),  # the right place, another class
        (A, 0, 0.8),  # its object is taken by now
        ([42, 0, 20, 20], 1, 0.7),  # right
        ([62, 62, 10, 10], 0, 0.6),  # in a crowd, which is neither right nor wrong
        ([0, 80, 9, 9], 0, 0.5),  # nothing there
    )
    compared = _compare(truth, found)
    assert compared.match.tolist() == [0, NOTHING, 1, CROWD, NOTHING]
    assert compared.annotated.tolist() == [0, NOTHING, 1, CROWD, NOTHING]


def test_the_threshold_has_the_best_f1():
    truth = record((A, 0), (B, 0), (C, 0))
    found = detections((A, 0, 0.9), (B, 0, 0.618), (D, 0, 0.5), (C, 0, 0.1))
    # F1 is 2/4, 4/5, 4/6 and 6/7 from the top: the last one counts all.
    assert _best_threshold([_compare(truth, found)]) == 0.1
    without = detections((A, 0, 0.9), (B, 0, 0.618), (D, 0, 0.5))
    assert _best_threshold([_compare(truth, without)]) == 0.61
    assert _best_threshold([_compare(truth, detections())]) == 0.5


def test_an_ap_of_zero_is_explained():
    truth = record((A, 0), (B, 0))
    zero = _figures({"bbox": None}, ["cat", "dog"])

    def notes(found: Detections) -> str:
        return " ".join(_notes(zero, [_compare(truth, found)], ["cat", "dog"], ["hint"]))

    assert "has not begun to learn" in notes(detections())
    wrong = notes(detections((A, 1, 0.9), (B, 1, 0.8)))
    assert "2 of 2 objects are found at the right place with a wrong class" in wrong
    assert "cat as dog" in wrong
    elsewhere = notes(detections((D, 0, 0.9)))
    assert "match 0 of 2 objects" in elsewhere
    assert all(text.endswith("hint") for text in (wrong, elsewhere))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([1, 5, 9, 12, 15, 18], "still rises"),
        ([5, 20, 24, 24.5, 24.2, 24.6], "no longer rises"),
        ([5, 20, 26, 25, 22, 20], "fell from 26.0"),
        ([5, 6], ""),
    ],
)
def test_the_verdict_on_the_length(tmp_path, values, word):
    lines = [json.dumps({"iteration": i, "bbox/AP": v}) for i, v in enumerate(values)]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    verdict = " ".join(_verdict(tmp_path / "metrics.json", "bbox"))
    assert word in verdict
    assert bool(word) == bool(verdict)
