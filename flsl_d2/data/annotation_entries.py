"""What each entry of a COCO annotation file has to be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from flsl_d2.data.annotation_shapes import (
    Findings,
    check_box,
    check_mask,
    check_polygons,
    is_number,
    is_side,
)

Sizes = dict[Any, tuple[float, float]]  # image id -> height, width

_IMAGE_FIELDS = ("id", "file_name", "height", "width")
# COCO's evaluation reads `area` and `iscrowd` of every annotation.
_ANNOTATION_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _check_id_types(ids: Iterable[Any], of: str, findings: Findings) -> None:
    """Detectron2 sorts the ids, which numbers and texts together do not allow."""
    kinds = {isinstance(an_id, str): an_id for an_id in ids}
    if len(kinds) > 1:
        findings.fault(f"{of} with ids of which some are numbers and some texts", kinds[True])


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
        measured = is_side(height) and is_side(width)
        if not measured and "height" not in lacking and "width" not in lacking:
            findings.fault("images whose height or width is no positive whole number", image_id)
        sizes[image_id] = (height, width) if measured else (math.inf, math.inf)
        file_name = image.get("file_name")
        if file_name is not None and _check_file_name(file_name, image_id, findings):
            file_names.append(file_name)
    _check_id_types(sizes, "images", findings)
    return sizes, file_names


def _is_system_name(file_name: str) -> bool:
    try:
        return b"\0" not in os.fsencode(file_name)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return False


def _check_file_name(file_name: Any, image_id: object, findings: Findings) -> bool:
    """Whether a name may be looked for; it comes from a stranger and must stay in the folder."""
    if not isinstance(file_name, str) or not file_name:
        findings.fault("images whose file_name is no text", image_id)
    elif not _is_system_name(file_name):
        findings.fault("file_name that no file can have", ascii(file_name))
    elif os.path.isabs(file_name):
        findings.fault("file_name that is absolute, make it relative to the folder", file_name)
    elif ".." in file_name.replace("\\", "/").split("/"):
        # Also where the text stays inside: after a link, .. is the parent of the link's target.
        findings.fault("file_name with .., which leaves the image folder", file_name)
    else:
        return True
    return False


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
    _check_id_types(ids, "categories", findings)
    return ids


def _check_values(area: Any, iscrowd: Any, ignore: Any, name: object, findings: Findings) -> None:
    """What COCO's evaluation computes with."""
    if area is not None and not (is_number(area) and 0 <= area < math.inf):
        findings.fault("annotations whose area is no number from 0 up", name)
    if iscrowd is not None and iscrowd not in (0, 1):
        findings.fault("annotations whose iscrowd is neither 0 nor 1", name)
    if ignore:
        findings.fault("annotations with `ignore`, which Detectron2 refuses, drop them", name)


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
        area, iscrowd = get("area"), get("iscrowd")
        required = (name, image_id, category_id, box, area, iscrowd)
        if None in required:
            lacking = ", ".join(_lacking(annotation, _ANNOTATION_FIELDS))
            findings.fault(f"annotations without {lacking}", f"annotations[{index}]")
        if name is None:
            name = f"annotations[{index}]"
        elif type(name) is not int:
            findings.fault("annotations whose id is no whole number", f"annotations[{index}]")
            name = f"annotations[{index}]"
        elif name in seen:
            findings.fault("annotations with an id that another has", name)
        elif name == 0:
            findings.remark(
                "annotations with id 0, which COCO's evaluation counts as not found: start at 1",
                f"annotations[{index}]",
            )
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
        _check_values(area, iscrowd, get("ignore"), name, findings)
        if box is not None:
            check_box(box, size, name, findings)
        segmentation = get("segmentation")
        if isinstance(segmentation, list):
            check_polygons(segmentation, name, findings)
        elif isinstance(segmentation, dict):
            check_mask(segmentation, size, name, findings)
            if not get("iscrowd"):
                findings.remark(
                    "annotations with a run-length mask: set INPUT.MASK_FORMAT (the mapper's "
                    "instance_mask_format) to bitmask",
                    name,
                )
        elif segmentation is not None:
            findings.fault("annotations whose segmentation is neither list nor mask", name)
