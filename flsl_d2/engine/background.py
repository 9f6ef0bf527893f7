"""Work beside training, a piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


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
