"""ImageNet's localisation boxes: the official XML files as a Detectron2 data set.

Layout below the folder of ImageNet, as the official archives unpack::

    train/<wnid>/<image>.JPEG             val/<wnid>/<image>.JPEG or val/<image>.JPEG
    annotations/train/<wnid>/<image>.xml  annotations/val/<image>.xml or .../<wnid>/<image>.xml
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from flsl_d2.errors import InputError


def register_imagenet_boxes(
    root: str | os.PathLike[str], name: str = "imagenet_boxes", replace: bool = False
) -> None:
    """Register ``{name}_train`` and ``{name}_val`` below a folder of ImageNet.

    Nothing is read: the files need not exist before the data set is used.

    Args:
        root: the folder with ``train``, ``val`` and ``annotations``.
        name: beginning of the registered names.
        replace: whether data sets that have the names already are replaced; otherwise they stay.
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

    Args:
        image_root: ``<wnid>/<image>.JPEG``, or ``<image>.JPEG`` without folders.
        annotation_root: ``<wnid>/<image>.xml``, or ``<image>.xml`` without folders.

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
    entries = [
        (pictures[path.stem], *_read_xml(path))
        for path in sorted(annotation_root.rglob("*.xml"))
        if path.stem in pictures
    ]
    if not entries:
        raise InputError(
            f"none of the XML files below {annotation_root} has its picture (same name, .JPEG) "
            f"below {image_root}; name folders that belong together."
        )
    wnids = _class_names(image_root, entries)
    index = {wnid: i for i, wnid in enumerate(wnids)}
    records = []
    for image_id, (picture, size, boxes) in enumerate(entries):
        unknown = next((wnid for wnid, _ in boxes if wnid not in index), None)
        if unknown is not None:
            raise InputError(
                f"the boxes of {picture.name} name the class {unknown!r}, which is none of the "
                f"{len(index)} folders of {image_root.parent / 'train'}; correct the XML file."
            )
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": index[wnid]}
            for wnid, box in boxes
        ]
        records.append(
            {
                "file_name": str(picture),
                "image_id": image_id,
                "height": size[0],
                "width": size[1],
                "annotations": annotations,
            }
        )
    return records, wnids


_Entry = tuple[Path, tuple[int, int], list[tuple[str, list[float]]]]


def _class_names(image_root: Path, entries: list[_Entry]) -> list[str]:
    train = image_root.parent / "train"
    folders = [path.name for path in train.iterdir() if path.is_dir()] if train.is_dir() else []
    return sorted(folders or {wnid for _, _, boxes in entries for wnid, _ in boxes})


def _read_xml(path: Path) -> tuple[tuple[int, int], list[tuple[str, list[float]]]]:
    """Read height and width, and the WordNet id and corners of every box."""
    try:
        tree = ET.parse(path).getroot()
        size = int(_text(tree, "size/height")), int(_text(tree, "size/width"))
        boxes = []
        for entry in tree.iter("object"):
            corners = [_text(entry, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append((_text(entry, "name").strip(), [float(x) for x in corners]))
    except (ET.ParseError, ValueError) as error:
        raise InputError(
            f"{path} is not an ImageNet box annotation ({error}); replace it by the official XML."
        ) from error
    return size, boxes


def _text(tree: ET.Element, path: str) -> str:
    text = tree.findtext(path)
    if text is None:
        raise ValueError(f"it has no {path}")
    return text
