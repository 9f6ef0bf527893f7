"""LVIS: AP by Detectron2's evaluator with a current numpy, and the federated loss's weights."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.evaluation import LVISEvaluator as Detectron2LVISEvaluator

from flsl_d2.errors import InputError


def require_lvis() -> None:
    """Check that the package lvis, with which Detectron2 reads and evaluates LVIS, is installed.

    Raises:
        InputError: the package is not installed.
    """
    if importlib.util.find_spec("lvis") is None:
        # --no-deps, because lvis requires opencv-python, which overwrites any other build of cv2.
        raise InputError(
            "LVIS is read and evaluated with the package lvis, which is not installed; "
            "run pip install --no-deps lvis."
        )


def check_lvis_dataset(name: str) -> None:
    """Check that the package lvis and a data set's files exist.

    Raises:
        InputError: the package, the annotation file or the image folder is missing.
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
        names: names of data sets whose metadata has ``class_image_count``.
        power: exponent of the number of images that show a class.

    Returns:
        A function without arguments that returns the weights, (K,).
    """
    return partial(get_fed_loss_cls_weights, names, power)


class LVISEvaluator(Detectron2LVISEvaluator):
    """Detectron2's evaluator of the same name, with a current numpy and 300 detections an image.

    Args:
        dataset_name: name of a data set with LVIS's annotation file in its metadata.
        output_dir: folder of the predictions.
        max_dets_per_image: number of detections that count in an image; LVIS's own is 300.

    Raises:
        InputError: the package lvis is not installed.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, max_dets_per_image: int = 300
    ) -> None:
        require_lvis()
        super().__init__(dataset_name, output_dir=output_dir, max_dets_per_image=max_dets_per_image)

    def evaluate(self) -> dict[str, Any] | None:
        """Compute AP by IoU, size and frequency of the classes (APr, APc, APf), on rank 0."""
        # lvis 0.5.3, its last release, uses np.float, which numpy removed in 1.24.
        module: Any = importlib.import_module("lvis.eval")
        module.np = SimpleNamespace(**{**vars(np), "float": float})
        return super().evaluate()
