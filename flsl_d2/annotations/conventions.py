"""Recognition of boxes that are written in another convention than COCO's x, y, width, height."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask

from flsl_d2.annotations.shapes import Size, compressed, usable_segmentation

_MOST_COMPARED = 2000  # annotations, spread evenly over the file
_FEWEST = 5  # annotations from which a convention can be concluded
# Intersection over union of a box with the extents of its mask; small boxes are rounded.
_SAME = 0.75
_OTHER = 0.5  # the same, below which a box is not that of its mask
_BORDER = 1.0  # pixels by which a right box may reach over the border
# Share of boxes that reach over the border where corners were taken for sizes.
_REACHING_SHARE = 0.1
_CORNERS = "two corners instead of x, y, width, height"

Boxes = np.ndarray  # (N, 4) float64


class Convention(NamedTuple):
    """A way in which boxes are written."""

    description: str  # noun phrase that follows "boxes seem to be"
    # Whether the boxes fit their masks when read so; otherwise they only do not fit as they are,
    # which boxes of objects that are partly hidden need not.
    certain: bool


def find_other_convention(
    annotations: Sequence[dict[str, Any]], sizes: dict[Any, Size]
) -> Convention | None:
    """Find out how boxes, each of four numbers, seem to be meant, if not as x, y, width, height.

    Boxes are compared with the extents of their masks. Without masks, only two conventions leave
    traces in the boxes themselves: shares of the image, and corners, which taken for width and
    height reach over the border.
    """
    known = [a for a in annotations if sizes.get(a["image_id"], (math.inf,))[0] != math.inf]
    if len(known) < _FEWEST:
        return None
    places = np.linspace(0, len(known) - 1, min(len(known), _MOST_COMPARED)).astype(int)
    chosen = [known[i] for i in places]
    boxes = np.array([a["bbox"] for a in chosen], float)
    limits = np.array([sizes[a["image_id"]][::-1] for a in chosen], float)  # (N, 2) width, height
    if boxes.max() <= 1 and limits.min() > 2:
        return Convention("shares of the image from 0 to 1 instead of pixels", True)
    extents = [_extents(a, sizes[a["image_id"]]) for a in chosen]
    compared = np.array([e is not None for e in extents])
    if compared.sum() >= _FEWEST:
        masks = np.array([e for e in extents if e is not None], float)
        return _compare_with_masks(boxes[compared], limits[compared], masks)
    ordered = (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= limits + _BORDER).all()
    reaching = (boxes[:, :2] + boxes[:, 2:] > limits + _BORDER).any(axis=1).mean()
    return Convention(_CORNERS, True) if ordered and reaching >= _REACHING_SHARE else None


def _extents(annotation: dict[str, Any], size: Size) -> list[float] | None:
    """Box x, y, width, height of a mask."""
    segmentation = usable_segmentation(annotation.get("segmentation"), size)
    if segmentation is None:
        return None
    if isinstance(segmentation, dict):
        return list(pycocotools.mask.toBbox(compressed(segmentation, size)))
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    # A mask of no area, such as a line, says nothing about its box.
    return [x0, y0, x1 - x0, y1 - y0] if x1 > x0 and y1 > y0 else None


def _compare_with_masks(boxes: Boxes, limits: np.ndarray, masks: Boxes) -> Convention | None:
    if np.median(_overlap(boxes, masks)) >= _OTHER:
        return None
    relative = np.tile(limits, 2)
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    middle = boxes - np.pad(boxes[:, 2:] / 2, ((0, 0), (0, 2)))
    readings = {
        _CORNERS: (corners, masks),
        "the middle of the box instead of its upper left corner": (middle, masks),
        "y before x and height before width": (boxes[:, [1, 0, 3, 2]], masks),
        "per cent of the image instead of pixels": (boxes * relative / 100, masks),
        "pixels, while the masks are shares of the image from 0 to 1": (boxes, masks * relative),
    }
    for description, reading in readings.items():
        if np.median(_overlap(*reading)) >= _SAME:
            return Convention(description, True)
    scale = np.median(masks[:, 2:] / boxes[:, 2:], axis=0)
    if np.median(_overlap(boxes * np.tile(scale, 2), masks)) >= _SAME:
        sides = f"{1 / scale[0]:.3g} times as wide and {1 / scale[1]:.3g} times as high"
        return Convention(f"pixels of another picture, {sides}", True)
    return Convention("those of other objects or pictures", False)


def _overlap(first: Boxes, second: Boxes) -> np.ndarray:
    """Intersection over union of each pair of boxes x, y, width, height: (N,)."""
    upper = np.maximum(first[:, :2], second[:, :2])
    lower = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    common = (lower - upper).clip(min=0).prod(axis=1)
    union = first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - common
    return common / np.maximum(union, 1e-12)
