"""Train and evaluate a detector from a YAML config, on Detectron2's ``DefaultTrainer``."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from flsl_d2.annotations.mapper import FLSLDatasetMapper
from flsl_d2.detection.checks import (
    CheckedMapper,
    check_batch,
    check_datasets,
    check_test_set,
    describe_model,
    mixed_precision,
)
from flsl_d2.detection.coco_evaluator import FLSLCOCOEvaluator
from flsl_d2.detection.setup import (
    keep_classes,
    load_for_evaluation,
    resume_or_start,
    seed_run,
    start_run,
)
from flsl_d2.detection.solver import add_solver_config, build_yaml_optimizer
from flsl_d2.engine.checkpoints import Checkpoints, LeaveWhenAsked, StoppableEval
from flsl_d2.engine.config_files import resolve_config_path
from flsl_d2.engine.first_steps import FirstSteps
from flsl_d2.engine.overrides import unknown_keys_error
from flsl_d2.engine.run_folder import (
    PeriodicWriter,
    ResumeOptions,
    flat_config,
    prepare_output,
    trim_metrics,
)
from flsl_d2.engine.stopping import StopRequest, stop_requests
from flsl_d2.engine.trackers import build_trackers
from flsl_d2.errors import InputError
from flsl_d2.files import expand_home
from flsl_d2.modeling import add_flsl_config
from flsl_d2.weights import FLSLCheckpointer

logger = logging.getLogger(__name__)

# The node that holds the number of classes of an architecture.
_CLASSES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "SemanticSegmentor": "SEM_SEG_HEAD",
}
# Exceptions of yacs for files and values that it cannot take.
_YAML_ERRORS = (
    *(yaml.YAMLError, AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError),
)


def load_yaml_config(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Load a YAML config over Detectron2's defaults and this project's nodes.

    Args:
        path: config file; see :func:`flsl_d2.engine.config_files.resolve_config_path`. Tags that
            run code are refused.
        overrides: ``[KEY, VALUE, KEY, VALUE, ...]``.

    Raises:
        InputError: a missing or broken file, an unknown key, or a value of another type than the
            one it replaces.
    """
    path = resolve_config_path(path)
    cfg = get_cfg()
    add_flsl_config(cfg)
    add_solver_config(cfg)
    cfg.TRAIN = CfgNode({"TRACKERS": []})  # train.trackers of a LazyConfig
    odd = next((key for key in overrides[::2] if "=" in key), None)
    if odd is not None or len(overrides) % 2:
        raise InputError(
            f"overrides of a YAML config are pairs KEY VALUE, but {odd or overrides[-1]!r} is not "
            "followed by a value; write for example SOLVER.MAX_ITER 100."
        )
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
        cfg.merge_from_list([expand_home(text) for text in overrides])
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split()).strip("\"'")
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason)
        if unknown:
            raise unknown_keys_error([unknown[1]], list(_key_paths(cfg)), f" ({path})") from error
        raise InputError(
            f"config file {path!r} with its overrides cannot be used: {reason}; correct it."
        ) from error
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = expand_home(cfg.MODEL.WEIGHTS), expand_home(cfg.OUTPUT_DIR)
    return cfg


def _key_paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _key_paths(value, f"{prefix}{key}.")


class DetectionTrainer(DefaultTrainer):
    """Detectron2's trainer with AdamW, COCO's evaluator, safe checkpoints, and stopping on request.

    Args:
        cfg: config from :func:`load_yaml_config`.
        request: whether this process was asked to stop.
    """

    def __init__(self, cfg: CfgNode, request: StopRequest) -> None:
        self.request = request
        super().__init__(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint with the state of training, or the starting weights."""
        self.start_iter = resume_or_start(self.checkpointer, self.cfg.MODEL.WEIGHTS, resume, self)
        if self.start_iter:
            # The sampler starts at its beginning: another seed gives another order of images.
            seed_run(self.cfg.SEED, self.start_iter)
        self._trainer.data_loader = self._training_loader(self.cfg)
        keep_classes(self.cfg.OUTPUT_DIR, self.cfg.DATASETS.TRAIN[0])
        trim_metrics(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)

    def build_hooks(self) -> list[HookBase]:
        """Replace Detectron2's checkpoints by ones that are whole or absent; stop on request."""
        self.checkpointer = FLSLCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        checkpoints = Checkpoints(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        registered: list[HookBase] = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.EvalHook):  # a checkpoint is written before its evaluation
                registered.append(checkpoints)
                hook = StoppableEval(hook._period, hook._func, checkpoints, self.request)
            if isinstance(hook, hooks.PeriodicWriter):
                trackers = build_trackers(
                    self.cfg.TRAIN.TRACKERS, self.cfg.OUTPUT_DIR, flat_config(self.cfg)
                )
                hook = PeriodicWriter([*hook._writers, *trackers], hook._period)
            if not isinstance(hook, hooks.PeriodicCheckpointer):
                registered.append(hook)
        if comm.is_main_process():
            registered.append(FirstSteps(20, "evaluations", logger))
        return [*registered, LeaveWhenAsked(checkpoints, self.request)]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model and describe it in one line."""
        model = build_model(cfg)
        describe_model(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimiser; see :func:`flsl_d2.detection.solver.build_yaml_optimizer`."""
        return build_yaml_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader[Any] | None:
        """Build nothing yet: the loader depends on the step that :meth:`resume_or_load` finds."""
        return None

    @staticmethod
    def _training_loader(cfg: CfgNode) -> DataLoader[Any]:
        """Build Detectron2's loader on the project's reader of images."""
        mapper = CheckedMapper(FLSLDatasetMapper(cfg, is_train=True))
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_set(cls, cfg: CfgNode, name: str) -> tuple[DataLoader[Any], DatasetEvaluator]:
        """Build the loader and the evaluator of a test set."""
        return cls.build_test_loader(cfg, name), cls.build_evaluator(cfg, name)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader[Any]:
        """Build Detectron2's loader on the project's reader of images."""
        mapper = CheckedMapper(FLSLDatasetMapper(cfg, is_train=False))
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> FLSLCOCOEvaluator:
        """Build COCO's evaluator, which writes to a folder of the test set below ``inference``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return FLSLCOCOEvaluator(dataset_name, output_dir=folder)


def run_yaml_detection(
    cfg: CfgNode,
    resume: bool,
    eval_only: bool,
    allow_changes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, or only evaluate, in this process, from a YAML config.

    The arguments are those of :func:`flsl_d2.detection.train.run_lazy_detection`.

    Returns:
        The evaluator's results when only evaluating, else None.

    Raises:
        InputError: the config, data, weights or output folder cannot be used.
        TrainingError: the last checkpoint cannot be written.
        SystemExit: a stop was requested; the status is 75.
    """
    if comm.get_world_size() > 1 and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise InputError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r} with {comm.get_world_size()} processes, and a "
            "YAML config runs in one process there; give --num-gpus 1, or a LazyConfig .py."
        )
    options = None if eval_only else ResumeOptions(resume, allow_changes, overwrite)
    prepare_output(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR", ["flsl_d2"])
    start_run(cfg, cfg.OUTPUT_DIR, "OUTPUT_DIR", cfg.SEED, options)
    classes = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
    check_datasets(
        [] if eval_only else cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        cfg.MODEL[classes].NUM_CLASSES if classes else None,
        f"MODEL.{classes}.NUM_CLASSES ",
        "MODEL.MASK_ON False" if cfg.MODEL.MASK_ON else "",
    )
    if eval_only:
        model = DetectionTrainer.build_model(cfg)
        checkpointer = FLSLCheckpointer(model, cfg.OUTPUT_DIR)
        load_for_evaluation(checkpointer, cfg.MODEL.WEIGHTS, resume, "MODEL.WEIGHTS ")
        return DetectionTrainer.test(cfg, model)
    check_batch(cfg.SOLVER.IMS_PER_BATCH, "SOLVER.IMS_PER_BATCH")
    for name in cfg.DATASETS.TEST:
        check_test_set(name, partial(DetectionTrainer.build_test_set, cfg, name))
    cfg.SOLVER.AMP.ENABLED = mixed_precision(cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE)
    with stop_requests() as request:
        trainer = DetectionTrainer(cfg, request)
        trainer.resume_or_load(resume)
        trainer.train()
    return None
