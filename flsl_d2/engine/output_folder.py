"""The folder that a run writes to."""

from __future__ import annotations

import tempfile
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from flsl_d2.errors import InputError

__all__ = ["prepare_output"]


def prepare_output(cfg: DictConfig | CfgNode, folder: Path, key: str, loggers: list[str]) -> None:
    """Make the folder, keep the config in it, and send logs to it and to the console.

    Only the main process logs to the console; the others write ``log.txt.rank1`` and so on.

    Args:
        cfg: written to ``config.yaml``.
        folder: of the run.
        key: of the config that named the folder, for the message.
        loggers: names of loggers of the run, besides those of Detectron2 and fvcore.

    Raises:
        InputError: the folder cannot be written.
    """
    rank = comm.get_rank()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # saving a LazyConfig logs failures and goes on
            pass
        if rank == 0:
            if isinstance(cfg, CfgNode):
                (folder / "config.yaml").write_text(cfg.dump())
            else:
                LazyConfig.save(cfg, str(folder / "config.yaml"))
    except OSError as error:
        raise InputError(
            f"{key} is '{folder}', which cannot be written ({error.strerror}); set it to a folder "
            "of yours."
        ) from error
    for name in ("fvcore", "detectron2", *loggers):
        setup_logger(str(folder), distributed_rank=rank, name=name, abbrev_name=name)
