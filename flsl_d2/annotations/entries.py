"""Checks of each entry of a COCO annotation file, for the uses that are made of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from flsl_d2.annotations.coco_file import Heartbeat
from flsl_d2.annotations.findings import Findings, Use, name_of
from flsl_d2.annotations.matching import find_files, listed
from flsl_d2.annotations.shapes import (
    NO_MASK,
    NOT_A_BOX,
    OUTSIDE,
    Size,
    box_problem,
    is_number,
    is_side,
    segmentation_problem,
)

Sizes = dict[Any, Size]  # image id -> height, width

_UNKNOWN = (math.inf, math.inf)
_NUMBERS = {int, float}

# Kinds of faults of which unknown image and category ids are mere consequences.
_BAD_IMAGES = ("images without id", "images whose id", "images that are no")
_BAD_CATEGORIES = ("categories without", "categories whose")


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return is_number(value) and math.isfinite(value) and value == int(value)


def _encodes(text: str, errors: str = "strict") -> bool:
    """Whether a text can be written; JSON can hold half of a surrogate pair, and UTF-8 cannot."""
    try:
        return b"\0" not in text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False


def _check_id_types(ids: Iterable[Any], of: str, findings: Findings) -> None:
    # Detectron2 sorts the ids, which numbers and texts together do not allow.
    kinds = {isinstance(an_id, str): an_id for an_id in ids}
    if len(kinds) > 1:
        findings.fault(f"{of} with mixed int and str ids", kinds[True])


def _lacking(entry: dict[str, Any], fields: Iterable[str]) -> str:
    return ", ".join(field for field in fields if entry.get(field) is None)


def check_images(images: Sequence[Any], use: Use, findings: Findings) -> tuple[Sizes, list[Any]]:
    """Check the entries of ``images``.

    Returns:
        The size (height, width) of every image id, infinite where it is faulty; and the entries
        whose file can be looked for.
    """
    sizes: Sizes = {}
    with_file: list[Any] = []
    names: set[str] = set()
    if not images:
        findings.fault("empty list", "images")
    needed = ("id", "file_name", "height", "width") if use else ("file_name",)
    for index, image in enumerate(images):
        place = f"images[{index}]"
        if not isinstance(image, dict):
            findings.fault("images that are no JSON object", place)
            continue
        if lacking := _lacking(image, needed):
            findings.fault(f"images without {lacking}", place)
        name, file_name = name_of(image, index, "images"), image.get("file_name")
        if file_name is not None:
            if not isinstance(file_name, str) or not file_name:
                findings.fault("images whose file_name is no text", name)
            elif not _encodes(file_name, "surrogateescape"):
                findings.fault("file_name that no file can have", ascii(file_name))
            else:
                with_file.append(image)
                if file_name in names:
                    findings.remark("images with the file_name of another, which count twice", name)
                names.add(file_name)
        image_id = image.get("id")
        if not use or image_id is None:
            continue
        if not _is_id(image_id):
            findings.fault("images whose id is no whole number", place)
            continue
        if image_id in sizes:
            findings.fault("images with an id that another has", image_id)
        height, width = image.get("height"), image.get("width")
        measured = is_side(height) and is_side(width)
        if not measured and height is not None and width is not None:
            kind = "images whose height or width is no positive whole number"
            findings.fault(kind, f"{name} with height {height!r} and width {width!r}")
        sizes[image_id] = (height, width) if measured else _UNKNOWN  # type: ignore[assignment]
    _check_id_types(sizes, "images", findings)
    return sizes, with_file


def check_files(entries: Sequence[Any], image_root: str, findings: Findings) -> dict[str, str]:
    """Return the file below the folder of every ``file_name``; note those that have none."""
    if listed(image_root) is None:
        findings.fault(
            "the image folder does not exist or may not be listed, create it or set "
            "DETECTRON2_DATASETS",
            image_root,
        )
        return {}
    names = list(dict.fromkeys(entry["file_name"] for entry in entries))
    files, meant = find_files(names, image_root)
    for name in names:
        if name not in files:
            findings.fault(
                f"{{count}} of {len(names)} images are missing in {image_root}, put them "
                "there or set DETECTRON2_DATASETS",
                f"{name} (did you mean {meant[name]}?)" if name in meant else name,
            )
        elif files[name] != name:
            findings.remark(
                f"{{count}} of {len(names)} file names are spelled in another way than their files "
                "and are read all the same",
                f"{name} as {files[name]}",
            )
    return files


def check_categories(categories: Sequence[Any], findings: Findings) -> dict[Any, str]:
    """Check the entries of ``categories``, and return the name of every id."""
    names: dict[Any, str] = {}
    if not categories:
        findings.fault("empty list", "categories")
    for index, category in enumerate(categories):
        place = f"categories[{index}]"
        if not isinstance(category, dict) or _lacking(category, ("id", "name")):
            findings.fault("categories without id or name", place)
        elif not _encodes(str(category["name"])):
            findings.fault("categories whose name has half a character", place)
        elif not _is_id(category["id"]):
            findings.fault("categories whose id is no whole number", place)
        elif category["id"] in names:
            findings.fault("categories with an id that another has", category["id"])
        else:
            name = str(category["name"])
            if name in names.values():
                kind = "categories with a name that another has, which are learned as two classes"
                findings.remark(kind, name)
            names[category["id"]] = name
    _check_id_types(names, "categories", findings)
    return names


class AnnotationCheck:
    """Check of the entries of ``annotations`` against the images and categories.

    ``findings`` holds the faults of images and categories already; ``masks_off`` are the overrides
    that take masks out of a model. Attributes: ``annotated`` and ``learned`` count annotations by
    category id, ``boxes`` are those whose box has an area.
    """

    def __init__(
        self, sizes: Sizes, categories: dict[Any, str], use: Use, findings: Findings, masks_off: str
    ) -> None:
        self.sizes, self.categories, self.use, self.findings = sizes, categories, use, findings
        self.annotated: Counter[Any] = Counter()
        self.learned: Counter[Any] = Counter()
        self.boxes: list[dict[str, Any]] = []
        self._ids: set[Any] = set()
        self._seen: set[int] = set()
        self._images_known = bool(sizes) and not findings.has_fault(*_BAD_IMAGES)
        self._categories_known = bool(categories) and not findings.has_fault(*_BAD_CATEGORIES)
        # area and iscrowd are computed where missing
        self._needed = ["id"] * bool(use & Use.EVALUATION) + ["image_id", "category_id", "bbox"]
        self._remedy = f", while the model learns masks (for boxes alone: {masks_off})"
        self._remedy *= bool(masks_off)

    def check(self, annotations: Sequence[Any]) -> bytearray:
        """Check all annotations; return for each of them whether it :meth:`_is_plain`."""
        plain = bytearray(len(annotations))
        for index, annotation in enumerate(map(Heartbeat("Checking annotations"), annotations)):
            if not isinstance(annotation, dict):
                place = f"annotations[{index}]"
                self.findings.fault("annotations that are no JSON object", place)
            elif self._is_plain(annotation):
                plain[index] = True
            else:
                self._check_one(annotation, index)
        return plain

    def _is_plain(self, annotation: dict[str, Any]) -> bool:
        """Whether an annotation is as nearly all are, right for every use; count it if so."""
        get = annotation.get
        try:
            own_id, category_id, iscrowd = get("id"), get("category_id"), get("iscrowd", 0)
            area, box, polygons = get("area", 0), annotation["bbox"], annotation["segmentation"]
            x, y, width, height = box
            most_height, most_width = self.sizes[get("image_id")]
            plain = (
                (type(own_id) is int and own_id > 0 and type(iscrowd) is int and not iscrowd)
                and not ("keypoints" in annotation or get("ignore") or get("attributes"))
                and own_id not in self._ids
                and (type(area) in _NUMBERS and 0 <= area < math.inf)
                and (type(category_id) is int and category_id in self.categories)
                and type(box) is list
                and {type(x), type(y), type(width), type(height)} <= _NUMBERS
                and (x >= 0 and y >= 0 and width >= 1 and height >= 1)
                and (x + width <= most_width < math.inf and y + height <= most_height)
                and (type(polygons) is list and bool(polygons))
            )
            if not plain:
                return False
            for polygon in polygons:
                if type(polygon) is not list or len(polygon) < 6 or len(polygon) % 2:
                    return False
                if not math.isfinite(sum(polygon)):
                    return False
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        self._ids.add(own_id)
        self.annotated[category_id] += 1
        self.learned[category_id] += 1
        self.boxes.append(annotation)
        self._remark_duplicate(own_id, get("image_id"), category_id, box)
        return True

    def _remark_duplicate(self, own_id: object, *annotated: Any) -> None:
        *ids, box = annotated
        key = hash((*ids, *box))
        if key in self._seen:
            self.findings.remark(
                "annotations with class and box of another in their image, which count twice",
                own_id,
            )
        self._seen.add(key)

    def _check_one(self, annotation: dict[str, Any], index: int) -> None:
        findings, get = self.findings, annotation.get
        name = name_of(annotation, index, "annotations")
        if lacking := _lacking(annotation, self._needed):
            findings.fault(f"annotations without {lacking}", f"annotations[{index}]")
        if self.use & Use.EVALUATION:
            self._check_evaluated(annotation, index, name)
        size = self._check_references(annotation, name)
        iscrowd, category_id, box = get("iscrowd"), get("category_id"), get("bbox")
        if iscrowd is not None and (isinstance(iscrowd, (str, list)) or iscrowd not in (0, 1)):
            findings.fault("annotations whose iscrowd is neither 0 nor 1", name)
        if get("ignore"):
            findings.fault(
                "annotations with `ignore`, which neither training nor evaluation follow, drop it "
                "or write iscrowd 1",
                name,
            )
        attributes = get("attributes")
        if isinstance(attributes, dict) and attributes.get("rotation"):
            kind = "annotations with a rotation, which is not used; draw the box around the object"
            findings.remark(kind, name)
        problem = box_problem(box, size) if box is not None else NOT_A_BOX
        if problem is not None and box is not None:
            findings.problem(problem, name)
        if self.use & Use.MASKS:
            # Training leaves out crowds, whose masks only the evaluation looks at.
            mask_problem = segmentation_problem(get("segmentation"), size)
            needed = self.use & Use.EVALUATION or not iscrowd or mask_problem != NO_MASK
            if mask_problem is not None and needed:
                findings.problem(mask_problem, name, self._remedy * (mask_problem == NO_MASK))
        if not isinstance(category_id, (list, dict)):
            self.annotated[category_id] += 1
            self.learned[category_id] += problem is None and not iscrowd
            if problem is None and not iscrowd and _is_id(get("image_id")):
                self._remark_duplicate(name, get("image_id"), category_id, box)
        if problem in (None, OUTSIDE):
            self.boxes.append(annotation)

    def _check_references(self, annotation: dict[str, Any], name: object) -> Size:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        size = self.sizes.get(image_id) if _is_id(image_id) else None
        if size is None and image_id is not None and self._images_known:
            self.findings.fault(
                "annotations of an image_id that is not in images", f"id {name} with {image_id!r}"
            )
        known = _is_id(category_id) and category_id in self.categories
        if not known and category_id is not None and self._categories_known:
            self.findings.fault(
                "annotations of a category_id that is not in categories",
                f"id {name} with category {category_id!r}",
            )
        return size or _UNKNOWN

    def _check_evaluated(self, annotation: dict[str, Any], index: int, name: object) -> None:
        findings, area, own_id = self.findings, annotation.get("area"), annotation.get("id")
        place = f"annotations[{index}]"
        if area is not None and not (is_number(area) and 0 <= area < math.inf):
            findings.fault("annotations whose area is no number from 0 up", name)
        if own_id is not None and (isinstance(own_id, str) or not _is_id(own_id)):
            findings.fault("annotations whose id is no whole number", place)
        elif own_id is not None and own_id in self._ids:
            findings.fault("annotations with an id that another has", name)
        elif own_id is not None:
            self._ids.add(own_id)
            if own_id == 0:
                kind = "annotations with id 0, which COCO's evaluation counts as not found: start "
                findings.remark(f"{kind}at 1", place)
