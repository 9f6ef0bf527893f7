"""The start of a detection run: folder, logs, seed, environment, and the weights to load."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig

import flsl_d2
from flsl_d2.engine.run_folder import (
    DETECTION_KEYS,
    ResumeOptions,
    check_and_keep_run,
    keep_config,
)
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.weights import FLSLCheckpointer

CLASSES_FILE = "classes.json"
_TO_CLASS_NUMBER = "thing_dataset_id_to_contiguous_id"
logger = logging.getLogger(__name__)


def resume_or_start(
    checkpointer: FLSLCheckpointer, weights: str, resume: bool, trainer: TrainerBase
) -> int:
    """Load the last checkpoint with the state of training, or the starting weights alone.

    Args:
        checkpointer: checkpointer that holds the model and the trainer.
        weights: path or URL; empty for random weights.
        resume: whether the last checkpoint in the output folder is preferred.
        trainer: trainer whose ``iter`` a checkpoint sets.

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
        checkpointer: checkpointer of the model.
        weights: path or URL.
        resume: whether the last checkpoint in the output folder is taken instead.
        key: the config key of the weights as an override begins, for messages.

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


# Loggers of warnings that need no action: no GPU while the environment is collected, and a renamed
# function that Detectron2 calls.
_HARMLESS_WARNINGS = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace")


def start_run(
    cfg: DictConfig | CfgNode,
    folder: str,
    key: str,
    seed: int,
    options: ResumeOptions | None = None,
) -> None:
    """Keep config and environment in the output folder, and seed.

    With ``prepare_output`` it takes the place of Detectron2's ``default_setup``, which prints the
    environment and the whole config to the console.

    Args:
        cfg: config of the run, complete.
        folder: output folder.
        key: the config key of the folder, for messages.
        seed: see :func:`seed_run`.
        options: how a run in the folder is treated; None for an evaluation, which needs no check.

    Raises:
        InputError: the folder holds another run.
    """
    if options is not None:
        check_and_keep_run(cfg, folder, key, options, DETECTION_KEYS)
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


def keep_classes(folder: str, dataset: str) -> None:
    """Keep the classes that a detector learns in its output folder, for prediction.

    Args:
        folder: output folder.
        dataset: registered data set, which has been loaded.
    """
    if not comm.is_main_process():
        return
    metadata = MetadataCatalog.get(dataset)
    names = metadata.get("thing_classes") or metadata.get("stuff_classes") or []
    ids = {number: id_ for id_, number in metadata.get(_TO_CLASS_NUMBER, {}).items()}
    categories = [{"id": ids.get(n, n + 1), "name": name} for n, name in enumerate(names)]
    content = {"version": flsl_d2.__version__, "categories": categories}
    write_text(Path(folder, CLASSES_FILE), json.dumps(content))


def read_kept_classes(folder: Path) -> tuple[list[str], list[int], str] | None:
    """Read the classes that :func:`keep_classes` kept.

    Returns:
        Names, ids in the data set and the version of this project; None where nothing was kept.

    Raises:
        InputError: the file holds something else.
    """
    file = folder / CLASSES_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if isinstance(content, list):  # runs of earlier versions kept names alone
            return [str(name) for name in content], list(range(1, len(content) + 1)), ""
        categories = content["categories"]
        ids = [int(each["id"]) for each in categories]
        return [str(each["name"]) for each in categories], ids, str(content["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{file}' holds no classes ({type(error).__name__}: {error}); restore it."
        ) from error


def seed_run(seed: int, start_iter: int = 0) -> None:
    """Seed Python, NumPy and PyTorch, each rank differently.

    Args:
        seed: seed of the run; negative for a random one.
        start_iter: first step of a resumed run; it changes the seed, because Detectron2's sampler
            starts at its beginning and would repeat the images of the first steps.
    """
    seed_all_rng(None if seed < 0 else seed + comm.get_rank() + 1000 * start_iter)
    torch.backends.cudnn.benchmark = False  # images of many sizes
