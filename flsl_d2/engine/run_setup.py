"""The start of a detection run: a folder that can be written, logs, seeds, and a record of both."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from flsl_d2.errors import InputError

__all__ = ["prepare_output", "seed_run"]

logger = logging.getLogger(__name__)


def prepare_output(folder: str, cfg: DictConfig | CfgNode) -> None:
    """Make the output folder, send logs there, and keep the config and the environment in it.

    Logs go to ``log.txt`` and the console; other ranks than 0 have files of their own. Detectron2's
    ``default_setup`` prints the environment, the config file and the whole config instead.

    Raises:
        InputError: the folder cannot be made or written.
    """
    path = Path(folder)
    if comm.is_main_process():
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise InputError(
                f"the output folder {folder!r} cannot be written ({error.strerror}); set "
                "train.output_dir (YAML: OUTPUT_DIR) to a folder of yours."
            ) from error
    comm.synchronize()
    for name in ("fvcore", "detectron2", "flsl_d2"):
        setup_logger(folder, distributed_rank=comm.get_rank(), name=name)
    if not comm.is_main_process():
        return
    (path / "environment.txt").write_text(collect_env_info() + "\n")
    if isinstance(cfg, CfgNode):
        (path / "config.yaml").write_text(cfg.dump())
    else:
        LazyConfig.save(cfg, os.fspath(path / "config.yaml"))
    logger.info(
        "Output in %s (log.txt, config.yaml, environment.txt, metrics.json); %d process(es).",
        folder,
        comm.get_world_size(),
    )


def seed_run(seed: int, start_iter: int = 0) -> None:
    """Seed Python, NumPy and PyTorch, each rank differently.

    Args:
        seed: negative for a fresh one.
        start_iter: step that a resumed run starts from; Detectron2's sampler always starts at its
            beginning, and another seed keeps a resumed run from seeing the same images again.
    """
    seed_all_rng(None if seed < 0 else seed + comm.get_rank() + 1000 * start_iter)
    torch.backends.cudnn.benchmark = False  # images of many sizes
