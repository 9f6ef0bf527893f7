"""When checkpoints are written, which are kept, and leaving when asked to stop."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

from flsl_d2.engine.stopping import STOPPED, StopRequest, agreed_by_all
from flsl_d2.errors import TrainingError
from flsl_d2.weights.checkpointer import SafeCheckpointer, remove_unfinished

__all__ = ["Checkpoints", "LeaveWhenAsked"]

logger = logging.getLogger(__name__)


class Checkpoints(HookBase):
    """Writes ``model_<step>.pth`` every ``period`` steps, and ``model_final.pth`` at the end.

    It belongs on every rank, after the hooks whose work of this step a resumed run must not
    repeat. A checkpoint that cannot be written is an error in the log, and training goes on from
    the one before; the last one of a run must succeed.

    Args:
        checkpointer: writes on the main process alone.
        period: steps between two checkpoints.
        keep_last: how many of the newest stay; None for all.
        keep_every: a checkpoint whose number of steps this divides stays, too; 0 for none.
        stop_agreed: whether to stop; called after each step, the same answer on every rank.
        prepare: called on every rank before a checkpoint is written.

    Raises:
        SystemExit: of status 75, once the checkpoint of a run that was asked to stop is written.
        TrainingError: that one or the last one cannot be written.
    """

    def __init__(
        self,
        checkpointer: SafeCheckpointer,
        period: int,
        keep_last: int | None = None,
        keep_every: int = 0,
        stop_agreed: Callable[[], bool] = lambda: False,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpointer, self.period = checkpointer, period
        self.keep_last, self.keep_every = keep_last, keep_every
        self.stop_agreed, self.prepare = stop_agreed, prepare

    def before_train(self) -> None:
        """Clear away what a killed run could not finish."""
        if comm.is_main_process():
            remove_unfinished(self.checkpointer.save_dir)

    def after_step(self) -> None:
        """Save when due; leave when asked to."""
        done = self.trainer.iter + 1
        stop = self.stop_agreed()
        if done >= self.trainer.max_iter:
            self._save("model_final", last=True)
        elif stop:
            self.save_and_leave()
        elif done % self.period == 0:
            self._save(f"model_{self.trainer.iter:07d}")

    def save_and_leave(self) -> None:
        """Write a checkpoint of this step and exit; called on every rank."""
        self._save(f"model_{self.trainer.iter:07d}", last=True)
        comm.synchronize()  # nobody leaves, and is missed, before the file is complete
        logger.info(
            "Stopped as asked after step %d; the same command with --resume continues.",
            self.trainer.iter + 1,
        )
        raise SystemExit(STOPPED)

    def _save(self, name: str, last: bool = False) -> None:
        self.prepare()
        try:
            self.checkpointer.save(name, iteration=self.trainer.iter)
            if comm.is_main_process():
                self._remove_old()
        except OSError as error:
            reason = error.strerror or error
            before = Path(self.checkpointer.get_checkpoint_file()).name
            safe = f"the last good one is {before}" if before else "there is none before it"
            sentence = (
                f"checkpoint {name}.pth cannot be written to '{self.checkpointer.save_dir}' "
                f"({reason}); {safe}"
            )
            if last:
                raise TrainingError(f"{sentence}; make room and continue with --resume.") from error
            logger.error(
                "%s. Training goes on; the next is due in %d steps.", sentence, self.period
            )

    def _remove_old(self) -> None:
        if self.keep_last is None:
            return
        numbered, newest = [], self.checkpointer.get_checkpoint_file()
        for file in Path(self.checkpointer.save_dir).glob("model_*.pth"):
            if match := re.fullmatch(r"model_(\d+)\.pth", file.name):
                numbered.append((int(match[1]) + 1, file))
        for steps, file in sorted(numbered)[: -self.keep_last]:
            kept = self.keep_every and steps % self.keep_every == 0
            if not kept and str(file) != newest:
                file.unlink(missing_ok=True)


class LeaveWhenAsked(HookBase):
    """The last hook of a run that writes its checkpoints before it evaluates and logs.

    Args:
        checkpoints: of the run.
        request: of this process; all ranks leave after the same step.
    """

    def __init__(self, checkpoints: Checkpoints, request: StopRequest) -> None:
        self.checkpoints, self.request = checkpoints, request

    def after_step(self) -> None:
        """Leave if any rank was asked to."""
        if agreed_by_all(self.request) and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpoints.save_and_leave()
