"""The folder that a run writes to."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import writable_folder

__all__ = ["prepare_output"]


def prepare_output(folder: Path, key: str, loggers: list[str]) -> None:
    """Make the folder, and send logs to it and to the console.

    Only the main process logs to the console; the others write ``log.txt.rank1`` and so on.

    Args:
        folder: of the run.
        key: of the config that named the folder, for the message.
        loggers: names of loggers of the run, besides those of Detectron2 and fvcore.

    Raises:
        InputError: the folder cannot be written.
    """
    rank = comm.get_rank()
    writable_folder(folder, key)
    for name in ("fvcore", "detectron2", *loggers):
        setup_logger(str(folder), distributed_rank=rank, name=name, abbrev_name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_tells_more_than_a_sentence)


def _tells_more_than_a_sentence(record: logging.LogRecord) -> bool:
    """False for what the tool will say itself, at the end and without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, InputError | TrainingError)
