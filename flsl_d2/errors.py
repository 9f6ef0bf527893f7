"""The one exception that means "the input is wrong, not the program"."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user supplied cannot be used.

    The message is one sentence that names the offending value, what was expected and what to do.
    Command-line tools print it without a traceback and exit with status 2.
    """
