"""ImageNet's localisation boxes: the official XML files as a Detectron2 data set.

Layout below the folder of ImageNet, as the official archives unpack::

    train/<wnid>/<image>.JPEG             val/<wnid>/<image>.JPEG or val/<image>.JPEG
    annotations/train/<wnid>/<image>.xml  annotations/val/<image>.xml or .../<wnid>/<image>.xml
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.formats import read_voc
from flsl_d2.errors import InputError


def register_imagenet_boxes(
    root: str | os.PathLike[str], name: str = "imagenet_boxes", replace: bool = False
) -> None:
    """Register ``{name}_train`` and ``{name}_val`` below a folder of ImageNet.

    Nothing is read: the files need not exist before the data set is used. Data sets that have the
    names already stay, or are replaced.
    """
    root = Path(root).expanduser()
    for split in ("train", "val"):
        full_name = f"{name}_{split}"
        if full_name in DatasetCatalog:
            if not replace:
                continue
            DatasetCatalog.remove(full_name)
            MetadataCatalog.remove(full_name)
        images, annotations = root / split, root / "annotations" / split
        DatasetCatalog.register(full_name, partial(_load_named, full_name, images, annotations))
        MetadataCatalog.get(full_name).set(
            image_root=str(images), annotation_root=str(annotations), evaluator_type="imagenet"
        )


def _load_named(name: str, images: Path, annotations: Path) -> list[dict[str, Any]]:
    records, wnids = load_imagenet_boxes(images, annotations)
    MetadataCatalog.get(name).set(thing_classes=wnids)
    return records


def load_imagenet_boxes(
    image_root: str | os.PathLike[str], annotation_root: str | os.PathLike[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Load the images that have both a picture and an XML file with a box.

    Returns:
        Detectron2's standard dicts, sorted by file, and the names of the classes: the WordNet ids
        that are folders of ``train`` beside ``image_root``, so that splits agree; without them,
        those that occur in the boxes.

    Raises:
        InputError: a folder is missing, a file is not such an XML, a box names an unknown class,
            or no file fits a picture.
    """
    image_root, annotation_root = Path(image_root), Path(annotation_root)
    for folder, what in ((image_root, "images"), (annotation_root, "box annotations")):
        if not folder.is_dir():
            raise InputError(
                f"the folder {folder} of ImageNet's {what} does not exist; unpack the official "
                "archive there, or set DETECTRON2_DATASETS."
            )
    pictures = {path.stem: path for path in sorted(image_root.rglob("*.JPEG"))}
    files = [file for file in sorted(annotation_root.rglob("*.xml")) if file.stem in pictures]
    if not files:
        raise InputError(
            f"none of the XML files below {annotation_root} has its picture (same name, .JPEG) "
            f"below {image_root}; name folders that belong together."
        )
    findings = Findings()
    entries = read_voc(annotation_root, files, findings)
    lines = findings.report(f"{annotation_root} (ImageNet's boxes)")
    if len(entries) < len(files):
        raise InputError(f"{annotation_root} holds no ImageNet box annotations: {lines[0]}.")
    train = image_root.parent / "train"
    folders = [path.name for path in train.iterdir() if path.is_dir()] if train.is_dir() else []
    wnids = sorted(folders or {each.label for entry in entries for each in entry.objects})
    index = {wnid: i for i, wnid in enumerate(wnids)}
    records = []
    for image_id, (file, entry) in enumerate(zip(files, entries, strict=True)):
        unknown = [each.label for each in entry.objects if each.label not in index]
        if unknown or entry.size is None:
            reason = f"names the class {unknown[0]!r}" if unknown else "states no size"
            raise InputError(
                f"{file} {reason}; expected ImageNet's official XML, with a size and classes that "
                f"are among the {len(index)} folders of {train}."
            )
        record: dict[str, Any] = {"file_name": str(pictures[file.stem]), "image_id": image_id}
        record["height"], record["width"] = entry.size
        record["annotations"] = [
            {"bbox": [*o.box], "bbox_mode": BoxMode.XYXY_ABS, "category_id": index[o.label]}
            for o in entry.objects
        ]
        records.append(record)
    return records, wnids
