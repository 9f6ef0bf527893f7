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
    """Raise InputError without the package lvis, with which Detectron2 reads and evaluates LVIS."""
    if importlib.util.find_spec("lvis") is None:
        # --no-deps, because lvis requires opencv-python, which overwrites any other build of cv2.
        raise InputError(
            "LVIS is read and evaluated with the package lvis, which is not installed; "
            "run pip install --no-deps lvis."
        )


def check_lvis_dataset(name: str) -> None:
    """Raise InputError where the package lvis or a data set's files are missing."""
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
    """Return a function for the weights (K,) by which the federated loss draws an image's classes.

    The weights (arXiv 2103.07461) are the numbers of images that show a class, to a power; they
    are ``class_image_count`` of the metadata of the data sets.
    """
    return partial(get_fed_loss_cls_weights, names, power)


class LVISEvaluator(Detectron2LVISEvaluator):
    """Detectron2's evaluator of the same name, with a current numpy and LVIS's 300 detections."""

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
