"""Frozen-feature measures of the teacher, while it trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from flsl_d2.evaluation.measures import MEASURES, measure_all, prepare_measures
from flsl_d2.modeling import FLSLViT
from pretrain.random_state import untouched_generators

__all__ = ["FeatureMeasures"]

logger = logging.getLogger("pretrain")


class FeatureMeasures(HookBase):
    """Scores of the teacher's frozen tokens, every ``period_iters`` steps and after the last.

    They go into the storage under their names, for example ``knn_segmentation/mIoU``, so that the
    writers registered after this hook put them beside the losses. The measures draw from
    generators of their own; the global ones and the training mode are left as they were, so that
    a run with this hook ends with the weights of a run without. A measure that fails is a warning
    in the log with its reason, and training goes on.

    Only the main process measures, and the others wait for it: it must be registered in all of
    them. The wait counts against the process group's timeout (30 minutes in Detectron2's launch),
    so bound the work with ``max_images``.

    Args:
        train: registered data set with labels to learn from.
        val: registered data set to score on.
        measures: names in :data:`flsl_d2.evaluation.measures.MEASURES`.
        period_iters: steps between two measurements; 0 measures after the last step only.
        max_images: bound of the images of each data set.
        short_side: pixels that the shorter side of an image is resized to; the resolution of
            pre-training by default, a quarter of the work of that of the final evaluation.

    Raises:
        InputError: data or names cannot be used; found when the hook is made, before training.
    """

    def __init__(
        self,
        train: str,
        val: str,
        measures: Sequence[str] = tuple(MEASURES),
        period_iters: int = 0,
        max_images: int | None = 200,
        short_side: int = 224,
    ) -> None:
        self.measures, self.period, self.short_side = tuple(measures), period_iters, short_side
        self.data = ()
        if comm.is_main_process():
            self.data = prepare_measures(
                train, val, measures, max_images=max_images, short_side=short_side
            )
        comm.synchronize()

    def after_step(self) -> None:
        """Measure when due."""
        done = self.trainer.iter + 1
        due = self.period and done % self.period == 0
        if due or done >= self.trainer.max_iter:
            if comm.is_main_process():
                self._measure(self.trainer.flsl.teacher.backbone)
            comm.synchronize()

    def _measure(self, encoder: FLSLViT) -> None:
        device = str(encoder.pos_embed.device)
        # Blocks that the run compiled would be compiled anew for the size of every image.
        with untouched_generators(), torch.compiler.set_stance("force_eager"):
            results, failures = measure_all(
                encoder, *self.data, self.measures, device=device, short_side=self.short_side
            )
        for name, reason in failures.items():
            logger.warning("%s was not measured: %s", name, reason)
        self.trainer.storage.put_scalars(smoothing_hint=False, **results)
