"""Values that change from step to step: learning rate, weight decay, temperatures, scales."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import DictConfig

from flsl_d2.errors import InputError

logger = logging.getLogger("pretrain")


def set_run_length(cfg: DictConfig, num_images: int) -> int:
    """Set the keys of ``cfg.schedules`` that depend on the run's length; return its steps."""
    batch_size = cfg.dataloader.total_batch_size
    iters_per_epoch = num_images / batch_size
    total_iters = cfg.train.max_iter or round(cfg.train.epochs * iters_per_epoch)
    cfg.schedules.update(
        total_batch_size=batch_size, iters_per_epoch=iters_per_epoch, total_iters=total_iters
    )
    return total_iters


@dataclass(frozen=True)
class StepValues:
    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    intra_weight: float
    self_scale: float
    cross_scale: float
    last_layer_frozen: bool
    encoder_frozen: bool = False
    own_attention: float = 1.0
    progress: float = 0.0  # share of the run that lies behind the step


class Schedules:
    """Values of every step of a run of ``total_iters`` steps.

    A pair ``(start, end)`` moves from start to end by half a cosine over the whole run. The
    defaults are the values of the published ViT-S/16 run.

    Args:
        total_batch_size: number of images in a step, of all processes.
        iters_per_epoch: number of steps in an epoch; may be fractional.
        base_lr: learning rate for 256 images a step; scaled linearly with the batch.
        final_lr: learning rate at the end.
        warmup_fraction: share of the run over which the learning rate rises linearly from 0.
        teacher_momentum: momentum of the moving average.
        teacher_temp: tau_t, linear from start to end over ``teacher_temp_epochs``.
        intra_weight: v.
        self_scale: s_sa times sqrt(D).
        cross_scale: s_ca times sqrt(D). Training collapses where it lies below ``self_scale``; a
            warning says so.
        mixture_bias: share of the previous stage's attention at the end of multi-stage training;
            the share w of the teacher's own attention moves from 0 to ``1 - mixture_bias``. With
            the published default of 1 only the previous stage's attention counts.
        frozen_last_layer_epochs: number of epochs in which the centroids are not trained.
        frozen_encoder_fraction: share of the run, at its start, in which the encoder is not
            trained, so that a random head does not spoil an encoder that is trained already; the
            warm-up of the learning rate is then run through a second time.
    """

    def __init__(
        self,
        total_batch_size: int,
        iters_per_epoch: float,
        total_iters: int,
        base_lr: float = 5e-4,
        final_lr: float = 1e-6,
        warmup_fraction: float = 0.1,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        teacher_momentum: tuple[float, float] = (0.996, 1.0),
        teacher_temp: tuple[float, float] = (0.04, 0.07),
        teacher_temp_epochs: float = 30,
        intra_weight: tuple[float, float] = (0.03, 0.03),
        self_scale: tuple[float, float] = (0.1, 0.1),
        cross_scale: tuple[float, float] = (0.2, 0.2),
        mixture_bias: float = 1.0,
        frozen_last_layer_epochs: float = 1,
        frozen_encoder_fraction: float = 0.0,
    ) -> None:
        if total_iters < 1:
            raise InputError(
                f"the run has {total_iters} steps; set train.epochs or train.max_iter."
            )
        if not 0 <= mixture_bias <= 1:
            raise InputError(
                f"schedules.mixture_bias is {mixture_bias}, a share; use a value from 0 to 1."
            )
        if not 0 <= frozen_encoder_fraction < 1:
            raise InputError(
                f"schedules.frozen_encoder_fraction is {frozen_encoder_fraction}, a share of the "
                "run; use a value from 0 to below 1."
            )
        if min(cross_scale) < min(self_scale) or max(cross_scale) < max(self_scale):
            logger.warning(
                "schedules.cross_scale %s lies below schedules.self_scale %s: training is known to "
                "collapse there; raise cross_scale.",
                tuple(cross_scale),
                tuple(self_scale),
            )
        self.peak_lr = base_lr * total_batch_size / 256
        self.final_lr = final_lr
        self.total_iters = total_iters
        self.warmup_iters = round(warmup_fraction * total_iters)
        self.temp_iters = teacher_temp_epochs * iters_per_epoch
        self.frozen_iters = frozen_last_layer_epochs * iters_per_epoch
        self.frozen_encoder_iters = round(frozen_encoder_fraction * total_iters)
        self.teacher_temp = teacher_temp
        self._cosines = {
            "weight_decay": CosineParamScheduler(*weight_decay),
            "teacher_momentum": CosineParamScheduler(*teacher_momentum),
            "intra_weight": CosineParamScheduler(*intra_weight),
            "self_scale": CosineParamScheduler(*self_scale),
            "cross_scale": CosineParamScheduler(*cross_scale),
            "own_attention": CosineParamScheduler(0.0, 1.0 - mixture_bias),
        }

    def __call__(self, iteration: int) -> StepValues:
        where = min(iteration / self.total_iters, 1.0)
        cosines = {name: schedule(where) for name, schedule in self._cosines.items()}
        return StepValues(
            lr=self._lr(iteration),
            teacher_temp=self._teacher_temp(iteration),
            last_layer_frozen=iteration < self.frozen_iters,
            encoder_frozen=iteration < self.frozen_encoder_iters,
            progress=where,
            **cosines,
        )

    def _lr(self, iteration: int) -> float:
        if iteration < self.frozen_encoder_iters:
            return self.peak_lr * min((iteration + 1) / max(self.warmup_iters, 1), 1.0)
        iteration -= self.frozen_encoder_iters
        if iteration < self.warmup_iters:
            return self.peak_lr * (iteration + 1) / self.warmup_iters
        decay_iters = self.total_iters - self.frozen_encoder_iters - self.warmup_iters
        after = (iteration - self.warmup_iters) / max(decay_iters, 1)
        return CosineParamScheduler(self.peak_lr, self.final_lr)(min(after, 1.0))

    def _teacher_temp(self, iteration: int) -> float:
        start, end = self.teacher_temp
        return start + (end - start) * min(iteration / max(self.temp_iters, 1), 1.0)
