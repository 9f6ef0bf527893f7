"""Stopping on SIGTERM or SIGUSR1: finish the step, write a checkpoint, exit with status 75."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.utils import comm

__all__ = ["STOPPED", "StopRequest", "agreed_by_all", "forwarding", "signals_held", "stop_requests"]

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# One request may reach a process twice: from a scheduler that signals all processes of a job, and
# from the process that leads it.
_SAME_REQUEST_SECONDS = 0.5
_listening = False


class StopRequest:
    """Whether this process was asked to stop; a second request ends it at once.

    Attributes:
        signal_name: of the first signal; empty as long as there was none.
    """

    def __init__(self, on_first: Callable[[int], None], on_second: Callable[[int], None]) -> None:
        self.signal_name = ""
        self._on_first, self._on_second = on_first, on_second
        self._since = math.inf
        # Python runs the handler of one signal in the middle of another's, so the one that comes
        # first is told by what cannot be interrupted.
        self._unclaimed = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    def note(self, number: int, _frame: Any = None) -> None:
        """The handler of the signals."""
        if self._unclaimed.acquire(blocking=False):
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            self._on_first(number)
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            self._on_second(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """In a process that trains: note requests to stop instead of dying from them.

    Processes forked meanwhile (data workers) take no notice, as they are needed for the step that
    is being finished. Does nothing outside the main thread, where Python allows no handlers.
    """
    global _listening
    request = StopRequest(_announce, lambda number: os._exit(128 + number))
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    _listening = True
    with _handled(request):
        held = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield request
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            _listening = False


def agreed_by_all(request: StopRequest) -> bool:
    """Whether any rank was asked to stop; the same answer on all, which all must ask for."""
    return any(comm.all_gather(bool(request)))


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold the signals back while processes are started that inherit this, until they are ready."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def forwarding(processes: Sequence[Any]) -> Iterator[StopRequest]:
    """In a process that leads others: pass the first request on to them, kill them at the second.

    Args:
        processes: those of ``multiprocessing``.
    """

    def send(number: int) -> None:
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def end(number: int) -> None:
        send(signal.SIGKILL)
        os._exit(128 + number)

    request = StopRequest(send, end)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _handled(request):
        yield request


@contextmanager
def _handled(request: StopRequest) -> Iterator[None]:
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # After a request the process is about to leave, with a status that a late echo of the
            # request must not change.
            signal.signal(number, signal.SIG_IGN if request else handler)


def _announce(number: int) -> None:
    # Not through logging: its stream may be in the middle of a line of the code interrupted here.
    if comm.is_main_process():
        name = signal.Signals(number).name
        text = f"{name}: finishing the step, then a checkpoint; a second signal exits at once\n"
        os.write(2, text.encode())


def _take_no_notice() -> None:
    """In a data worker: ignore requests to stop, but end when the parent itself says so."""
    if not _listening:
        return
    # PyTorch replaces a worker's handlers, but not its mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_take_no_notice)
