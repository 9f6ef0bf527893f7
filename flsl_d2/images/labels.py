"""Label images of semantic data sets: reading, checks, and conversion to Detectron2's numbering.

Detectron2's own conversion scripts are in its repository and not in the installed package.
"""

from __future__ import annotations

import logging
import os

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from flsl_d2.errors import InputError

_PREPARATION = (
    "Detectron2's datasets/prepare_ade20k_sem_seg.py and prepare_panoptic_fpn.py make those of "
    "ADE20K and of COCO"
)

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
