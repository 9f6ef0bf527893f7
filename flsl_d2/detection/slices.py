"""Slices of a large image, and one detection of each object that several of them show."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from flsl_d2.detection.detections import Detections

# From which overlap two boxes of one class are the same object, as in SAHI (arXiv 2202.06934).
_SAME_OBJECT_IOU = 0.5
# Distance in pixels from an inner border of a slice within which a box ends at it.
_AT_BORDER = 2


def corners(height: int, width: int, side: int, overlap: float) -> Iterable[tuple[int, int]]:
    """Top and left of slices that cover the image; the last ones end at its border."""
    step = max(round(side * (1 - overlap)), 1)
    lasts = [max(length - side, 0) for length in (height, width)]
    return itertools.product(*(sorted({*range(0, last, step), last}) for last in lasts))


def ends_at_slice(
    boxes: np.ndarray, corner: tuple[int, int], size: tuple[int, int], image: tuple[int, int]
) -> np.ndarray:
    """Whether each box of a slice ends at a border that is not the image's, so may be a part."""
    (top, left), (height, width) = corner, size
    inner = [left > 0, top > 0, left + width < image[1], top + height < image[0]]
    distance = np.abs(boxes - [0, 0, width, height])
    return ((distance < _AT_BORDER) & inner).any(axis=1)


def each_object_once(found: Detections, cut: np.ndarray) -> np.ndarray:
    """Choose one detection of each object: non-maximum suppression by class.

    Boxes that end at a slice (``cut``, (M,) bool) come after all others, and are left out where
    half of them lies in a box that is kept: they are parts of objects that another slice or the
    whole image shows. Returns the indexes of the detections to keep, by falling score.
    """
    area = np.prod(found.boxes[:, 2:] - found.boxes[:, :2], axis=1)
    kept: list[int] = []
    for index in np.lexsort((-found.scores, cut)).tolist():
        rivals = [k for k in kept if found.classes[k] == found.classes[index]]
        low = np.maximum(found.boxes[rivals, :2], found.boxes[index, :2])
        high = np.minimum(found.boxes[rivals, 2:], found.boxes[index, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        whole = area[index] if cut[index] else area[rivals] + area[index] - shared
        if not (shared > _SAME_OBJECT_IOU * whole).any():
            kept.append(index)
    return np.array(sorted(kept, key=lambda k: -found.scores[k]), dtype=int)
