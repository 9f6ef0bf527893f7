"""LVIS's AP through Detectron2's evaluator, on today's numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.evaluation import LVISEvaluator as Detectron2LVISEvaluator

from flsl_d2.data.lvis import require_lvis

__all__ = ["LVISEvaluator"]


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
