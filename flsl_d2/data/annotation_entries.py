"""What each entry of a COCO annotation file has to be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

Sizes = dict[Any, tuple[float, float]]  # image id -> height, width

_IMAGE_FIELDS = ("id", "file_name", "height", "width")
# COCO's evaluation reads `area` and `iscrowd` of every annotation.
_ANNOTATION_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _lacking(entry: dict[str, Any], fields: Iterable[str]) -> list[str]:
    return [field for field in fields if entry.get(field) is None]


def check_images(images: list[Any], findings: Findings) -> tuple[Sizes, list[str]]:
    """Check the entries of `images`.

    Returns:
        The size (height, width) of every image id, also of images with another fault, and the file
        names that can be looked for.
    """
    sizes: Sizes = {}
    file_names: list[str] = []
    if not images:
        findings.fault("empty list", "images")
    for index, image in enumerate(images):
        if not isinstance(image, dict):
            findings.fault("images that are no JSON object", f"images[{index}]")
            continue
        lacking = _lacking(image, _IMAGE_FIELDS)
        image_id = image.get("id")
        if lacking:
            findings.fault(f"images without {', '.join(lacking)}", f"images[{index}]")
        if image_id is None:
            continue
        if not _is_id(image_id):
            findings.fault("images whose id is no number", f"images[{index}]")
            continue
        if image_id in sizes:
            findings.fault("images with an id that another has", image_id)
        height, width = image.get("height"), image.get("width")
        measured = _is_number(height) and _is_number(width) and height > 0 and width > 0
        if not measured and "height" not in lacking and "width" not in lacking:
            findings.fault("images whose height or width is no positive number", image_id)
        sizes[image_id] = (height, width) if measured else (math.inf, math.inf)
        file_name = image.get("file_name")
        if file_name is not None and (not isinstance(file_name, str) or not file_name):
            findings.fault("images whose file_name is no text", image_id)
        elif file_name is not None and os.path.isabs(file_name):
            findings.fault("file_name that is absolute, make it relative to the folder", file_name)
        elif file_name is not None and os.path.normpath(file_name).startswith(".."):
            findings.fault("file_name that leaves the image folder", file_name)
        elif file_name is not None:
            file_names.append(file_name)
    return sizes, file_names


def _check_categories(categories: list[Any], findings: Findings) -> set[Any]:
    ids: set[Any] = set()
    if not categories:
        findings.fault("empty list", "categories")
    for index, category in enumerate(categories):
        if not isinstance(category, dict) or _lacking(category, ("id", "name")):
            findings.fault("categories without id or name", f"categories[{index}]")
        elif not _is_id(category["id"]):
            findings.fault("categories whose id is no number", f"categories[{index}]")
        elif category["id"] in ids:
            findings.fault("categories with an id that another has", category["id"])
        else:
            ids.add(category["id"])
    return ids


def _check_box(box: Any, size: tuple[float, float], name: object, findings: Findings) -> None:
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


def _check_polygons(polygons: list[Any], name: object, findings: Findings) -> None:
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


def _check_mask(mask: dict[str, Any], size: tuple[float, float], name: object, findings: Findings):
    """A run-length encoded mask: `size` is height and width, `counts` the runs."""
    counts, mask_size = mask.get("counts"), mask.get("size")
    if not isinstance(counts, (list, str)) or not isinstance(mask_size, list):
        findings.fault("annotations whose run-length mask lacks size or counts", name)
    elif math.isfinite(size[0]) and tuple(mask_size) != tuple(size):
        findings.fault("annotations whose run-length mask has another size than its image", name)
    elif isinstance(counts, list):
        try:
            fits = sum(counts) == mask_size[0] * mask_size[1]
        except TypeError:
            fits = False
        if not fits:
            findings.fault("annotations whose run-length mask does not fill its image", name)


def check_annotations(
    annotations: list[Any], categories: list[Any], sizes: Sizes, findings: Findings
) -> None:
    """Check the entries of `annotations` and `categories` against each other and the images."""
    category_ids = _check_categories(categories, findings)
    seen: set[Any] = set()
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            findings.fault("annotations that are no JSON object", f"annotations[{index}]")
            continue
        get = annotation.get
        name = get("id")
        image_id, category_id, box = get("image_id"), get("category_id"), get("bbox")
        required = (name, image_id, category_id, box, get("area"), get("iscrowd"))
        if None in required:
            lacking = ", ".join(_lacking(annotation, _ANNOTATION_FIELDS))
            findings.fault(f"annotations without {lacking}", f"annotations[{index}]")
        if name is None:
            name = f"annotations[{index}]"
        elif not _is_id(name):
            findings.fault("annotations whose id is no number", f"annotations[{index}]")
            name = f"annotations[{index}]"
        elif name in seen:
            findings.fault("annotations with an id that another has", name)
        seen.add(name)

        size = sizes.get(image_id) if isinstance(image_id, (int, str)) else None
        if size is None:
            size = (math.inf, math.inf)
            if image_id is not None:
                findings.fault("annotations of an image_id that is not in images", f"id {name}")
        known = isinstance(category_id, (int, str)) and category_id in category_ids
        if not known and category_id is not None:
            findings.fault(
                "annotations of a category_id that is not in categories",
                f"id {name} with category {category_id}",
            )
        if get("ignore"):
            findings.fault("annotations with `ignore`, which Detectron2 refuses, drop them", name)
        if box is not None:
            _check_box(box, size, name, findings)
        segmentation = get("segmentation")
        if isinstance(segmentation, list):
            _check_polygons(segmentation, name, findings)
        elif isinstance(segmentation, dict):
            _check_mask(segmentation, size, name, findings)
            if not get("iscrowd"):
                findings.remark(
                    "annotations with a run-length mask: set INPUT.MASK_FORMAT (the mapper's "
                    "instance_mask_format) to bitmask",
                    name,
                )
        elif segmentation is not None:
            findings.fault("annotations whose segmentation is neither list nor mask", name)
