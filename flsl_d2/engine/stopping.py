"""Stop on SIGTERM, SIGUSR1 or Ctrl-C: finish the step, write a checkpoint, exit with status 75."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.utils import comm

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# One request may reach a process twice: from a scheduler that signals all processes of a job, and
# from the parent process that passes the signal on.
_SAME_REQUEST_SECONDS = 0.5
_hook_registered = _listening = False


class Interrupted(BaseException):
    """A request to stop during work that is left at once; see :meth:`StopRequest.interrupting`."""


class StopRequest:
    """Whether this process was asked to stop; a second request ends it at once.

    Attributes:
        signal_name: name of the first signal; empty if there was none.
        step: function that returns the number of the step that is run; None before training, when
            Ctrl-C ends the process as anywhere else.
    """

    def __init__(self, on_first: Callable[[int], None], on_second: Callable[[int], None]) -> None:
        self.signal_name = ""
        self.step: Callable[[], int] | None = None
        self._interrupts = False
        self._on_first, self._on_second = on_first, on_second
        self._since = math.inf
        # Python may run the handler of one signal in the middle of another's; acquiring a lock
        # cannot be interrupted, so it decides which signal came first.
        self._unclaimed = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Context of work, such as an evaluation, that a request ends at once.

        Raises:
            Interrupted: a stop was requested before or meanwhile.
        """
        if self:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        except Exception as error:
            if self:  # another process of the run left first
                raise Interrupted from error
            raise
        finally:
            self._interrupts = False

    def note(self, number: int, _frame: Any = None) -> None:
        if self._unclaimed.acquire(blocking=False):
            self.signal_name, self._since = signal.Signals(number).name, time.monotonic()
            self._on_first(number)
            if self._interrupts:
                self._interrupts = False
                raise Interrupted
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            self._on_second(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record requests to stop, instead of ending the process, in a process that trains.

    Processes forked meanwhile (data workers) ignore the requests, because the step that is being
    finished needs them. Outside the main thread, where Python allows no handlers, nothing is done.
    """
    global _hook_registered, _listening
    request = StopRequest(lambda number: _announce(request, number), _end_at_once)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    if not _hook_registered:
        os.register_at_fork(after_in_child=_ignore_requests)
    _hook_registered = _listening = True
    with _handled(request):
        held = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield request
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            _listening = False


@contextmanager
def signals_held() -> Iterator[None]:
    """Block the signals while processes are started; the processes inherit the block."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def forwarding(processes: Sequence[Any]) -> Iterator[StopRequest]:
    """Pass the first request on to child processes, and kill them at the second."""

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
            # After a request the process is about to exit, and a repeated signal must not change
            # its status. A notebook goes on and keeps its Ctrl-C.
            ignored = request and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)


def _announce(request: StopRequest, number: int) -> None:
    name = signal.Signals(number).name
    if request.step is None and number == signal.SIGINT:
        raise KeyboardInterrupt
    # Logging is not used, because the signal may have interrupted it in the middle of a line.
    if comm.is_main_process():
        step = f"step {request.step()}" if request.step else "the first step"
        os.write(2, f"{name}: saving {step} (again: quit at once)\n".encode())


def _end_at_once(number: int) -> None:
    os._exit(128 + number)


def command_to_resume() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    rest = [text for text in sys.argv[1:] if text not in ("--resume", "--overwrite")]
    return shlex.join([sys.executable, *module, *rest, "--resume"])


def _ignore_requests() -> None:
    """Ignore requests to stop in a data worker, except those that its parent sends."""
    if not _listening:
        return
    # PyTorch replaces a worker's handlers, but not its mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
