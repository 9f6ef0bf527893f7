"""AP by faster-coco-eval equals pycocotools', and the evaluator takes it."""

from __future__ import annotations

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flsl_d2.detection import coco_evaluator
from flsl_d2.detection.coco_evaluator import evaluate_coco

SIDE = 400


def rle(box: list[float]) -> dict:
    x, y, width, height = (int(value) for value in box)
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    mask[y : y + height // 3, x : x + width // 4] = 0
    code = mask_util.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def random_data(seed: int, num_images: int, num_classes: int, crowd_share: float):
    """Objects of all sizes, detections near them, wrong classes, equal scores, and crowds."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.integers(0, 7)):
            corner = rng.integers(0, SIDE // 2, 2)
            size = rng.choice([6, 20, 60, 150], 2) + rng.integers(0, 9, 2)
            box = [*corner.tolist(), *size.tolist()]
            label = int(rng.integers(1, num_classes + 1))
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label}
            annotation |= {"bbox": box, "segmentation": rle(box), "area": float(size.prod())}
            annotations.append(annotation | {"iscrowd": int(rng.random() < crowd_share)})
            for _ in range(rng.integers(0, 4)):
                moved = [
                    *np.clip(corner + rng.integers(-5, 6, 2), 0, SIDE).tolist(),
                    *np.maximum(size + rng.integers(-4, 5, 2), 4).tolist(),
                ]
                if rng.random() < 0.2:
                    label = int(rng.integers(1, num_classes + 1))
                found = {"image_id": image_id, "category_id": label, "bbox": moved}
                # Two decimals, so that some scores are equal.
                score = round(float(rng.random()), 2)
                results.append(found | {"segmentation": rle(moved), "score": score})
    api = COCO()
    api.dataset = {
        "images": [{"id": i + 1, "height": SIDE, "width": SIDE} for i in range(num_images)],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(num_classes)],
        "annotations": annotations,
    }
    return api, results


@pytest.mark.skipif(not coco_evaluator._HAS_FASTER, reason="faster-coco-eval is not installed")
@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 3), st.sampled_from([0.0, 0.3]))
def test_all_figures_equal_pycocotools(seed, num_images, num_classes, crowd_share):
    truth, results = random_data(seed, num_images, num_classes, crowd_share)
    truth.createIndex()
    for kind in ("bbox", "segm"):
        fast = evaluate_coco(copy.deepcopy(truth), copy.deepcopy(results), kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coco_evaluator, "coco_eval", COCOeval)
            slow = evaluate_coco(copy.deepcopy(truth), copy.deepcopy(results), kind)
        if not results:
            assert fast is None
            continue
        assert type(fast).__name__ == "COCOeval_faster"
        # Sums of the same numbers in another order.
        np.testing.assert_allclose(fast.stats[:12], slow.stats, rtol=0, atol=1e-9)
        for name in ("precision", "recall"):
            np.testing.assert_allclose(fast.eval[name], slow.eval[name], rtol=0, atol=1e-9)
