"""What a detection config of either kind says about a run, and the start of its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

import flsl_d2
from flsl_d2.engine.run_folder import (
    DETECTION_KEYS,
    ResumeOptions,
    check_and_keep_run,
    keep_config,
)
from flsl_d2.errors import InputError
from flsl_d2.files import write_text

CLASSES_FILE = "classes.json"
_TO_CLASS_NUMBER = "thing_dataset_id_to_contiguous_id"
# Loggers of warnings that need no action: no GPU while the environment is collected, and a renamed
# function that Detectron2 calls.
_HARMLESS_WARNINGS = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace")

logger = logging.getLogger(__name__)


@dataclass
class Detection:
    """A run of a detection config, which is a LazyConfig or a YAML config.

    Attributes:
        cfg: the config, complete.
        keys: config keys as overrides begin: of ``output``, ``weights``, ``batch`` and
            ``classes``; ``masks_off`` is the overrides that remove the model's masks, or empty.
        num_classes: of the model; None where it has no such number.
        precision: of mixed precision; None for float32.
        evaluation_precision: the same for evaluation.
        prepare: called when the config is kept and the data sets are checked.
        image_format: format in which pictures are read; empty for any.
        ddp: arguments of DistributedDataParallel.
    """

    cfg: DictConfig | CfgNode
    keys: dict[str, str]
    output_dir: str
    seed: int
    device: str
    weights: str
    train_names: Sequence[str]
    test_names: Sequence[str]
    num_classes: int | None
    batch_size: int
    max_iter: int
    eval_period: int
    checkpoint_period: int
    trackers: Sequence[str]
    precision: torch.dtype | None
    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    build_scheduler: Callable[[torch.optim.Optimizer], Any]
    build_train_loader: Callable[[], DataLoader[Any]]
    build_test_set: Callable[[str], tuple[DataLoader[Any], DatasetEvaluator]]
    prepare: Callable[[], None] = lambda: None
    evaluation_precision: torch.dtype | None = None
    keep_last: int | None = None
    log_period: int = 20
    best_metric: str = ""
    patience: int = 0
    image_format: str = ""
    ddp: dict[str, Any] = field(default_factory=lambda: {"broadcast_buffers": False})


def start_run(run: Detection, options: ResumeOptions | None) -> None:
    """Keep config and environment in the output folder, and seed.

    With ``prepare_output`` it takes the place of Detectron2's ``default_setup``, which prints the
    environment and the whole config to the console. ``options`` say how a run in the folder is
    treated; an evaluation has none, and needs no check.
    """
    if options is not None:
        check_and_keep_run(run.cfg, run.output_dir, run.keys["output"], options, DETECTION_KEYS)
    elif comm.is_main_process():
        keep_config(run.cfg, run.output_dir)
    seed_run(run.seed)
    for name in _HARMLESS_WARNINGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if comm.is_main_process():
        Path(run.output_dir, "environment.txt").write_text(collect_env_info() + "\n")
        logger.info(
            "Output in %s (log.txt, config.yaml, environment.txt, metrics.json); %d process(es).",
            run.output_dir,
            comm.get_world_size(),
        )


def seed_run(seed: int, start_iter: int = 0) -> None:
    """Seed Python, NumPy and PyTorch, each rank differently; a negative seed is a random one.

    The step of a resumed run changes the seed, because Detectron2's sampler starts at its
    beginning and would repeat the images of the first steps.
    """
    seed_all_rng(None if seed < 0 else seed + comm.get_rank() + 1000 * start_iter)
    # Images have many sizes, and cuDNN's attention would plan anew for each of them.
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_classes(folder: str, dataset: str) -> None:
    """Keep the classes of a registered and loaded data set for prediction, on the first rank."""
    if not comm.is_main_process():
        return
    metadata = MetadataCatalog.get(dataset)
    names = metadata.get("thing_classes") or metadata.get("stuff_classes") or []
    ids = {number: id_ for id_, number in metadata.get(_TO_CLASS_NUMBER, {}).items()}
    categories = [{"id": ids.get(n, n + 1), "name": name} for n, name in enumerate(names)]
    content = {"version": flsl_d2.__version__, "categories": categories}
    write_text(Path(folder, CLASSES_FILE), json.dumps(content))


def read_kept_classes(folder: Path) -> tuple[list[str], list[int], str] | None:
    """Read the names, the ids and the version that :func:`keep_classes` kept; None without any."""
    file = folder / CLASSES_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        categories = content["categories"]
        ids = [int(each["id"]) for each in categories]
        return [str(each["name"]) for each in categories], ids, str(content["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{file}' holds no classes ({type(error).__name__}: {error}); restore it."
        ) from error
