"""Records of a data set in COCO format, for Detectron2's training and for COCO's evaluation.

Detectron2's own loader leaves out, without saying which, every annotation whose polygons have less
than three points, among them the boxes of exports that write ``[[]]`` or two corners; it takes
file names as they are written; and neither it nor pycocotools reads a byte order mark. What this
loader leaves out is what :mod:`flsl_d2.annotations.checks` reports.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import pycocotools.mask
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from flsl_d2.annotations.checks import check_coco_files, report_findings
from flsl_d2.annotations.coco_file import (
    Coco,
    read_coco,
    release_coco,
    without_garbage_collection,
)
from flsl_d2.annotations.entries import check_files, check_images
from flsl_d2.annotations.findings import Findings, Use
from flsl_d2.annotations.image_folder import ImageFolder, stays_inside
from flsl_d2.annotations.shapes import (
    box_polygon,
    box_problem,
    is_side,
    mask_area,
    usable_segmentation,
)
from flsl_d2.errors import InputError


def read_picture_files(json_file: str, image_root: str) -> list[str]:
    """Paths of a data set's pictures, in the order of their ids; annotations are not looked at.

    Raises:
        InputError: the file is no list of images, or pictures are missing.
    """
    findings = Findings(max_report=10)
    entries = read_coco(json_file, ("images",))["images"]
    _, named = check_images(entries, Use.PICTURES, findings)
    files = check_files(named, image_root, findings)
    report_findings(json_file, findings)
    if all(isinstance(entry.get("id"), int) for entry in named):
        named = sorted(named, key=lambda entry: entry["id"])  # as Detectron2's loader has them
    return [os.path.join(image_root, files[entry["file_name"]]) for entry in named]


def load_coco(json_file: str, image_root: str, name: str = "") -> list[dict[str, Any]]:
    """Read a data set into Detectron2's standard dicts.

    They are those of Detectron2's ``load_coco_json``, with the ``id`` of each annotation for
    messages, and without a ``segmentation`` that is no mask. Annotations whose box has no area or
    lies outside its image are left out.

    Args:
        json_file: path of the annotations.
        image_root: the folder that the images' ``file_name`` starts from.
        name: registered name, whose metadata get the names and numbers of the classes.

    Raises:
        InputError: the file cannot be read, or is faulty.
    """
    coco = read_coco(json_file, ("images", "categories"))
    try:
        with without_garbage_collection():
            records = _records(coco, image_root, name)
        if name:  # a run that trains on it needs the content no more
            release_coco(json_file)
        return records
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        check_coco_files(json_file, image_root, Use.BOXES)  # says what is wrong, in full
        raise InputError(
            f"{json_file} cannot be loaded ({type(error).__name__}: {error}); correct the file."
        ) from error


def _records(coco: Coco, image_root: str, name: str) -> list[dict[str, Any]]:
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    if name:
        MetadataCatalog.get(name).set(
            thing_classes=[str(category["name"]) for category in categories],
            thing_dataset_id_to_contiguous_id={whole(key): n for key, n in numbers.items()},
        )
    images = sorted(coco["images"], key=lambda image: image["id"])
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    annotations = coco.get("annotations", [])
    plain = coco.plain if coco.plain is not None else bytes(len(annotations))
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for annotation, is_plain in zip(annotations, plain, strict=True):
        image_id = annotation["image_id"]
        if is_plain:
            record = {
                "id": annotation["id"],
                "iscrowd": 0,
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": numbers[annotation["category_id"]],
                "segmentation": annotation["segmentation"],
            }
            by_image[image_id].append(record)
        elif image_id in by_image and _is_used(annotation, sizes[image_id]):
            height, width = sizes[image_id]
            by_image[image_id].append(_record(annotation, numbers, (int(height), int(width))))
    return [
        {
            "file_name": path,
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": whole(image["id"]),
            "annotations": by_image[image["id"]],
        }
        for image, path in zip(images, _paths(images, image_root), strict=True)
    ]


def _paths(images: list[Any], image_root: str) -> list[str]:
    found = ImageFolder(image_root).find([image["file_name"] for image in images], 0)
    paths = []
    for image, result in zip(images, found, strict=True):
        # A picture that is missing matters only where it is read, as with Detectron2's loader.
        name = result.file_name or image["file_name"]
        if not result.file_name and not stays_inside(name):
            raise ValueError(f"the file name {name} leaves the image folder")
        paths.append(os.path.join(image_root, name))
    return paths


def _is_used(annotation: dict[str, Any], size: tuple[int, int]) -> bool:
    problem = box_problem(annotation["bbox"], size)
    if problem is not None and problem.fatal:
        raise ValueError(problem.kind)
    return problem is None


def _record(
    annotation: dict[str, Any], numbers: dict[Any, int], size: tuple[int, int]
) -> dict[str, Any]:
    iscrowd = annotation.get("iscrowd") or 0
    if iscrowd not in (0, 1) or annotation.get("ignore"):
        raise ValueError("iscrowd or ignore")
    record = {
        "id": annotation.get("id"),
        "iscrowd": int(iscrowd),
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": numbers[annotation["category_id"]],
    }
    segmentation = usable_segmentation(annotation.get("segmentation"), size)
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        segmentation = pycocotools.mask.frPyObjects(segmentation, *segmentation["size"])
    if segmentation is not None:
        record["segmentation"] = segmentation
    if annotation.get("keypoints"):
        # COCO counts pixels, and Detectron2 measures from the corner of the image.
        record["keypoints"] = [
            value if i % 3 == 2 else value + 0.5 for i, value in enumerate(annotation["keypoints"])
        ]
    return record


def read_coco_api(json_file: str) -> COCO:
    """Read a file for COCO's evaluation.

    Annotations are those that :func:`load_coco` uses. One without a mask, of which a file with
    masks may have a few, gets that of its box. A missing ``area`` is computed, from the mask or
    else the box, and a missing ``iscrowd`` is 0.

    Raises:
        InputError: the file cannot be read.
    """
    read = read_coco(json_file, ("images", "categories"))
    sizes = {}
    dataset: dict[str, Any] = {
        "images": [{**image, "id": whole(image["id"])} for image in read["images"]],
        "categories": [{**each, "id": whole(each["id"])} for each in read["categories"]],
    }
    for image in dataset["images"]:
        if is_side(image["height"]) and is_side(image["width"]):
            image["height"], image["width"] = int(image["height"]), int(image["width"])
        sizes[image["id"]] = image["height"], image["width"]
    if "annotations" in read:
        dataset["annotations"] = [
            _evaluated(annotation, sizes[annotation["image_id"]])
            for annotation in read["annotations"]
            if _is_used(annotation, sizes[annotation["image_id"]])
        ]
    api = COCO()
    api.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        api.createIndex()
    return api


def _evaluated(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Complete an annotation for COCO's evaluation, which reads all of these keys."""
    segmentation = usable_segmentation(annotation.get("segmentation"), size)
    x, y, width, height = annotation["bbox"]
    area = annotation.get("area")
    if area is None:
        area = width * height if segmentation is None else mask_area(segmentation, size)
    if segmentation is None:
        segmentation = [box_polygon(x, y, x + width, y + height)]
    iscrowd = annotation.get("iscrowd") or 0
    ids: dict[str, Any] = {
        key: whole(annotation[key])
        for key in ("id", "image_id", "category_id")
        if key in annotation
    }
    return {**annotation, **ids, "segmentation": segmentation, "area": area, "iscrowd": iscrowd}


def whole(an_id: Any) -> Any:
    """Return an id such as 1.0 as a whole number, which compiled evaluators need."""
    return int(an_id) if isinstance(an_id, float) and an_id.is_integer() else an_id
