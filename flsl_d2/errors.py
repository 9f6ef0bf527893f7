"""Exceptions whose message is all that a user needs."""

from __future__ import annotations


class _SentenceError(Exception):
    """Base of errors whose message is one sentence.

    PyTorch raises the error of a data worker again with the worker's traceback as its message;
    only the sentence at its end is kept.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught "):
            message = message.rpartition(f".{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class InputError(_SentenceError, ValueError):
    """Something the user supplied cannot be used.

    The message is one sentence that names the offending value, what was expected and what to do.
    Command-line tools print it without a traceback and exit with status 2.
    """


class TrainingError(_SentenceError, RuntimeError):
    """Training that had begun cannot go on: numbers that are not finite, a disk that is full.

    The message says what happened, what is safe and what to do. Command-line tools print it
    without a traceback and exit with status 3.
    """


class MachineError(TrainingError):
    """The machine failed, and not the file that it was reading: no file may be blamed for it.

    Too many open files, no permission, a disk or mount that answers with errors, no memory.
    """
