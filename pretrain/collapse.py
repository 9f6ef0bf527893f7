"""Noticing that training has collapsed, early enough to save the rest of its time."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

__all__ = ["CollapseWatch", "collapse_signs"]

logger = logging.getLogger("pretrain")

# Measured on 64-pixel runs: a healthy one has feature_std 0.7 and gives its largest centroid a
# third of the queries; without the volume term one centroid has all of them after 120 steps.
MAX_SHARE = 0.9
MIN_FEATURE_STD = 0.05


def collapse_signs(assigned: Tensor, feature_std: float) -> list[str]:
    """What speaks for a collapse, in words; nothing in a healthy run.

    Args:
        assigned: (K,) how many queries the teacher gave to each centroid.
        feature_std: of the teacher's features, about 1 where they fill the space.
    """
    signs = []
    share, centroid = (assigned.double() / assigned.sum().clamp(min=1)).max(dim=0)
    if share > MAX_SHARE:
        signs.append(f"centroid {int(centroid)} has {float(share):.1%} of all queries")
    if not feature_std > MIN_FEATURE_STD:
        signs.append(f"the features hardly vary (feature_std {feature_std:.3g})")
    return signs


class CollapseWatch(HookBase):
    """Warns when two windows of steps in a row show signs of collapse; training goes on.

    It belongs on every rank. The warning is repeated after every tenth further window.

    Args:
        window: steps that are judged together.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.bad_windows = 0
        self._reset()

    def _reset(self) -> None:
        self.assigned: Tensor | None = None
        self.feature_std: Tensor | None = None
        self.steps = 0

    def after_step(self) -> None:
        """Accumulate on the device; judge at the end of each window."""
        monitored = self.trainer.monitored
        if self.assigned is None:
            self.assigned = torch.zeros_like(monitored["assigned"])
            self.feature_std = torch.zeros_like(monitored["feature_std"])
        self.assigned += monitored["assigned"]
        self.feature_std += monitored["feature_std"]
        self.steps += 1
        if (self.trainer.iter + 1) % self.window == 0:
            if self.steps == self.window:  # else resumed in the middle of it
                self._judge()
            self._reset()

    def _judge(self) -> None:
        if dist.is_initialized() and comm.get_world_size() > 1:
            dist.all_reduce(self.assigned)
        signs = collapse_signs(self.assigned, float(self.feature_std) / self.window)
        self.bad_windows = self.bad_windows + 1 if signs else 0
        if self.bad_windows % 10 == 2:
            logger.warning(
                "Training has collapsed: for %d steps, until iteration %d, %s. It seldom recovers: "
                "stop it, and start anew with a larger model.loss.volume_weight, with "
                "schedules.cross_scale above schedules.self_scale, or a lower schedules.base_lr.",
                self.bad_windows * self.window,
                self.trainer.iter,
                " and ".join(signs),
            )
