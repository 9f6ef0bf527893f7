"""Label images of semantic data sets: reading, checks, and conversion to Detectron2's numbering.

Detectron2's own conversion scripts are in its repository and not in the installed package.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image
from tqdm import tqdm

from flsl_d2.annotations.datasets import datasets_root
from flsl_d2.engine.launch import usable_cores
from flsl_d2.errors import InputError

_PREPARATION = "tools/prepare_labels.py makes those of ADE20K and of COCO"
IGNORED = 255

# Number of label images that are read; a wrong preparation shows in the first ones.
_LOOKED_AT = 20

logger = logging.getLogger(__name__)


def read_labels(path: str, copy: bool = False, dtype: np.dtype | str | None = None) -> np.ndarray:
    """Read a label image (H, W), for Detectron2's ``SemSegEvaluator``.

    Detectron2's own function demands an array without a copy, which numpy 2 refuses.

    Args:
        copy: not used; part of the evaluator's interface.
        dtype: type of the array; uint8 by default.
    """
    with PathManager.open(path, "rb") as stream:
        return np.asarray(Image.open(stream)).astype(dtype or np.uint8)


def check_label_images(name: str) -> int:
    """Check that pictures and label images are there, and that labels are in range.

    The first label images are read, because images that were not prepared have other numbers, which
    would train wrong classes without an error.

    Args:
        name: registered data set whose metadata has ``stuff_classes``, and for Detectron2's own
            ones ``image_root`` and ``sem_seg_root``.

    Returns:
        The number of classes.

    Raises:
        InputError: a folder, picture or label image is missing or wrong.
    """
    metadata = MetadataCatalog.get(name)
    for key in ("image_root", "sem_seg_root"):
        folder = metadata.get(key)
        if folder is not None and not os.path.isdir(folder):
            raise InputError(
                f"the folder {folder} of the data set {name!r} does not exist: put it there or set "
                f"DETECTRON2_DATASETS to the folder that holds the data sets ({_PREPARATION})."
            )
    records = DatasetCatalog.get(name)
    _check_pairs(name, metadata.get("image_root"), {record["file_name"] for record in records})
    num_classes, ignored = len(metadata.stuff_classes), metadata.get("ignore_label", 255)
    for record in records[:_LOOKED_AT]:
        _check_labels(record["sem_seg_file_name"], num_classes, ignored)
    return num_classes


def _check_pairs(name: str, folder: str | None, used: set[str]) -> None:
    """Check that no picture lacks its label image; Detectron2 would leave it out silently."""
    pictures = sorted(e.path for e in os.scandir(folder) if e.is_file()) if folder else []
    without = [path for path in pictures if path not in used]
    if without or not used:
        raise InputError(
            f"the data set {name!r} has {len(without)} pictures without a label image"
            f"{''.join(f', {path}' for path in without[:1])}; {_PREPARATION}."
        )


def _check_labels(path: str, num_classes: int, ignored: int) -> None:
    labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2:
        raise InputError(f"{path} is not a label image of one channel; {_PREPARATION}.")
    wrong = np.setdiff1d(labels, [*range(num_classes), ignored])
    if wrong.size:
        raise InputError(
            f"{path} has the label {wrong[0]}, but there are the classes 0 to {num_classes - 1} "
            f"and {ignored} for none; {_PREPARATION}."
        )


def ade20k_labels(labels: np.ndarray) -> np.ndarray:
    """Renumber ADE20K's labels (H, W) uint8: none from 0 to 255, and classes to start from 0."""
    return np.where(labels == 0, IGNORED, labels - 1).astype(np.uint8)


def stuff_labels(
    panoptic: np.ndarray, segments: Iterable[dict[str, Any]], numbers: dict[int, int]
) -> np.ndarray:
    """Convert COCO's panoptic image to classes of stuff.

    Args:
        panoptic: (H, W, 3) uint8; the segment's number is R + 256 G + 65536 B, 0 for none.
        segments: segments of the image, with ``id`` and ``category_id``.
        numbers: class number of each category of stuff; all other categories are things, 0.

    Returns:
        Labels (H, W), uint8; 255 where there is no segment.
    """
    weights = np.array([1, 256, 65536], np.int64)
    found, index = np.unique(panoptic.astype(np.int64) @ weights, return_inverse=True)
    category = {segment["id"]: segment["category_id"] for segment in segments}
    table = [numbers.get(category[i], 0) if i in category else IGNORED for i in found.tolist()]
    return np.array(table, np.uint8)[index].reshape(panoptic.shape[:2])


def prepare_ade20k(root: str | os.PathLike[str] | None = None, num_workers: int = 0) -> None:
    """Write ``ADEChallengeData2016/annotations_detectron2`` from its ``annotations``.

    Args:
        root: the folder of all data sets; ``$DETECTRON2_DATASETS`` by default.

    Raises:
        InputError: ADE20K is missing.
    """
    folder = Path(root or datasets_root()).expanduser() / "ADEChallengeData2016"
    for split in ("training", "validation"):
        source = folder / "annotations" / split
        _check(source.is_dir(), source, "unpack ADEChallengeData2016 there")
        target = folder / "annotations_detectron2" / split
        work = [(file, target / file.name, None) for file in sorted(source.glob("*.png"))]
        _convert(_ade20k_file, work, target, num_workers)


def prepare_coco_stuff(root: str | os.PathLike[str] | None = None, num_workers: int = 0) -> None:
    """Write ``coco/panoptic_stuff_train2017`` and ``_val2017`` from COCO's panoptic annotations.

    Args:
        root: the folder of all data sets; ``$DETECTRON2_DATASETS`` by default.

    Raises:
        InputError: the panoptic annotations are missing.
    """
    folder = Path(root or datasets_root()).expanduser() / "coco"
    metadata = MetadataCatalog.get("coco_2017_train_panoptic_stuffonly")
    numbers = dict(metadata.stuff_dataset_id_to_contiguous_id)
    for split in ("val2017", "train2017"):
        file, source = folder / "annotations" / f"panoptic_{split}.json", f"panoptic_{split}"
        _check(file.is_file(), file, "unpack panoptic_annotations_trainval2017 there")
        _check((folder / source).is_dir(), folder / source, f"unpack {source}.zip there")
        target = folder / f"panoptic_stuff_{split}"
        work = [
            (folder / source / entry["file_name"], target / entry["file_name"], segments)
            for entry in json.loads(file.read_text())["annotations"]
            for segments in [entry["segments_info"]]
        ]
        _convert(partial(_stuff_file, numbers), work, target, num_workers)


PREPARATIONS = {"ade20k": prepare_ade20k, "coco-stuff": prepare_coco_stuff}


def _check(exists: bool, path: Path, remedy: str) -> None:
    if not exists:
        raise InputError(f"{path} does not exist; {remedy}, or set DETECTRON2_DATASETS.")


def _convert(
    function: Callable[[Any], None], work: list[tuple[Any, ...]], target: Path, num_workers: int
) -> None:
    """Convert the files that do not exist yet, so that an interrupted run can be continued."""
    target.mkdir(parents=True, exist_ok=True)
    missing = [entry for entry in work if not entry[1].exists()]
    with ProcessPoolExecutor(num_workers or usable_cores()) as pool:
        done = pool.map(function, missing, chunksize=16)
        for _ in tqdm(done, desc=str(target), total=len(missing), unit="image"):
            pass
    logger.info("%s: %d label images, %d of them new.", target, len(work), len(missing))


def _ade20k_file(entry: tuple[Path, Path, None]) -> None:
    source, target, _ = entry
    with Image.open(source) as image:
        _save(ade20k_labels(np.asarray(image)), target)


def _stuff_file(numbers: dict[int, int], entry: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    source, target, segments = entry
    with Image.open(source) as image:
        _save(stuff_labels(np.asarray(image.convert("RGB")), segments, numbers), target)


def _save(labels: np.ndarray, target: Path) -> None:
    unfinished = target.with_suffix(".unfinished")
    Image.fromarray(labels).save(unfinished, "PNG")
    unfinished.replace(target)
