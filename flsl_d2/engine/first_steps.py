"""What a run costs, once its first steps are done."""

from __future__ import annotations

import datetime
import logging
import os
import resource
import sys

import torch
from detectron2.engine import HookBase


class FirstSteps(HookBase):
    """Log the expected duration and the peak memory, once, after the first steps of this start.

    Args:
        steps: number of steps after which to log.
        left_out: work that is not counted.
        logger: logger of the run.
    """

    def __init__(self, steps: int, left_out: str, logger: logging.Logger) -> None:
        self.steps, self.left_out, self.logger = steps, left_out, logger

    def after_step(self) -> None:
        """Log when the steps are done."""
        if self.trainer.iter + 1 - self.trainer.start_iter != self.steps:
            return
        # The first steps start workers and choose kernels, so the median is taken.
        seconds = self.trainer.storage.history("time").median(self.steps)
        left = datetime.timedelta(
            seconds=round(seconds * (self.trainer.max_iter - self.trainer.iter - 1))
        )
        end = datetime.datetime.now(datetime.timezone.utc) + left
        self.logger.info(
            "After %d steps: %.3g s a step, so %s remain (until %s UTC), %s not "
            "counted; peak memory %s.",
            self.steps,
            seconds,
            left,
            f"{end:%Y-%m-%d %H:%M}",
            self.left_out,
            _peak_memory(),
        )


def _peak_memory() -> str:
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        used, total, place = torch.cuda.max_memory_reserved(), card.total_memory, card.name
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        place = "this machine"
    return f"{used / 2**30:.1f} of {total / 2**30:.0f} GiB of {place}"
