"""Boxes, polygons and masks of a COCO annotation: what can be used of them, and what cannot."""

from __future__ import annotations

import math
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

NOT_A_BOX = Problem("annotations whose bbox is not four numbers x, y, width, height", fatal=True)
NO_AREA = Problem("annotations whose box has no area")
OUTSIDE = Problem("annotations whose box is outside its image")
NO_MASK = Problem("annotations without a mask", of_mask=True)
_EMPTY_MASK = Problem("annotations whose run-length mask is empty", of_mask=True)
_ODD_POLYGON = Problem("annotations with a polygon of odd length", of_mask=True)
_NOT_A_POLYGON = Problem("annotations whose polygon is not a list of numbers", fatal=True)
_NOT_A_MASK = Problem("annotations whose segmentation is neither list nor mask", fatal=True)
_RUN_LENGTH = "annotations whose run-length mask"
_NO_COUNTS = Problem(f"{_RUN_LENGTH} lacks size or counts", fatal=True)
_INVALID_SIZE = Problem(f"{_RUN_LENGTH} has an invalid size", fatal=True)
_OTHER_SIZE = Problem(f"{_RUN_LENGTH} has another size than its image", fatal=True)
_INVALID_TEXT = Problem(f"{_RUN_LENGTH} is no text that COCO writes", fatal=True)
_NOT_FILLING = Problem(f"{_RUN_LENGTH} does not fill its image", fatal=True)


def is_number(value: object) -> bool:
    """Whether this is a JSON number that a float can hold; truth values are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


def is_side(value: Any) -> bool:
    """Whether this is a height or width in whole pixels; 96.0 is one, and the text "96" is not."""
    return is_number(value) and 0 < value <= _MAX_SIDE and value == int(value)


def box_problem(box: Any, size: Size) -> Problem | None:
    """Find the reason why a box (x, y, width, height, in pixels) cannot be learned, if any."""
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)):
        return NOT_A_BOX
    x, y, width, height = box
    if not (math.isfinite(x + y + width + height) and min(width, height) >= _LEAST_SIDE):
        return NO_AREA
    inside = min(x + width, size[1]) - max(x, 0), min(y + height, size[0]) - max(y, 0)
    return OUTSIDE if min(inside) < _LEAST_SIDE else None


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """Write a box (two corners) as a polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def segmentation_problem(segmentation: Any, size: Size) -> Problem | None:
    """Find the reason why polygons or a run-length mask cannot be learned as a mask, if any."""
    if isinstance(segmentation, dict):
        return _mask_problem(segmentation, size)
    if isinstance(segmentation, (list, tuple)):
        return _polygons_problem(segmentation)
    return NO_MASK if segmentation is None else _NOT_A_MASK


def usable_segmentation(segmentation: Any, size: Size) -> Any:
    """Take the polygons of at least three points, or the run-length mask; None without either."""
    if segmentation_problem(segmentation, size) is not None:
        return None
    if isinstance(segmentation, dict):
        return segmentation
    return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]


def _polygons_problem(polygons: list[Any] | tuple[Any, ...]) -> Problem | None:
    # [], [[]] and two corners say no more than a box.
    flat = any(map(is_number, polygons))
    if not flat and not any(not isinstance(each, list) or len(each) > 4 for each in polygons):
        return NO_MASK
    usable = False
    for polygon in polygons:
        try:
            finite = isinstance(polygon, (list, tuple)) and math.isfinite(math.fsum(polygon))
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            return _NOT_A_POLYGON
        usable |= len(polygon) >= 6 and len(polygon) % 2 == 0
    return None if usable else _ODD_POLYGON


def _mask_problem(mask: dict[str, Any], size: Size) -> Problem | None:
    counts, mask_size = mask.get("counts"), mask.get("size")
    if not isinstance(counts, (list, str)) or not isinstance(mask_size, list):
        return _NO_COUNTS
    if len(mask_size) != 2 or not all(type(side) is int and side > 0 for side in mask_size):
        return _INVALID_SIZE
    if math.isfinite(size[0]) and tuple(mask_size) != tuple(size):
        return _OTHER_SIZE
    try:
        runs = runs_of_text(counts) if isinstance(counts, str) else counts
    except ValueError:
        return _INVALID_TEXT
    # pycocotools does not check runs before it writes them into memory.
    whole = all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != mask_size[0] * mask_size[1]:
        return _NOT_FILLING
    return None if sum(runs[1::2]) else _EMPTY_MASK


def runs_of_text(text: str) -> list[int]:
    """Decode ``counts`` of a mask in COCO's compressed text form (pycocotools' ``maskApi.c``).

    A character is 48 plus six bits, of which the lowest five are part of a number, least
    significant part first, and the sixth says that another follows; the highest bit of a number's
    last part is its sign; from the fourth number on, each is the difference to the run two before.

    Returns:
        The runs of 0 and 1 in turn, column by column. They may be negative in a faulty text; a
        character or an end that the form does not have is a ValueError.
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


def compressed(segmentation: Any, size: Size) -> dict[str, Any]:
    """Return polygons or a run-length mask as pycocotools' compressed mask, by its rule."""
    code = segmentation
    if isinstance(segmentation, list):
        code = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, *map(int, size)))
    elif isinstance(segmentation["counts"], list):
        code = pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
    return dict(code)


def mask_area(segmentation: Any, size: Size) -> float:
    """Count the pixels of polygons, or of a run-length mask."""
    return float(pycocotools.mask.area(compressed(segmentation, size)))


def encode_part(
    part: np.ndarray, left: int, top: int, size: tuple[int, int]
) -> tuple[tuple[float, float, float, float], dict[str, Any]]:
    """Place a part (h, w) of bool into a picture of this height and width.

    Returns:
        The box around the mask's pixels, and COCO's run-length mask of the picture. No pixel in the
        picture is a ValueError.
    """
    rows, columns = np.nonzero(part)
    rows, columns = rows + top, columns + left
    inside = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    if not inside.any():
        raise ValueError("a mask without a pixel in its picture")
    whole = np.zeros(size, np.uint8, order="F")
    whole[rows[inside], columns[inside]] = 1
    code = pycocotools.mask.encode(whole)
    x, y, width, height = pycocotools.mask.toBbox(code).tolist()
    return (x, y, x + width, y + height), {"size": [*size], "counts": code["counts"].decode()}
