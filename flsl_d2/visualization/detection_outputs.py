"""Detections of any origin in one form: COCO results, annotations, or a model's `Instances`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager

from flsl_d2.errors import InputError

# A model: takes (H, W, 3) uint8 BGR like Detectron2's DefaultPredictor and gives what that gives,
# {"instances": Instances}, or the Instances themselves.
Predictor = Callable[[np.ndarray], Any]
# What COCOEvaluator writes to coco_instances_results.json, or the path of that file.
Results = Sequence[dict[str, Any]] | str | os.PathLike[str]


@dataclass(frozen=True)
class DrawnObjects:
    """Objects of one image, ready to be drawn.

    Attributes:
        boxes: (M, 4) float, x0, y0, x1, y1 in pixels of the original image.
        masks: M bool arrays (H, W), or None for each object without a mask.
        classes: M contiguous class numbers.
        scores: M scores in [0, 1], None for ground truth.
    """

    boxes: np.ndarray
    masks: list[np.ndarray | None]
    classes: list[int]
    scores: list[float] | None


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """A COCO segmentation (polygons, RLE of either kind) as bool (H, W); None for none."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation).astype(bool)


def ground_truth(record: dict[str, Any]) -> DrawnObjects:
    """The annotations of one Detectron2 dataset record; crowds are left out."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = record["height"], record["width"]
    return DrawnObjects(
        boxes=np.asarray(boxes, float).reshape(-1, 4),
        masks=[decode_mask(a.get("segmentation"), *size) for a in annotations],
        classes=[a["category_id"] for a in annotations],
        scores=None,
    )


def _from_instances(instances: Instances, score_threshold: float) -> DrawnObjects:
    instances = instances.to("cpu")
    instances = instances[instances.scores >= score_threshold]
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else [None] * len(instances)
    return DrawnObjects(
        boxes=instances.pred_boxes.tensor.detach().numpy().reshape(-1, 4),
        masks=[None if mask is None else mask.astype(bool) for mask in masks],
        classes=instances.pred_classes.tolist(),
        scores=instances.scores.tolist(),
    )


def _from_results(
    results: Sequence[dict[str, Any]],
    record: dict[str, Any],
    score_threshold: float,
    contiguous: dict[int, int] | None,
) -> DrawnObjects:
    own = [
        r for r in results
        if r["image_id"] == record["image_id"] and r["score"] >= score_threshold
    ]  # fmt: skip
    strange = {r["category_id"] for r in own} - set(contiguous) if contiguous else set()
    if strange:
        raise InputError(
            f"the detections have category_id {min(strange)}, which the data set does not: name "
            "the results of an evaluation on this data set."
        )
    boxes = np.asarray([r["bbox"] for r in own], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = record["height"], record["width"]
    return DrawnObjects(
        boxes=boxes,
        masks=[decode_mask(r.get("segmentation"), *size) for r in own],
        classes=[contiguous[r["category_id"]] if contiguous else r["category_id"] for r in own],
        scores=[r["score"] for r in own],
    )


def detector(
    source: Predictor | Results, score_threshold: float, contiguous: dict[int, int] | None
) -> Callable[[dict[str, Any], np.ndarray], DrawnObjects]:
    """A function from a dataset record and its image (BGR) to the detections to draw.

    Args:
        source: a model, or COCO results, or the path of a JSON file with them.
        score_threshold: detections with a lower score are left out.
        contiguous: the dataset's category ids to class numbers, for COCO results.

    Raises:
        InputError: the file of results cannot be read.
    """
    if callable(source):

        def predict(record: dict[str, Any], image_bgr: np.ndarray) -> DrawnObjects:
            output = source(image_bgr)
            instances = output if isinstance(output, Instances) else output["instances"]
            return _from_instances(instances, score_threshold)

        return predict

    if isinstance(source, (str, os.PathLike)):
        try:
            with PathManager.open(os.fspath(source), "r") as stream:
                source = json.load(stream)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the detections {source} cannot be read ({error}): name the "
                "coco_instances_results.json that an evaluation wrote."
            ) from None
    results: Sequence[dict[str, Any]] = source

    def look_up(record: dict[str, Any], image_bgr: np.ndarray) -> DrawnObjects:
        return _from_results(results, record, score_threshold, contiguous)

    return look_up
