"""UAVDT (arXiv 1804.00518), vehicles seen from drones: its text files as COCO annotations.

Each line of ``M0101_gt_whole.txt`` is ``frame,track,left,top,width,height,out-of-view,occlusion,
category``; frames are counted from 1, boxes are in pixels, and the categories are 1 car, 2 truck
and 3 bus. Each line of ``M0101_gt_ignore.txt`` begins with the same six numbers and gives a region
where vehicles are not annotated. ``M_attr/train`` and ``M_attr/test`` name the sequences of the
splits.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from flsl_d2.annotations.coco_file import write_coco
from flsl_d2.annotations.datasets import datasets_root
from flsl_d2.errors import InputError

CATEGORIES = {1: "car", 2: "truck", 3: "bus"}
IMAGES = "UAV-benchmark-M"
_TRUTH = ("UAV-benchmark-MOTD_v1.0/GT", "GT")
_SPLITS = ("train", "test")

logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    """COCO entries of one sequence, and the number of boxes left out for each reason."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    left_out: Counter[str]


def convert_uavdt(root: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Write ``annotations/instances_train.json`` and ``instances_test.json`` below a folder.

    Args:
        root: folder with the unpacked ``UAV-benchmark-M``, ``UAV-benchmark-MOTD_v1.0`` and
            ``M_attr``; ``uavdt`` below the folder of all data sets by default.

    Returns:
        The file of each split.

    Raises:
        InputError: a folder, sequence or file is missing, or a line cannot be read.
    """
    root = Path(root if root is not None else Path(datasets_root(), "uavdt")).expanduser()
    truth = next((root / name for name in _TRUTH if (root / name).is_dir()), root / _TRUTH[0])
    for folder in (root / IMAGES, truth, *(root / "M_attr" / split for split in _SPLITS)):
        if not folder.is_dir():
            raise InputError(
                f"the folder {folder} does not exist; unpack UAV-benchmark-M, "
                f"UAV-benchmark-MOTD_v1.0 and M_attr into {root}."
            )
    sequences = {split: _sequences(root, truth, split) for split in _SPLITS}
    return {split: _convert_split(root, truth, split, sequences[split]) for split in _SPLITS}


def convert_sequence(
    folder: Path, truth: Path, first_image: int = 1, first_annotation: int = 1
) -> Converted:
    """Convert one sequence to COCO entries, of images without vehicles as well.

    Boxes are cut at the image's border. An ignored region becomes an annotation with ``iscrowd``
    in each category, which COCO's evaluation ignores and training leaves out. The folder has the
    pictures ``img000001.jpg`` and so on, ``truth`` the text files.
    """
    boxes: dict[int, list[tuple[list[int], int, int]]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for frame, _, *box, _, _, category in _lines(truth / f"{folder.name}_gt_whole.txt", 9):
        if category in CATEGORIES:
            boxes[frame].append((box, category, 0))
        else:
            left_out[f"of category {category}"] += 1
    ignore_file = truth / f"{folder.name}_gt_ignore.txt"
    for frame, _, *box in _lines(ignore_file, 6) if ignore_file.is_file() else ():
        boxes[frame] += [(box, category, 1) for category in CATEGORIES]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in sorted(folder.glob("*.jpg")):
        with Image.open(picture) as opened:
            width, height = opened.size
        number = first_image + len(images)
        name = f"{folder.name}/{picture.name}"
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for (left, top, w, h), category, crowd in boxes.pop(int(picture.stem[-6:]), ()):
            x, y = max(left, 0), max(top, 0)
            w, h = min(left + w, width) - x, min(top + h, height) - y
            if min(w, h) <= 0:
                left_out["outside their image"] += 1
                continue
            annotations.append(
                {
                    "id": first_annotation + len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                }
            )
    left_out["of frames without a picture"] += sum(map(len, boxes.values()))
    return Converted(images, annotations, +left_out)


def _sequences(root: Path, truth: Path, split: str) -> list[str]:
    folder = root / "M_attr" / split
    names = sorted(file.name.partition("_")[0].strip() for file in folder.glob("*_attr.txt"))
    if not names:
        raise InputError(
            f"{folder} names no sequence (it has no file such as M0101_attr.txt); unpack M_attr "
            "again."
        )
    pictures = [name for name in names if not any((root / IMAGES / name).glob("*.jpg"))]
    texts = [name for name in names if not (truth / f"{name}_gt_whole.txt").is_file()]
    for missing, what in ((pictures, root / IMAGES), (texts, truth)):
        if missing:
            raise InputError(
                f"{what} lacks {len(missing)} of the {len(names)} sequences of {split} "
                f"({', '.join(missing[:5])}); unpack all of UAVDT."
            )
    return names


def _convert_split(root: Path, truth: Path, split: str, names: list[str]) -> Path:
    total = Converted([], [], Counter())
    for name in tqdm(names, desc=f"UAVDT {split}", unit="sequence"):
        first = len(total.images) + 1, len(total.annotations) + 1
        converted = convert_sequence(root / IMAGES / name, truth, *first)
        total.images.extend(converted.images)
        total.annotations.extend(converted.annotations)
        total.left_out.update(converted.left_out)
    path = root / "annotations" / f"instances_{split}.json"
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    content = {"images": total.images, "annotations": total.annotations, "categories": categories}
    write_coco(path, content)
    crowds = sum(a["iscrowd"] for a in total.annotations)
    logger.info(
        "%s: %d images, %d vehicles, %d ignored regions.",
        path,
        len(total.images),
        len(total.annotations) - crowds,
        crowds // len(CATEGORIES),
    )
    for what, count in total.left_out.items():
        logger.warning("%s: left out %d boxes %s.", path, count, what)
    return path


def _lines(path: Path, fields: int) -> list[list[int]]:
    """First numbers of every line of a text file."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = [round(float(value)) for value in line.split(",")[:fields]]
        except ValueError:
            row = []
        if len(row) != fields:
            raise InputError(
                f"line {number} of {path} is {line!r}; expected at least {fields} numbers with "
                "commas between them."
            )
        rows.append(row)
    return rows
