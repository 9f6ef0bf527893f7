"""LVIS's AP through Detectron2's evaluator, on today's numpy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.evaluation import LVISEvaluator as Detectron2LVISEvaluator

from flsl_d2.errors import InputError

__all__ = [
    "LVISEvaluator",
    "check_lvis_dataset",
    "federated_loss_weights",
    "require_lvis",
]


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


class LVISEvaluator(Detectron2LVISEvaluator):
    """Detectron2's evaluator of the same name; AP of at most ``max_dets_per_image`` detections.

    Args:
        dataset_name: with LVIS's annotation file in its metadata.
        output_dir: where predictions are written.
        max_dets_per_image: LVIS counts 300.

    Raises:
        InputError: the package lvis is not installed.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, max_dets_per_image: int = 300
    ) -> None:
        require_lvis()
        super().__init__(dataset_name, output_dir=output_dir, max_dets_per_image=max_dets_per_image)

    def evaluate(self) -> dict[str, Any] | None:
        """AP by IoU, size and frequency of the classes (APr, APc, APf), on the first rank."""
        # lvis 0.5.3, its last release, uses this name of Python's float; numpy has had none since
        # 1.24.
        added = not hasattr(np, "float")
        if added:
            np.float = float
        try:
            return super().evaluate()
        finally:
            if added:
                del np.float
