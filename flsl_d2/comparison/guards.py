"""What keeps a folder of jobs consistent: one run at a time, and an orderly end."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder

__all__ = ["SIGNALS", "locked", "signals_interrupt"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep other runs out of the folder.

    The jobs' processes inherit the lock: it holds while one of them lives, even where this process
    was killed and they were not.
    """
    with (writable_folder(folder) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process, or a job that one left behind, works in '{folder}'; wait for "
                "it, end it, or name another --output."
            ) from error
        yield file.fileno()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM, as cluster schedulers send it, is like Ctrl-C; both work in the background, too."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before: list[tuple[int, Callable | int | None]] = [
        (number, signal.signal(number, interrupt)) for number in SIGNALS
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
