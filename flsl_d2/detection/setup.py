"""The start of a detection run: its folder, logs and seed, and a record of the environment."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig

from flsl_d2.engine.run_folder import ResumeOptions, check_and_keep_run, keep_config, prepare_output
from flsl_d2.errors import InputError
from flsl_d2.weights import FLSLCheckpointer

__all__ = [
    "load_for_evaluation",
    "resume_or_start",
    "seed_run",
    "start_run",
]

logger = logging.getLogger(__name__)


def resume_or_start(
    checkpointer: FLSLCheckpointer, weights: str, resume: bool, trainer: TrainerBase
) -> int:
    """Load the last checkpoint with the state of training, or the starting weights alone.

    Args:
        checkpointer: of the run, with its trainer.
        weights: path or URL; empty for random weights.
        resume: prefer the last checkpoint in the output folder.
        trainer: its ``iter`` is set by loading.

    Returns:
        The step to start from.
    """
    found = resume and checkpointer.has_checkpoint()
    if weights or found:
        checkpointer.resume_or_load(weights, resume=resume)
    if found:
        # The checkpoint holds the number of the step that had just been done.
        logger.info("Resuming after step %d.", trainer.iter + 1)
        return trainer.iter + 1
    if resume:
        logger.info("No checkpoint in %s to resume; starting anew.", checkpointer.save_dir)
    if not weights:
        logger.warning("No weights were given: starting from random ones.")
    return 0


def load_for_evaluation(
    checkpointer: FLSLCheckpointer, weights: str, resume: bool, key: str
) -> None:
    """Load what ``--eval-only`` evaluates.

    Args:
        checkpointer: of the model.
        weights: path or URL.
        resume: take the last checkpoint in the output folder instead.
        key: how the config's key for weights is written, for messages.

    Raises:
        InputError: there is nothing to evaluate, only an encoder, or only a part of the model.
    """
    if not weights and not (resume and checkpointer.has_checkpoint()):
        raise InputError(
            f"--eval-only has no weights to evaluate; give {key}DETECTOR.pth, or --resume for the "
            "last checkpoint in the output folder."
        )
    checkpointer.require_whole = True
    checkpointer.resume_or_load(weights, resume=resume)
    if checkpointer.loaded_encoder_only:
        raise InputError(
            f"weights {weights!r} hold an encoder and no detector, so there is nothing to "
            "evaluate; train one first (without --eval-only)."
        )


# PyTorch's loggers of: no GPU while the environment is collected; a function that Detectron2 calls
# and that has a newer name.
_HARMLESS_WARNINGS = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace")

# Keys whose change leaves the result of training as it is.
_MAY_DIFFER = (
    *("train.output_dir", "train.device", "train.log_period", "train.eval_period"),
    "train.max_iter",  # its learning rates are those of lr_multiplier, a key of its own
    *("train.checkpointer.*", "train.init_checkpoint", "dataloader.test.*"),
    *("dataloader.evaluator.*", "dataloader.*.num_workers"),
    *("OUTPUT_DIR", "MODEL.DEVICE", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS", "DATASETS.TEST"),
    *("SOLVER.CHECKPOINT_PERIOD", "TEST.*", "VIS_PERIOD"),
)


def start_run(
    cfg: DictConfig | CfgNode,
    folder: str,
    key: str,
    seed: int,
    options: ResumeOptions | None = None,
) -> None:
    """Make the output folder, send logs there, keep config and environment in it, and seed.

    Stands for Detectron2's ``default_setup``, which prints the environment, the config file and
    the whole config to the console.

    Args:
        cfg: of the run.
        folder: to write to.
        key: of the config that named the folder, for messages.
        seed: see :func:`seed_run`.
        options: of a run that trains, which is compared with what the folder holds.

    Raises:
        InputError: the folder cannot be written, or holds another run.
    """
    prepare_output(Path(folder), key, ["flsl_d2"])
    if options is not None:
        check_and_keep_run(cfg, folder, key, options, _MAY_DIFFER)
    elif comm.is_main_process():
        keep_config(cfg, folder)
    seed_run(seed)
    for name in _HARMLESS_WARNINGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not comm.is_main_process():
        return
    Path(folder, "environment.txt").write_text(collect_env_info() + "\n")
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
