"""What the log of a run leaves out or words otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from detectron2.utils.logger import setup_logger

from flsl_d2.errors import InputError, TrainingError

# Lines of libraries that a user can do nothing about.
_UNWANTED = ("is_fx_tracing will return true", "Cannot find the hook")


class Readable(logging.Filter):
    """Filter of the log's handlers.

    Left out are tracebacks of errors that the tool reports itself in one sentence, and lines that
    help nobody. The three lines in which Detectron2 prints results become one with their names.
    """

    _task, _names = "", ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is written; its message may be changed."""
        error = record.exc_info[1] if record.exc_info else None
        message = record.getMessage()
        if isinstance(error, InputError | TrainingError) or message.startswith(_UNWANTED):
            return False
        if not message.startswith("copypaste: "):
            return True
        content = message.removeprefix("copypaste: ")
        if content.startswith("Task: "):
            self._task, self._names = content.removeprefix("Task: "), ""
            return False
        if self._task and not self._names:
            self._names = content
            return False
        values = zip(self._names.split(","), content.split(","), strict=False)
        record.msg = f"{self._task}: {', '.join(' '.join(pair) for pair in values)}"
        record.args, self._task = (), ""
        return True


_FX = Readable()


def quiet_libraries() -> None:
    """Leave out the lines that PyTorch's loggers write to the console by themselves."""
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_FX)


def start_log(folder: str | None, rank: int, names: Iterable[str]) -> None:
    """Send logs to a folder, if any, and in the main process to the console, and nowhere else.

    A second run in one process, as in a notebook, takes the place of the first.
    """
    quiet_libraries()
    setup_logger.cache_clear()
    for name in names:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        setup_logger(folder, distributed_rank=rank, name=name, abbrev_name=name)
        for handler in logger.handlers:
            handler.addFilter(Readable())
