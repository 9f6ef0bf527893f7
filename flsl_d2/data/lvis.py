"""What LVIS (arXiv 1908.03195) needs besides Detectron2's own registration of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import get_fed_loss_cls_weights

from flsl_d2.errors import InputError

__all__ = ["check_lvis_dataset", "federated_loss_weights", "require_lvis"]


def require_lvis() -> None:
    """Check that LVIS's own package is there; Detectron2 reads and evaluates LVIS with it.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("lvis") is None:
        # --no-deps: it asks for opencv-python, which overwrites any other build of cv2.
        raise InputError(
            "LVIS is read and evaluated with the package lvis, which is not installed; "
            "run pip install --no-deps lvis."
        )


def check_lvis_dataset(name: str) -> None:
    """Check that LVIS's package and a data set's files are there.

    Raises:
        InputError: naming what is missing.
    """
    require_lvis()
    metadata = MetadataCatalog.get(name)
    for path, what in ((metadata.json_file, "annotation file"), (metadata.image_root, "folder")):
        if not os.path.exists(path):
            raise InputError(
                f"the {what} {path} of the data set {name!r} does not exist: put it there or set "
                "DETECTRON2_DATASETS to the folder that holds the data sets."
            )


def federated_loss_weights(
    names: str | list[str], power: float = 0.5
) -> Callable[[], torch.Tensor]:
    """Weights by which the federated loss (arXiv 2103.07461) draws the classes of an image.

    Args:
        names: of data sets whose metadata has ``class_image_count``.
        power: of the number of images that show a class.

    Returns:
        A function that gives the weights, (K,), once the model is built.
    """
    return partial(get_fed_loss_cls_weights, names, power)
