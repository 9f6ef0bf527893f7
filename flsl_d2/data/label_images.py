"""Data sets for semantic segmentation: one label image for each picture."""

from __future__ import annotations

import os

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from flsl_d2.errors import InputError

__all__ = ["check_label_images", "read_labels"]

_PREPARATION = "tools/prepare_labels.py makes those of ADE20K and of COCO"
# Of a folder; a wrong preparation shows in the first ones.
_LOOKED_AT = 20


def read_labels(path: str, copy: bool = False, dtype: np.dtype | str | None = None) -> np.ndarray:
    """A label image as an array (H, W), for Detectron2's ``SemSegEvaluator``.

    Detectron2's own function forbids a copy, which numpy 2 takes by its word and refuses.

    Args:
        path: of the image.
        copy: not used.
        dtype: of the array.
    """
    with PathManager.open(path, "rb") as stream:
        return np.asarray(Image.open(stream)).astype(dtype or np.uint8)


def check_label_images(name: str) -> int:
    """Check that pictures and label images are there, and that labels are in range.

    The first label images are read, because one that was not prepared differs from the others in
    its numbers alone, and trains on wrong classes without a word.

    Args:
        name: of a data set with ``image_root`` and ``sem_seg_root``.

    Returns:
        The number of its classes.

    Raises:
        InputError: naming the folder or the label image.
    """
    metadata = MetadataCatalog.get(name)
    num_classes, ignored = len(metadata.stuff_classes), metadata.get("ignore_label", 255)
    names = {}
    for key in ("image_root", "sem_seg_root"):
        folder = metadata.get(key)
        if not os.path.isdir(folder):
            raise InputError(
                f"the folder {folder} of the data set {name!r} does not exist: put it there or set "
                f"DETECTRON2_DATASETS to the folder that holds the data sets ({_PREPARATION})."
            )
        names[key] = {os.path.splitext(file)[0]: file for file in sorted(os.listdir(folder))}
    without = sorted(names["image_root"].keys() ^ names["sem_seg_root"].keys())
    if without or not names["image_root"]:
        some = ", ".join(without[:3]) or "both folders are empty"
        raise InputError(
            f"the data set {name!r} has {len(without)} pictures without a label image or the other "
            f"way round ({some}): compare {metadata.image_root} with {metadata.sem_seg_root}."
        )
    for file in list(names["sem_seg_root"].values())[:_LOOKED_AT]:
        path = os.path.join(metadata.sem_seg_root, file)
        labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        if labels is None or labels.ndim != 2:
            raise InputError(f"{path} is not a label image of one channel; {_PREPARATION}.")
        wrong = np.setdiff1d(labels, [*range(num_classes), ignored])
        if wrong.size:
            raise InputError(
                f"{path} has the label {wrong[0]}, but the data set {name!r} has the classes 0 to "
                f"{num_classes - 1} and {ignored} for none; {_PREPARATION}."
            )
    return num_classes
