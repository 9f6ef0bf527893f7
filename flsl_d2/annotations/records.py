"""Records of a data set in COCO format, for Detectron2's training and for COCO's evaluation.

Detectron2's own loader leaves out, without saying which, every annotation whose polygons have less
than three points, among them the boxes of exports that write ``[[]]`` or two corners; it takes
file names as they are written; and neither it nor pycocotools reads a byte order mark. What this
loader leaves out is what :mod:`flsl_d2.annotations.checks` reports.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from flsl_d2.annotations.checks import check_coco_files
from flsl_d2.annotations.coco_file import (
    Coco,
    Heartbeat,
    read_coco,
    release_coco,
    without_garbage_collection,
)
from flsl_d2.annotations.entries import check_files, check_images
from flsl_d2.annotations.findings import Findings, Use
from flsl_d2.annotations.matching import find_files
from flsl_d2.annotations.shapes import (
    box_polygon,
    box_problem,
    compressed,
    is_side,
    mask_area,
    usable_segmentation,
)
from flsl_d2.errors import InputError

logger = logging.getLogger(__name__)


def read_picture_files(json_file: str, image_root: str) -> list[str]:
    """Paths of a data set's pictures, in the order of their ids; annotations are not looked at."""
    findings = Findings()
    entries = read_coco(json_file, ("images",))["images"]
    _, named = check_images(entries, Use.PICTURES, findings)
    files = check_files(named, image_root, findings)
    for line in findings.report(json_file):
        logger.warning("%s: %s.", json_file, line)
    if all(isinstance(entry.get("id"), int) for entry in named):
        named = sorted(named, key=lambda entry: entry["id"])  # as Detectron2's loader has them
    return [os.path.join(image_root, files[entry["file_name"]]) for entry in named]


def load_coco(json_file: str, image_root: str, name: str = "") -> list[dict[str, Any]]:
    """Read a data set into Detectron2's standard dicts.

    They are those of Detectron2's ``load_coco_json``, with the ``id`` of each annotation for
    messages, and without a ``segmentation`` that is no mask. Annotations whose box has no area or
    lies outside its image are left out. The metadata of ``name`` get the classes.

    Raises:
        InputError: the file cannot be read, or is faulty.
    """
    coco = read_coco(json_file, ("images", "categories"))
    try:
        with without_garbage_collection():
            records = _records(coco, image_root, name)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        check_coco_files(json_file, image_root, Use.BOXES)  # says what is wrong, in full
        raise InputError(
            f"{json_file} cannot be loaded ({type(error).__name__}: {error}); correct the file."
        ) from error
    if name:  # a run that trains on it needs the content no more
        release_coco(json_file)
    return records


def _records(coco: Coco, image_root: str, name: str) -> list[dict[str, Any]]:
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    if name:
        MetadataCatalog.get(name).set(
            thing_classes=[str(category["name"]) for category in categories],
            thing_dataset_id_to_contiguous_id={_whole(key): n for key, n in numbers.items()},
        )
    images = sorted(coco["images"], key=lambda image: image["id"])
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    annotations = coco.get("annotations", [])
    plain = coco.plain if coco.plain is not None else bytes(len(annotations))
    counted = map(Heartbeat("Loading annotations"), annotations)
    for annotation, is_plain in zip(counted, plain, strict=True):
        image_id = annotation["image_id"]
        if not is_plain and (image_id not in by_image or not _is_used(annotation, sizes[image_id])):
            continue
        record = {
            "id": annotation.get("id"),
            "iscrowd": 0,
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": numbers[annotation["category_id"]],
        }
        if is_plain:
            record["segmentation"] = annotation["segmentation"]
        else:
            _add_odd_parts(record, annotation, sizes[image_id])
        by_image[image_id].append(record)
    files, _ = find_files([image["file_name"] for image in images], image_root)
    return [
        {
            "file_name": os.path.join(image_root, _file_of(image["file_name"], files)),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": _whole(image["id"]),
            "annotations": by_image[image["id"]],
        }
        for image in images
    ]


def _file_of(name: str, files: dict[str, str]) -> str:
    # A picture that is missing matters only where it is read, as with Detectron2's loader.
    if name not in files and (name.startswith("/") or ".." in name.split("/")):
        raise ValueError(f"the file name {name} leaves the image folder")
    return files.get(name, name)


def _is_used(annotation: dict[str, Any], size: tuple[int, int]) -> bool:
    problem = box_problem(annotation["bbox"], size)
    if problem is not None and problem.fatal:
        raise ValueError(problem.kind)
    return problem is None


def _add_odd_parts(
    record: dict[str, Any], annotation: dict[str, Any], size: tuple[int, int]
) -> None:
    iscrowd = annotation.get("iscrowd") or 0
    if iscrowd not in (0, 1) or annotation.get("ignore"):
        raise ValueError("iscrowd or ignore")
    record["iscrowd"] = int(iscrowd)
    segmentation = usable_segmentation(annotation.get("segmentation"), size)
    if segmentation is not None:
        polygons = isinstance(segmentation, list) or isinstance(segmentation["counts"], str)
        record["segmentation"] = segmentation if polygons else compressed(segmentation, size)
    if annotation.get("keypoints"):
        # COCO counts pixels, and Detectron2 measures from the corner of the image.
        record["keypoints"] = [
            value if i % 3 == 2 else value + 0.5 for i, value in enumerate(annotation["keypoints"])
        ]


def read_coco_api(json_file: str) -> COCO:
    """Read the annotations that :func:`load_coco` uses, for COCO's evaluation.

    One without a mask, of which a file with masks may have a few, gets that of its box. A missing
    ``area`` is computed, from the mask or else the box, and a missing ``iscrowd`` is 0.
    """
    read = read_coco(json_file, ("images", "categories"))
    api = COCO()
    images, categories = (
        [{**each, "id": _whole(each["id"])} for each in read[key]]
        for key in ("images", "categories")
    )
    for image in images:
        if is_side(image["height"]) and is_side(image["width"]):
            image["height"], image["width"] = int(image["height"]), int(image["width"])
    api.dataset = {"images": images, "categories": categories}
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    if "annotations" in read:
        api.dataset["annotations"] = [
            _evaluated(annotation, sizes[annotation["image_id"]])
            for annotation in read["annotations"]
            if _is_used(annotation, sizes[annotation["image_id"]])
        ]
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
    ids = ("id", "image_id", "category_id")
    return {
        **annotation,
        **{key: _whole(annotation[key]) for key in ids if key in annotation},
        "segmentation": segmentation,
        "area": area,
        "iscrowd": annotation.get("iscrowd") or 0,
    }


def _whole(an_id: Any) -> Any:
    """Return an id such as 1.0 as a whole number, which compiled evaluators need."""
    return int(an_id) if isinstance(an_id, float) and an_id.is_integer() else an_id
