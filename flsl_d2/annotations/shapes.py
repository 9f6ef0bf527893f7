"""Boxes, polygons and masks of a COCO annotation: what can be used of them, and what cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask

from flsl_d2.annotations.findings import Problem

Size = tuple[float, float]  # height, width; infinite where unknown

# Characters hold 5 bits each: runs of up to 2^34 pixels, whose sums still fit 64 bits.
_MAX_CHARACTERS = 7
# Pixels of a box within its image. Detectron2 drops boxes of less than 1e-5 after resizing, in
# single precision.
_LEAST_SIDE = 0.01
_MAX_SIDE = 10**6  # pixels; a longer side cannot be the size of a picture

NOT_A_BOX = Problem("annotations whose bbox is not four numbers x, y, width, height", True)
NO_AREA = Problem("annotations whose box has no area", False)
OUTSIDE = Problem("annotations whose box is outside its image", False)
NO_MASK = Problem("annotations without a mask", False)
EMPTY_MASK = Problem("annotations whose run-length mask is empty", False)
ODD_POLYGON = Problem("annotations with a polygon of odd length", False)
NOT_A_POLYGON = Problem("annotations whose polygon is not a list of numbers", True)
NOT_A_MASK = Problem("annotations whose segmentation is neither list nor mask", True)
NO_COUNTS = Problem("annotations whose run-length mask lacks size or counts", True)
NO_MASK_SIZE = Problem("annotations whose run-length mask has a size that is none", True)
OTHER_SIZE = Problem("annotations whose run-length mask has another size than its image", True)
NO_MASK_TEXT = Problem("annotations whose run-length mask is no text that COCO writes", True)
NOT_FILLING = Problem("annotations whose run-length mask does not fill its image", True)


def is_number(value: object) -> bool:
    """Whether this is a JSON number that a float can hold; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


def is_side(value: Any) -> bool:
    """Whether this is a height or width in whole pixels; 96.0 is one, and the text "96" is not."""
    return is_number(value) and 0 < value <= _MAX_SIDE and value == int(value)


def box_problem(box: Any, size: Size) -> Problem | None:
    """Find the reason why a box cannot be learned, None if it can.

    Args:
        box: COCO's x and y of the upper left corner, width and height, in pixels.
        size: height and width of the image.
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)):
        return NOT_A_BOX
    x, y, width, height = box
    if not (math.isfinite(x + y + width + height) and min(width, height) >= _LEAST_SIDE):
        return NO_AREA
    inside = min(x + width, size[1]) - max(x, 0), min(y + height, size[0]) - max(y, 0)
    if min(inside) < _LEAST_SIDE:
        return OUTSIDE
    return None


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """Write a box that is given by two corners as a polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def has_mask(segmentation: Any) -> bool:
    """Whether a segmentation says more than a box: ``[]``, ``[[]]`` and two corners do not."""
    if isinstance(segmentation, (list, tuple)):
        flat = any(is_number(part) for part in segmentation)
        return flat or any(not isinstance(part, list) or len(part) > 4 for part in segmentation)
    return segmentation is not None


def segmentation_problem(segmentation: Any, size: Size) -> Problem | None:
    """Find the reason why a segmentation cannot be learned as a mask, None if it can.

    Args:
        segmentation: polygons, or a run-length mask as list or text.
        size: height and width of the image.
    """
    if not has_mask(segmentation):
        return NO_MASK
    if isinstance(segmentation, dict):
        return _mask_problem(segmentation, size)
    if not isinstance(segmentation, (list, tuple)):
        return NOT_A_MASK
    return _polygons_problem(segmentation)


def usable_segmentation(segmentation: Any, size: Size) -> Any:
    """Take the polygons of at least three points, or the run-length mask; None without either."""
    if segmentation_problem(segmentation, size) is not None:
        return None
    if isinstance(segmentation, dict):
        return segmentation
    return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]


def _polygons_problem(polygons: Sequence[Any]) -> Problem | None:
    usable = False
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple)):
            return NOT_A_POLYGON
        try:
            finite = math.isfinite(math.fsum(polygon))
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            return NOT_A_POLYGON
        usable |= len(polygon) >= 6 and len(polygon) % 2 == 0
    return None if usable else ODD_POLYGON


def _mask_problem(mask: dict[str, Any], size: Size) -> Problem | None:
    counts, mask_size = mask.get("counts"), mask.get("size")
    if not isinstance(counts, (list, str)) or not isinstance(mask_size, list):
        return NO_COUNTS
    if len(mask_size) != 2 or not all(type(side) is int and side > 0 for side in mask_size):
        return NO_MASK_SIZE
    if math.isfinite(size[0]) and tuple(mask_size) != tuple(size):
        return OTHER_SIZE
    try:
        runs = runs_of_text(counts) if isinstance(counts, str) else counts
    except ValueError:
        return NO_MASK_TEXT
    # pycocotools does not check runs before it writes them into memory.
    whole = all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != mask_size[0] * mask_size[1]:
        return NOT_FILLING
    return None if sum(runs[1::2]) else EMPTY_MASK


def runs_of_text(text: str) -> list[int]:
    """Decode the runs of a mask in COCO's compressed text form.

    The form, as in pycocotools' ``maskApi.c``: a character is 48 plus six bits, of which the lowest
    five are part of a number, least significant part first, and the sixth says that another
    follows; the highest bit of a number's last part is its sign; from the fourth number on, each
    is the difference to the run two before.

    Args:
        text: ``counts`` of a mask.

    Returns:
        The runs of 0 and 1 in turn, column by column. They may be negative in a faulty text.

    Raises:
        ValueError: a character, or an end, that the form does not have.
    """
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(bits):
        return []
    follows = bits & 0x20
    if bits.min() < 0 or bits.max() > 63 or follows[-1]:
        raise ValueError("not a run-length mask")
    starts = np.flatnonzero(np.append(32, ~follows[:-1] & 0x20))
    lengths = np.diff(np.append(starts, len(bits)))
    if lengths.max() > _MAX_CHARACTERS:
        raise ValueError("a run of a run-length mask is too long")
    places = np.arange(len(bits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((bits & 0x1F) << (5 * places), starts)
    negative = bits[starts + lengths - 1] & 0x10
    numbers -= np.where(negative, 1 << (5 * lengths), 0)
    numbers[1::2], numbers[2::2] = np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])
    return list(numbers.tolist())


def mask_area(segmentation: Any, size: Size) -> float:
    """Count the pixels of polygons, or of a run-length mask, by pycocotools' rule."""
    code = segmentation
    if isinstance(segmentation, list):
        code = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, *map(int, size)))
    elif isinstance(segmentation["counts"], list):
        code = pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
    return float(pycocotools.mask.area(code))


def encode_part(
    part: np.ndarray, left: int, top: int, size: tuple[int, int]
) -> tuple[tuple[float, float, float, float], dict[str, Any]]:
    """Place the mask of a part into its picture.

    Args:
        part: (h, w) bool.
        left: column of the part's first pixel in the picture.
        top: row of it.
        size: height and width of the picture.

    Returns:
        The box around the mask's pixels, and COCO's run-length mask of the picture.

    Raises:
        ValueError: no pixel lies in the picture.
    """
    whole = np.zeros(size, np.uint8, order="F")
    rows, columns = np.nonzero(part)
    rows, columns = rows + top, columns + left
    inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    if not inside.any():
        raise ValueError("a mask without a pixel in its picture")
    rows, columns = rows[inside], columns[inside]
    whole[rows, columns] = 1
    code = pycocotools.mask.encode(whole)
    box = (
        *(float(columns.min()), float(rows.min())),
        *(float(columns.max() + 1), float(rows.max() + 1)),
    )
    return box, {"size": list(size), "counts": code["counts"].decode()}
