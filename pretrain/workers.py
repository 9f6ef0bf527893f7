"""Data workers that die, reported with their cause instead of a traceback or an endless wait."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from flsl_d2.errors import InputError

__all__ = ["WorkerLoader", "explain_worker_failure", "keep_quiet_about_lost_trainer"]

_SHARED_MEMORY = "/dev/shm"
_LOADER_SAYS = ("DataLoader worker", "Pin memory thread", "ulimit -n")
_SIGNAL_SECONDS = 5
_LOWER = "lower dataloader.num_workers or dataloader.total_batch_size"


class WorkerLoader(DataLoader):
    """An endless ``DataLoader`` whose workers' failures are one sentence, an :class:`InputError`.

    The death of a worker is noticed at once, also while the training process computes.
    """

    def __iter__(self) -> Iterator[Any]:
        with _explained():
            batches = super().__iter__()
        if self.num_workers:
            _explain_signals()
        while True:
            with _explained():
                batch = next(batches) if self.num_workers == 0 else _received(batches)
            yield batch


def _received(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if "Caught" in str(error):
            raise
        # The worker died while it handed over the batch. Why, says its signal, soon to arrive.
        time.sleep(_SIGNAL_SECONDS)
        raise RuntimeError("DataLoader worker exited unexpectedly") from error


def keep_quiet_about_lost_trainer() -> None:
    """In a worker: no traceback when the training process is gone while it takes over a batch.

    The thread that hands over file descriptors prints one through ``sys.excepthook``, below the
    sentence that says why training has ended.
    """
    hook = sys.excepthook

    def quiet(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            hook(kind, error, trace)

    sys.excepthook = quiet


def explain_worker_failure(message: str) -> str | None:
    """What a message of PyTorch's loader means and what to do, None where it is something else."""
    if not any(said in message for said in _LOADER_SAYS):
        return None
    if "out of shared memory" in message or "shared memory(shm)" in message:
        return (
            f"a data worker ran out of shared memory ({_shared_memory_size()}); give the container "
            f"more (docker run --shm-size=16g, or --ipc=host) or {_LOWER}."
        )
    if "ulimit -n" in message or "Too many open files" in message:
        return (
            "the data workers have too many files open; raise the limit with 'ulimit -n 65536' or "
            f"{_LOWER}."
        )
    if "Caught" in message:  # an exception that travelled from the worker, not its death
        return None
    first_line = message.strip().splitlines()[0].rstrip(". ")
    if "signal: Killed" in message:
        return (
            f"{first_line}, which the system does to the largest process when memory runs out "
            f"(`dmesg` tells); give the job more memory or {_LOWER}, then continue "
            "with --resume."
        )
    return (
        f"{first_line}; what it wrote before it died is above, dataloader.num_workers=0 shows "
        "errors of data where they happen, and --resume continues."
    )


def _shared_memory_size() -> str:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return f"there is no {_SHARED_MEMORY}"
    return f"{_SHARED_MEMORY} has {status.f_blocks * status.f_frsize / 2**30:.3g} GiB"


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        # Raised in a worker: the loader puts the worker's traceback before the sentence.
        if "Caught" not in str(error):
            raise
        sentence = str(error).strip().splitlines()[-1].partition(": ")[2]
        raise InputError(sentence) from None
    except (RuntimeError, OSError) as error:
        # The loader chains what the signal said to a sentence that says less.
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        explanation = explain_worker_failure(f"{error}\n{error.__cause__ or ''}")
        if explanation is None:
            raise
        raise InputError(explanation) from None


def _explain_signals() -> None:
    """Let the handler that PyTorch installed for dying workers raise the sentence, too."""
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or getattr(handler, "explains", False):
        return
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set handlers

    def explaining(signum: int, frame: Any) -> None:
        with _explained():
            handler(signum, frame)

    explaining.explains = True
    signal.signal(signal.SIGCHLD, explaining)
