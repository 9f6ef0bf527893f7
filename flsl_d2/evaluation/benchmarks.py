"""Benchmarks of dense features in their own layouts, below the folder of all data sets.

Label images are used as published; `label_values` of the metadata gives each value a class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, CITYSCAPES_CATEGORIES
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from flsl_d2.annotations.datasets import datasets_root
from flsl_d2.errors import InputError

Record = dict[str, Any]
IGNORED = -1
_VOID = 256 * [IGNORED]
_CITYSCAPES_IDS = {c["id"]: i for i, c in enumerate(CITYSCAPES_CATEGORIES)}
_COCO_THINGS = (
    *("accessory", "animal", "appliance", "electronic", "food", "furniture", "indoor", "kitchen"),
    *("outdoor", "person", "sports", "vehicle"),
)
_COCO_STUFF = (
    *("building", "ceiling", "floor", "food-stuff", "furniture-stuff", "ground", "plant"),
    *("raw-material", "sky", "solid", "structural", "textile", "wall", "water", "window"),
)


def register_benchmarks() -> None:
    """Register the benchmarks; names already taken stay as they are, and no file is read."""
    root = Path(datasets_root())
    voc = ("background", *CLASS_NAMES)
    for split in ("train", "trainaug", "val"):
        loader = partial(load_voc, root / "VOC2012", split)
        _register(f"voc_2012_sem_seg_{split}", loader, voc, list(range(21)))
    cityscapes = tuple(c["name"] for c in CITYSCAPES_CATEGORIES)
    ids = [_CITYSCAPES_IDS.get(value, IGNORED) for value in range(34)]
    endings = "_leftImg8bit.png", "_gtFine_labelIds.png"
    for split, part in (("train", "training"), ("val", "validation")):
        ade, city = root / "ADEChallengeData2016", root / "cityscapes"
        loader = partial(load_pairs, ade / "images" / part, ade / "annotations" / part)
        values = [IGNORED, *range(150)]
        _register(f"ade20k_150_{split}", loader, tuple(ADE20K_SEM_SEG_CATEGORIES), values)
        folders = city / "leftImg8bit" / split, city / "gtFine" / split
        _register(f"cityscapes_19_{split}", partial(load_pairs, *folders, endings), cityscapes, ids)
        for name, classes in (("things12", _COCO_THINGS), ("stuff15", _COCO_STUFF)):
            loader = partial(load_coco_parts, root / "coco", split, f"coco_{name}_{split}", classes)
            _register(f"coco_{name}_{split}", loader, classes)
    for split in ("trn", "val", "test"):
        _register(f"spair_71k_{split}", partial(load_spair, root / "SPair-71k", split))
    _register("coco_20k", partial(load_coco_20k, root / "coco"))


def _register(
    name: str,
    loader: Callable[[], list[Record]],
    classes: tuple[str, ...] = (),
    values: list[int] | None = None,
) -> None:
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, loader)
        metadata = MetadataCatalog.get(name).set(evaluator_type="sem_seg")
        if classes:
            metadata.set(stuff_classes=list(classes), ignore_label=255)
        if values:
            metadata.set(label_values=values + _VOID[len(values) :])


def _pair(image: Path, labels: Path) -> Record:
    return {"file_name": str(image), "sem_seg_file_name": str(labels)}


def load_voc(folder: Path, split: str) -> list[Record]:
    """Load VOC 2012: ``ImageSets/Segmentation/SPLIT.txt``, ``JPEGImages`` and label images."""
    names = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    labels = folder / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
    return [_pair(folder / "JPEGImages" / f"{n}.jpg", labels / f"{n}.png") for n in names]


def load_pairs(
    images: Path, labels: Path, endings: tuple[str, str] = (".jpg", ".png")
) -> list[Record]:
    """Load the images below a folder and the label images of the same names below another."""
    found = sorted(images.rglob(f"*{endings[0]}"))
    if not found:
        raise InputError(f"the folder {images} has no {endings[0]} files; put the data set there.")
    names = [path.relative_to(images).as_posix().removesuffix(endings[0]) for path in found]
    pairs = zip(found, names, strict=True)
    return [_pair(path, labels / f"{name}{endings[1]}") for path, name in pairs]


def load_coco_parts(folder: Path, split: str, name: str, classes: tuple[str, ...]) -> list[Record]:
    """Load COCO 2017 with the supercategories of its things or of its stuff as classes.

    Pixels of nothing among them are ignored.
    """
    annotations, stuff = folder / "annotations", classes == _COCO_STUFF
    file = annotations / (f"stuff_{split}2017.json" if stuff else f"instances_{split}2017.json")
    categories = json.loads(file.read_text())["categories"]
    number = {kind: index for index, kind in enumerate(classes)}
    values = {each["id"]: number.get(each["supercategory"], IGNORED) for each in categories}
    images = folder / f"{split}2017"
    if stuff:
        records = load_pairs(images, annotations / f"stuff_{split}2017_pixelmaps")
        table = [values.get(value, IGNORED) for value in range(256)]
    else:
        records = load_coco_json(str(file), str(images), name)
        table = [IGNORED, *(values[each] for each in sorted(values))]
    MetadataCatalog.get(name).set(label_values=table)
    return records


def load_coco_20k(folder: Path) -> list[Record]:
    """Load the training images of COCO 2014 that ``coco_20k_filenames.txt`` of LOST names."""
    names = {Path(name).name for name in (folder / "coco_20k_filenames.txt").read_text().split()}
    file = folder / "annotations" / "instances_train2014.json"
    records = load_coco_json(str(file), str(folder / "train2014"), "coco_20k")
    return [record for record in records if Path(record["file_name"]).name in names]


def load_spair(folder: Path, split: str) -> list[Record]:
    """Load the pairs of SPair-71k, sides as (width, height) and points as (x, y) in pixels."""
    files = sorted((folder / "PairAnnotation" / split).glob("*.json"))
    if not files:
        raise InputError(f"{folder}/PairAnnotation/{split} has no pairs; put SPair-71k there.")
    records = []
    for content in (json.loads(file.read_text()) for file in files):
        images = folder / "JPEGImages" / content["category"]
        pair = {"category": content["category"], "target_box": content["trg_bndbox"]}
        for which, key in (("source", "src"), ("target", "trg")):
            pair[which] = str(images / content[f"{key}_imname"])
            pair[f"{which}_points"] = content[f"{key}_kps"]
            pair[f"{which}_size"] = content[f"{key}_imsize"][:2]
        records.append({"file_name": pair["source"], "pair": pair})
    return records
