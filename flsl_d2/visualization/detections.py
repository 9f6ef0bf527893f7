"""Detections beside the ground truth, a row for each image."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

from flsl_d2.annotations import check_registered_dataset
from flsl_d2.annotations.datasets import use_own_loader
from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import decode_mask
from flsl_d2.files import plain_line
from flsl_d2.images.reader import read_image
from flsl_d2.visualization.figures import (
    SHORTER_SIDE,
    Panel,
    enlarge,
    overlay_masks,
    palette,
    picture_table,
)
from flsl_d2.visualization.fonts import pillow_font

Results = Sequence[dict[str, Any]] | str | os.PathLike[str]
"""Content of the coco_instances_results.json of Detectron2's ``COCOEvaluator``, or its path."""

_PANEL_INCHES = 4.2
_THRESHOLDS = (0.5, 0.3, 0.1, 0.05)
_LONGEST_NAME = 40  # characters


@dataclass(frozen=True)
class DrawnObjects:
    """Objects of one image, ready to be drawn; ground truth has no scores.

    Boxes are (M, 4) float, x0, y0, x1, y1 in pixels of the original image; a mask is a bool array
    (H, W), or None; classes are contiguous numbers.
    """

    boxes: np.ndarray
    masks: list[np.ndarray | None]
    classes: list[int]
    scores: list[float] | None


def ground_truth(record: dict[str, Any]) -> DrawnObjects:
    """Return the annotated objects of a Detectron2 record, crowds left out."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = record["height"], record["width"]
    return DrawnObjects(
        boxes=np.asarray(boxes, float).reshape(-1, 4),
        masks=[decode_mask(a.get("segmentation"), *size) for a in annotations],
        classes=[a["category_id"] for a in annotations],
        scores=None,
    )


def found_objects(
    results: Sequence[dict[str, Any]],
    record: dict[str, Any],
    score_threshold: float,
    contiguous: dict[int, int] | None,
) -> DrawnObjects:
    """Return the detections of a Detectron2 record from a score on, out of COCO results.

    ``contiguous`` has the class number of each category id of the data set.

    Raises:
        InputError: the results are of another data set.
    """
    own = [
        r for r in results if r["image_id"] == record["image_id"] and r["score"] >= score_threshold
    ]
    unknown = {r["category_id"] for r in own} - set(contiguous) if contiguous else set()
    if unknown:
        raise InputError(
            f"the detections have category_id {min(unknown)}, which the data set does not: name "
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


def choose_records(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Choose ``count`` records, spread evenly over those with objects; always the same ones."""
    having = [r for r in records if any(not a.get("iscrowd") for a in r.get("annotations", []))]
    having = having or records
    chosen = np.linspace(0, len(having) - 1, min(count, len(having))).round().astype(int)
    return [having[i] for i in chosen]


def draw_objects(image: np.ndarray, objects: DrawnObjects, class_names: list[str]) -> np.ndarray:
    """Draw masks, boxes and names on an image, enlarged first if it is small.

    Every object has a colour of its own, small objects lie above large ones, and a name stands
    where it covers the least of other names and of objects. The result is (H', W', 3) uint8 RGB,
    the shorter side at least 384 px.
    """
    large, factor = enlarge(image)
    if not objects.classes:
        return large
    boxes = objects.boxes * factor
    colours = palette(len(boxes))
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable").tolist()
    masks = [(mask, i) for i in order if (mask := objects.masks[i]) is not None]
    large = overlay_masks(large, [mask for mask, _ in masks], colours[[i for _, i in masks]])
    canvas = Image.fromarray(large)
    pen = ImageDraw.Draw(canvas)
    line = max(2, min(large.shape[:2]) // 250)
    for i in order:
        pen.rectangle(_ordered(boxes[i]), outline=tuple(colours[i].tolist()), width=line)
    taken = np.zeros((0, 4))
    # A page shows every image with the same width, so text on a large one has to be larger.
    text_size = max(13, round(14 * large.shape[1] / (1.25 * SHORTER_SIDE)))
    for i in order[::-1]:
        number = objects.classes[i]
        name = class_names[number] if number < len(class_names) else str(number)
        text = plain_line(name)
        if len(text) > _LONGEST_NAME:
            text = text[: _LONGEST_NAME - 1] + "…"
        if objects.scores is not None:
            text += f" {objects.scores[i]:.0%}"
        font = pillow_font(text, text_size)
        size = np.array([font.getlength(text) + 4, 1.25 * text_size])
        place = _free_place(boxes[i], size, taken, boxes, large.shape)
        taken = np.vstack([taken, [*place, *(place + size)]])
        pen.rectangle([*place, *(place + size)], fill=(0, 0, 0))
        colour = tuple(np.maximum(colours[i], 96).tolist())  # readable on black
        pen.text((place[0] + 2, place[1]), text, fill=colour, font=font)
    return np.asarray(canvas)


def _ordered(box: np.ndarray) -> list[float]:
    """Corners of a box, the upper left one first: a detector may swap them."""
    return [*np.minimum(box[:2], box[2:]).tolist(), *np.maximum(box[:2], box[2:]).tolist()]


def _free_place(
    box: np.ndarray, size: np.ndarray, taken: np.ndarray, boxes: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Find the upper left corner of a name of a size beside its box that covers the least.

    Names that are drawn already, ``taken`` (N, 4), count ten times as much as objects (M, 4).
    """
    x0, y0, x1, y1 = _ordered(box)
    width, height = size
    across, down = (x0, x1 - width, (x0 + x1 - width) / 2), (y0 - height, y1, y0, y1 - height)
    places = np.array([(x, y) for y in down for x in across])
    places = np.clip(places, 0, np.maximum(np.array([shape[1], shape[0]]) - size, 0))

    def covered(others: np.ndarray) -> np.ndarray:
        low = np.maximum(places[:, None], others[None, :, :2])
        high = np.minimum(places[:, None] + size, others[None, :, 2:])
        return np.prod(np.maximum(high - low, 0), axis=2).sum(axis=1)

    return places[(10 * covered(taken) + covered(boxes)).argmin()]


def detections_beside_ground_truth(
    dataset_name: str,
    results: Results,
    path: str | os.PathLike[str],
    num_images: int = 6,
    score_threshold: float | None = None,
) -> None:
    """Write a PNG with a row for each image: the image, its ground truth, the detections.

    Args:
        dataset_name: registered data set in COCO format.
        results: COCO results or their file.
        num_images: number of rows; the images are spread evenly over those with objects.
        score_threshold: detections with a lower score are not drawn; by default the highest of
            0.5, 0.3, 0.1 and 0.05 with any detection in these images.

    Raises:
        InputError: unknown data set, faulty data set files, unreadable results or images, or no
            image.
    """
    check_registered_dataset(dataset_name)
    use_own_loader(dataset_name)
    if num_images < 1:
        raise InputError(f"num_images={num_images} draws nothing: give 1 or more.")
    records = choose_records(DatasetCatalog.get(dataset_name), num_images)
    if not records:
        raise InputError(f"the data set {dataset_name!r} has no image: nothing can be drawn.")
    metadata = MetadataCatalog.get(dataset_name)
    class_names = list(metadata.get("thing_classes", []))
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    found = results
    if isinstance(found, (str, os.PathLike)):
        try:
            found = json.loads(Path(found).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"the detections {results} cannot be read ({error}): name the "
                "coco_instances_results.json that an evaluation wrote."
            ) from None
    if score_threshold is None:
        shown = {record["image_id"] for record in records}
        best = max((r["score"] for r in found if r["image_id"] in shown), default=1.0)
        score_threshold = next((each for each in _THRESHOLDS if best >= each), _THRESHOLDS[-1])
    rows = []
    for record in records:
        image = read_image(record["file_name"])
        row = [Panel(enlarge(image)[0], os.path.basename(record["file_name"]))]
        detected = found_objects(found, record, score_threshold, contiguous)
        for objects, noun in ((ground_truth(record), "object"), (detected, "detection")):
            count = len(objects.classes)
            note = f"{count or 'no'} {noun}{'s' * (count != 1)}"
            row.append(Panel(draw_objects(image, objects, class_names), note))
        rows.append(row)
    headings = ("image", "ground truth", f"detections (score at least {score_threshold:.0%})")
    picture_table(path, f"Detections on {dataset_name}", rows, headings, width=_PANEL_INCHES)
