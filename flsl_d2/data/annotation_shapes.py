"""What boxes, polygons and masks of a COCO annotation file have to be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Of 5 bits each: runs of up to 2^34 pixels, whose sums still fit 64 bits.
_MAX_CHARACTERS = 7


def runs_of_text(text: str) -> list[int]:
    """Runs of a mask in COCO's compressed text form.

    The form, as in pycocotools' `maskApi.c`: a character is 48 plus six bits, of which the lowest
    five are part of a number, least significant part first, and the sixth says that another
    follows; the highest bit of a number's last part is its sign; from the fourth number on, each
    is the difference to the run two before.

    Args:
        text: `counts` of a mask.

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
    return numbers.tolist()


class Findings:
    """Kinds of findings, each with its count and its first examples.

    A kind is a text; the count comes before it, or where it says `{count}`.

    Args:
        max_report: how many examples of a kind are kept.
    """

    def __init__(self, max_report: int) -> None:
        self._max_report = max(max_report, 1)
        self._counts: dict[str, dict[str, int]] = {"fault": {}, "degenerate": {}, "remark": {}}
        self._examples: dict[str, list[str]] = {}
        self._degenerate_ids: set[Any] = set()

    def _note(self, level: str, kind: str, example: object) -> None:
        counts = self._counts[level]
        counts[kind] = counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < self._max_report:
            examples.append(str(example)[:120])

    def fault(self, kind: str, example: object) -> None:
        """Something that makes the file unusable."""
        self._note("fault", kind, example)

    def annotation_degenerate(self, kind: str, annotation_id: object) -> None:
        """An annotation that cannot be learned from, while the others can."""
        self._note("degenerate", kind, annotation_id)
        self._degenerate_ids.add(str(annotation_id))

    def remark(self, kind: str, example: object) -> None:
        """Something that is right and still good to know."""
        self._note("remark", kind, example)

    def _lines(self, level: str) -> list[str]:
        lines = []
        for kind, count in self._counts[level].items():
            examples = self._examples[kind]
            more = f" and {count - len(examples)} more" if count > len(examples) else ""
            what = kind if "{count}" in kind else "{count} x " + kind
            lines.append(f"{what.replace('{count}', str(count))}: {', '.join(examples)}{more}")
        return lines

    def faults(self) -> list[str]:
        """One line a kind of fault."""
        return self._lines("fault")

    def degenerate(self) -> list[str]:
        """One line a kind of degenerate annotation."""
        return self._lines("degenerate")

    def remarks(self) -> list[str]:
        """One line a kind of remark."""
        return self._lines("remark")

    @property
    def degenerate_count(self) -> int:
        """How many annotations are degenerate in any way."""
        return len(self._degenerate_ids)


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
