"""Signs of life of long work and of training: a bar on a terminal, lines in a log.

The first line comes with the fifth item or after ten seconds, whichever is earlier; the time
between two lines then doubles up to a minute.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from detectron2.engine import HookBase
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")

FIRST_ITEMS, FIRST_SECONDS, MOST_SECONDS = 5, 10.0, 60.0
logger = logging.getLogger(__name__)


class Pace:
    """The times at which progress is reported, for a number of items that may be unknown."""

    def __init__(self, total: int | None, done: int = 0) -> None:
        self.total, self._first = total, done
        self._start = self._last = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether a report is due after so many items; it counts as given."""
        now = time.monotonic()
        gap = min(max(self._last - self._start, FIRST_SECONDS), MOST_SECONDS)
        early = self._last == self._start and done - self._first >= FIRST_ITEMS
        if done == self.total or not (early or now - self._last >= gap):
            return False
        self._last = now
        return True

    def postpone(self) -> None:
        """Count another report as one of these."""
        self._last = time.monotonic()

    def text(self, done: int) -> str:
        """Return the number of items done, and the time that the rest takes."""
        seconds = (time.monotonic() - self._start) / max(done - self._first, 1)
        if self.total is None:
            return f"{done} done, {seconds:.2g} s each"
        left = timedelta(seconds=round(seconds * (self.total - done)))
        return f"{done} of {self.total} done, {seconds:.2g} s each, {left} left"


def progress(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "image"
) -> Iterator[T]:
    """Yield the items of a long piece of work, and show how far it is and what is left.

    On a terminal a bar of tqdm stands below the log. Elsewhere lines go to the log, or to stderr
    where none is set up. ``what`` names the work, such as ``predicting``.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        with bar_below_log():
            yield from tqdm(items, what, total, unit=unit, leave=False, dynamic_ncols=True)
        return
    pace = Pace(total)
    for done, item in enumerate(items, 1):
        yield item
        if pace.due(done):
            line = f"{what}: {pace.text(done)}"
            if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
                logger.info("%s", line)
            else:
                print(line, file=sys.stderr, flush=True)


@contextmanager
def bar_below_log() -> Iterator[None]:
    """Context in which lines of a log on the console do not break a bar of tqdm."""
    names = (None, "fvcore", "detectron2", "pretrain", "flsl_d2")
    with logging_redirect_tqdm([logging.getLogger(name) for name in names]):
        yield


_PATIENCE_SECONDS = 60.0
_STATES = {
    "D": "waits for a disk or a server",
    "R": "computes",
    "S": "waits",
    "T": "is stopped",
    "Z": "has ended",
}


class FirstSteps(HookBase):
    """Show how far training is, and say after the first steps how long and how large it will be.

    On a terminal a bar of tqdm stands below the log. Elsewhere the log gets a line with the fifth
    step or after ten seconds, whichever is earlier, and then each minute in which the writers of
    the run, every ``log_period`` steps, wrote none. A warning says after a minute that no batch has
    come, and why. The duration does not count the work named by ``left_out``. It is registered on
    the main process.
    """

    def __init__(
        self, steps: int, left_out: str, logger: logging.Logger, log_period: int = 20
    ) -> None:
        self.steps, self.left_out, self.logger = steps, left_out, logger
        self.log_period = log_period
        self._context = ExitStack()
        self._bar: Any = None

    def before_train(self) -> None:
        self._pace = Pace(self.trainer.max_iter, self.trainer.start_iter)
        self._watch = threading.Timer(_PATIENCE_SECONDS, self._warn)
        self._watch.daemon = True
        self._watch.start()
        if sys.stderr.isatty():
            self._context.enter_context(bar_below_log())
            self._bar = self._context.enter_context(
                tqdm(
                    total=self.trainer.max_iter,
                    initial=self.trainer.start_iter,
                    unit="step",
                    leave=False,
                    dynamic_ncols=True,
                )
            )

    def after_step(self) -> None:
        self._watch.cancel()
        done = self.trainer.iter + 1
        if self._bar is not None:
            self._bar.update()
        elif done % self.log_period == 0:
            self._pace.postpone()
        elif self._pace.due(done):
            self.logger.info("training: %s", self._pace.text(done))
        if done - self.trainer.start_iter == self.steps:
            self._log_duration()

    def after_train(self) -> None:
        self._watch.cancel()
        self._context.close()

    def _warn(self) -> None:
        self.logger.warning(
            "No batch has come for %.0f s: %s.", _PATIENCE_SECONDS, "; ".join(what_waits())
        )

    def _log_duration(self) -> None:
        # The first steps start workers and choose kernels, so the median is taken.
        seconds = self.trainer.storage.history("time").median(self.steps)
        left = timedelta(seconds=round(seconds * (self.trainer.max_iter - self.trainer.iter - 1)))
        end = datetime.now(timezone.utc) + left
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


def what_waits() -> list[str]:
    """Describe what the main thread and each data worker of this process do at the moment."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    at = traceback.extract_stack(frame)[-1]
    found = [f"this process is in {at.name} ({at.filename}:{at.lineno})"]
    for worker in multiprocessing.active_children():
        try:
            stat = Path(f"/proc/{worker.pid}/stat").read_text()
            state = stat.rpartition(")")[2].split()[0]
            links = [os.readlink(link) for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
        except OSError:
            continue
        files = [link for link in links if link.startswith("/") and Path(link).suffix]
        reads = f", with {files[-1]} open" if files and not files[-1].startswith("/dev") else ""
        found.append(f"data worker {worker.pid} {_STATES.get(state, state)}{reads}")
    if len(found) == 1:
        found.append("there are no data workers")
    return found


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
