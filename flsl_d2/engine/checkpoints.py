"""Hooks that write checkpoints, keep some of them, and stop a run on request."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from flsl_d2.agreement import SlowAgreement, decided_by_main
from flsl_d2.engine.launch import leave
from flsl_d2.engine.run_folder import unlock
from flsl_d2.engine.stopping import (
    STOPPED,
    Interrupted,
    StopRequest,
    command_to_resume,
)
from flsl_d2.errors import TrainingError
from flsl_d2.files import write_text
from flsl_d2.weights.checkpointer import (
    BEST_WEIGHTS,
    SafeCheckpointer,
    checkpoint_files,
    remove_unfinished,
)

BEST_FILE = "best.json"
# Seconds that other processes give the main one to write its checkpoint.
_TIME_FOR_MAIN = 15

logger = logging.getLogger(__name__)


class Background:
    """A thread for one piece of work at a time.

    ``done`` says whether a piece of work has ended whose result was not taken yet.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def start(self, function: Callable[[], object]) -> None:
        assert self._thread is None, "the result of the piece before was not taken"
        self._thread = threading.Thread(target=self._run, args=(function,))
        self._thread.start()

    def wait(self) -> BaseException | None:
        """Wait for the piece of work, if there is one; return the exception that it raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error

    def _run(self, function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # some of PyTorch's are no Exception
            self._error = error


class Checkpoints(HookBase):
    """Write ``model_<step>.pth`` every ``period`` steps, and ``model_final.pth`` at the end.

    The hook runs on every rank, after the hooks whose work of a step a resumed run must not repeat.
    A checkpoint that cannot be written is an error in the log, and training goes on; the last
    checkpoint of a run must succeed. A checkpoint that is written in the background is whole or not
    there at all, like others; the next one, a stop and the end of training wait for it.

    Args:
        checkpointer: checkpointer, which writes on the main process alone.
        keep_last: number of newest checkpoints to keep; None keeps all.
        keep_every: number of steps whose multiples are kept for good; 0 for none.
        stop_agreed: function called after each step on every rank; True on all of them stops.
        prepare: function called on every rank before a checkpoint is written.
        background: whether training goes on while a checkpoint is written from a copy in the CPU's
            memory, except for the last.

    Raises:
        SystemExit: the run was asked to stop and its checkpoint is written; the status is 75.
        TrainingError: the last checkpoint cannot be written.
    """

    def __init__(
        self,
        checkpointer: SafeCheckpointer,
        period: int,
        keep_last: int | None = None,
        keep_every: int = 0,
        stop_agreed: Callable[[], bool] = lambda: False,
        prepare: Callable[[], None] = lambda: None,
        background: bool = False,
    ) -> None:
        self.checkpointer, self.period = checkpointer, period
        self.background = background
        self._writing, self._written = Background(), ""
        self.keep_last, self.keep_every = keep_last, keep_every
        self.stop_agreed, self.prepare = stop_agreed, prepare

    def before_train(self) -> None:
        """Remove unfinished files of a run that was killed."""
        if comm.is_main_process():
            remove_unfinished(self.checkpointer.save_dir)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        stop = self.stop_agreed()
        if self._writing.done:
            self._take_result()
        if done >= self.trainer.max_iter:
            self._save("model_final", last=True)
        elif stop:
            self.save_and_leave()
        elif done % self.period == 0:
            self._save(f"model_{self.trainer.iter:07d}")

    def after_train(self) -> None:
        """Wait for the checkpoint that is being written; let other runs into the folder."""
        self._take_result()
        unlock(self.checkpointer.save_dir)

    def save_and_leave(self) -> None:
        """Write a checkpoint of this step and exit; every rank must call this."""
        self._save(f"model_{self.trainer.iter:07d}", last=True)
        comm.synchronize()  # no rank leaves before the file is complete
        self._log_stop()
        raise SystemExit(STOPPED)

    def save_alone_and_leave(self) -> NoReturn:
        """Write a checkpoint on the main process, and exit without the others.

        Processes that were interrupted anywhere cannot wait for each other.
        """
        if comm.get_world_size() > 1 and not comm.is_main_process():
            time.sleep(_TIME_FOR_MAIN)  # the first process that ends may end the others
            os._exit(STOPPED)
        if self.trainer.iter < self.trainer.max_iter:
            self._save(f"model_{self.trainer.iter:07d}", last=True)
        self._log_stop()
        if comm.get_world_size() > 1:
            leave(STOPPED)
        raise SystemExit(STOPPED)

    def _log_stop(self) -> None:
        logger.info(
            "Stopped on request after step %d; it goes on with: %s",
            self.trainer.iter + 1,
            command_to_resume(),
        )

    def finish(self) -> None:
        """Write the last checkpoint of a run that ends before its last step, on every rank."""
        self._save("model_final", last=True)
        comm.synchronize()

    def _save(self, name: str, last: bool = False) -> None:
        self.prepare()
        self._take_result()
        if not comm.is_main_process():
            return
        if self.background and not last:
            content = self.checkpointer.snapshot(iteration=self.trainer.iter)
            self._written = name
            self._writing.start(lambda: self._write(name, content))
            return
        try:
            self._write(name, self.checkpointer.content(iteration=self.trainer.iter))
        except OSError as error:
            sentence = self._sentence(name, error)
            if last:
                raise TrainingError(f"{sentence}; make room and continue with --resume.") from error
            self._log(sentence)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.checkpointer.write(name, content)
        if comm.is_main_process():
            self._remove_old()

    def _take_result(self) -> None:
        error = self._writing.wait()
        if isinstance(error, OSError):
            self._log(self._sentence(self._written, error))
        elif error is not None:
            raise RuntimeError(f"checkpoint {self._written} was not written") from error

    def _sentence(self, name: str, error: OSError) -> str:
        before = Path(self.checkpointer.get_checkpoint_file()).name
        safe = f"the last good one is {before}" if before else "there is none before it"
        return (
            f"checkpoint {name}.pth cannot be written to "
            f"'{self.checkpointer.save_dir}' ({error.strerror or error}); {safe}"
        )

    def _log(self, sentence: str) -> None:
        logger.error("%s. Training goes on; the next is due in %d steps.", sentence, self.period)

    def _remove_old(self) -> None:
        if self.keep_last is None:
            return
        numbered, newest = [], self.checkpointer.get_checkpoint_file()
        for file in checkpoint_files(self.checkpointer.save_dir):
            if match := re.fullmatch(r"model_(\d+)", file.stem):
                numbered.append((int(match[1]) + 1, file))
        for steps, file in sorted(numbered)[: -self.keep_last]:
            kept = self.keep_every and steps % self.keep_every == 0
            if not kept and str(file) != newest:
                file.unlink(missing_ok=True)


class KeepBest(hooks.BestCheckpointer):
    """Keep the weights with the best value of an evaluation as ``model_best.pth``.

    The file has no state of training, and is never resumed from. ``best.json`` beside it has the
    value, its step and the number of evaluations since; a resumed run goes on from it. Runs on the
    main process, after the hook that evaluates every ``eval_period`` steps (0: at the end).
    ``metric`` is a name in ``metrics.json``, such as ``bbox/AP``; more is better.
    """

    best_metric: float | None
    best_iter: int | None
    without_gain = 0

    def __init__(self, eval_period: int, checkpointer: SafeCheckpointer, metric: str) -> None:
        # Detectron2's hook would write the state after the loop, whose step is one too many.
        weights = type(checkpointer)(checkpointer.model, checkpointer.save_dir)
        weights.tag_saved = False
        super().__init__(eval_period, weights, metric)
        self.file = Path(checkpointer.save_dir, BEST_FILE)

    def before_train(self) -> None:
        """Take over the best value of the run that is resumed; forget that of any other run."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.file.read_text())
            resumed = 0 < self.trainer.start_iter >= kept["iteration"]
            if resumed and kept["metric"] == self._val_metric:
                self.best_metric, self.best_iter = kept["value"], kept["iteration"]
                self.without_gain = kept["evaluations_without_gain"]
                return
        self.file.unlink(missing_ok=True)
        self.file.with_name(BEST_WEIGHTS).unlink(missing_ok=True)

    def _best_checking(self) -> None:
        before = self.best_iter
        super()._best_checking()
        self.without_gain = 0 if self.best_iter != before else self.without_gain + 1
        if self.best_metric is not None:
            content = {
                "metric": self._val_metric,
                "value": self.best_metric,
                "iteration": self.best_iter,
                "evaluations_without_gain": self.without_gain,
            }
            write_text(self.file, json.dumps(content))


class StoppableEval(hooks.EvalHook):
    """Detectron2's evaluation, except that a request to stop ends it within seconds.

    The checkpoint of the step is written then, and a resumed run evaluates first.
    """

    def __init__(
        self,
        eval_period: int,
        evaluate: Callable[[], Any],
        checkpoints: Checkpoints,
        request: StopRequest,
    ) -> None:
        super().__init__(eval_period, evaluate)
        self.checkpoints, self.request = checkpoints, request
        self._due = EvaluationDue(checkpoints.checkpointer.save_dir)

    def before_train(self) -> None:
        """Evaluate where the run that is resumed was stopped in an evaluation."""
        super().before_train()
        # After the last step the run evaluates anyway.
        begun = self.trainer.start_iter < self.trainer.max_iter
        if begun and self._due.is_left(self.trainer.start_iter):
            self._do_eval()

    def _do_eval(self) -> None:
        try:
            with self.request.interrupting():
                super()._do_eval()
        except Interrupted:
            self._due.note()
            self.checkpoints.save_alone_and_leave()
        self._due.clear()


class EvaluationDue:
    """File of a run's folder that says that a stopped run has an evaluation to do."""

    def __init__(self, folder: str | Path) -> None:
        self._file = Path(folder, "evaluation_due")

    def note(self) -> None:
        if comm.is_main_process():
            write_text(self._file, "The run was stopped in an evaluation; --resume evaluates.\n")

    def clear(self) -> None:
        if comm.is_main_process():
            self._file.unlink(missing_ok=True)

    def is_left(self, start_iter: int) -> bool:
        """Whether a run that starts at a step has to evaluate first; equal on all processes."""
        return bool(start_iter) and decided_by_main(self._file.is_file)


class EndedEarly(BaseException):
    """End of training before the last step, which Detectron2 does not log as an error."""


class StopEarly(HookBase):
    """End training when several evaluations in a row brought no better value.

    ``best`` counts the evaluations; it is None on all ranks but the first. Once the last checkpoint
    is written, EndedEarly is raised.
    """

    def __init__(
        self, checkpoints: Checkpoints, best: KeepBest | None, patience: int, eval_period: int
    ) -> None:
        self.checkpoints, self.best = checkpoints, best
        self.patience, self.eval_period = patience, eval_period

    def after_step(self) -> None:
        if self.eval_period < 1 or (self.trainer.iter + 1) % self.eval_period:
            return
        exhausted = self.best is not None and self.best.without_gain >= self.patience
        if not comm.all_gather(exhausted)[0] or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        logger.info(
            "Stopping after step %d, because %d evaluations in a row were no better.",
            self.trainer.iter + 1,
            self.patience,
        )
        self.checkpoints.finish()
        raise EndedEarly


class LeaveWhenAsked(HookBase):
    """Stop a run on request, as its last hook: after evaluation and logging of the step.

    All ranks leave after the same step.
    """

    def __init__(self, checkpoints: Checkpoints, request: StopRequest) -> None:
        self.checkpoints, self.request = checkpoints, request
        self._agreement = SlowAgreement()

    def before_train(self) -> None:
        self.request.step = lambda: self.trainer.iter + 1

    def after_step(self) -> None:
        """Leave if any rank was asked to stop; the ranks agree on it while they take a step."""
        agreed = self._agreement.agreed_before(bool(self.request))
        if agreed and self.trainer.iter + 1 < self.trainer.max_iter:
            self.checkpoints.save_and_leave()
