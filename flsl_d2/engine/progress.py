"""Signs of life of long work: a bar on a terminal, lines in a log.

The first line comes with the fifth item or after ten seconds, whichever is earlier; the time
between two lines then doubles up to a minute.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

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
