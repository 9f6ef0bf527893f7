"""What boxes, polygons and masks of a COCO annotation file have to be."""

from __future__ import annotations

import math
from typing import Any

from flsl_d2.data.findings import Findings
from flsl_d2.data.run_length import runs_of_text


def is_number(value: object) -> bool:
    """Whether this is a JSON number: True and False are none, though Python counts with them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_side(value: object) -> bool:
    """Whether this is a height or width: Detectron2 compares it with that of the picture."""
    return is_number(value) and 0 < value < math.inf and value == int(value)


def check_box(box: Any, size: tuple[float, float], name: object, findings: Findings) -> None:
    """COCO's box: x, y of the upper left corner, width, height, in pixels."""
    try:
        x, y, width, height = box
        finite = math.isfinite(x + y + width + height)
    except (TypeError, ValueError, OverflowError):
        findings.fault("annotations whose bbox is not four numbers x, y, width, height", name)
        return
    if not (finite and width > 0 and height > 0):
        findings.annotation_degenerate("annotations whose box has no area", name)
    elif x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        findings.annotation_degenerate("annotations whose box is outside its image", name)


def check_polygons(polygons: list[Any], name: object, findings: Findings) -> None:
    """Note polygons that are not coordinates of at least three points."""
    if not polygons:
        findings.annotation_degenerate("annotations with an empty segmentation", name)
    for polygon in polygons:
        if not isinstance(polygon, (list, tuple)):
            findings.fault("annotations whose polygon is not a list of numbers", name)
            return
        if len(polygon) < 6:
            findings.annotation_degenerate("annotations with a polygon of under 3 points", name)
            return
        if len(polygon) % 2:
            findings.annotation_degenerate("annotations with a polygon of odd length", name)
            return
        try:
            finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            findings.fault("annotations whose polygon is not a list of numbers", name)
            return


def check_mask(
    mask: dict[str, Any], size: tuple[float, float], name: object, findings: Findings
) -> None:
    """A run-length encoded mask: `size` is height and width, `counts` the runs."""
    counts, mask_size = mask.get("counts"), mask.get("size")
    if not isinstance(counts, (list, str)) or not isinstance(mask_size, list):
        findings.fault("annotations whose run-length mask lacks size or counts", name)
        return
    if len(mask_size) != 2 or not all(type(side) is int and side > 0 for side in mask_size):
        findings.fault("annotations whose run-length mask has a size that is none", name)
        return
    if math.isfinite(size[0]) and tuple(mask_size) != tuple(size):
        findings.fault("annotations whose run-length mask has another size than its image", name)
        return
    try:
        runs = runs_of_text(counts) if isinstance(counts, str) else counts
    except ValueError:
        findings.fault("annotations whose run-length mask is no text that COCO writes", name)
        return
    # pycocotools does not look before it writes the runs into memory.
    whole = all(type(run) is int and run >= 0 for run in runs)
    if not whole or sum(runs) != mask_size[0] * mask_size[1]:
        findings.fault("annotations whose run-length mask does not fill its image", name)
