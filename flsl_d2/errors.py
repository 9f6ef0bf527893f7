"""Exceptions whose message is all that a user needs."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user supplied cannot be used.

    The message is one sentence that names the offending value, what was expected and what to do.
    Command-line tools print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training that had begun cannot go on: numbers that are not finite, a disk that is full.

    The message says what happened, what is safe and what to do. Command-line tools print it
    without a traceback and exit with status 3.
    """
