"""Training and evaluating a detector from a YAML config, on Detectron2's DefaultTrainer."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    hooks,
)
from detectron2.modeling import build_model
from torch import nn

from flsl_d2.data.mapper import FLSLDatasetMapper
from flsl_d2.detection.checks import check_batch, check_datasets, describe_model, mixed_precision
from flsl_d2.detection.coco_evaluator import FLSLCOCOEvaluator
from flsl_d2.detection.own_data import num_classes_yaml, use_own_data_yaml
from flsl_d2.detection.setup import load_for_evaluation, resume_or_start, seed_run, start_run
from flsl_d2.detection.solver import build_yaml_optimizer
from flsl_d2.engine.checkpoints import Checkpoints, LeaveWhenAsked
from flsl_d2.engine.launch import wrap_ddp
from flsl_d2.engine.run_folder import PeriodicWriter, ResumeOptions, trim_metrics
from flsl_d2.engine.stopping import StopRequest, stop_requests
from flsl_d2.weights import FLSLCheckpointer

__all__ = ["DetectionTrainer", "run_yaml_detection"]


class DetectionTrainer(DefaultTrainer):
    """DefaultTrainer with COCO's evaluator, safe checkpoints, AdamW, and CPU processes.

    Its ``__init__`` is written out because the inherited one assumes GPUs, reads the data before
    it looks at the weights, and makes a checkpointer of its own.
    """

    def __init__(self, cfg: CfgNode, request: StopRequest) -> None:
        TrainerBase.__init__(self)
        self.cfg, self.request = cfg, request
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = wrap_ddp(model, broadcast_buffers=False)
        amp = mixed_precision(cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE)
        self._trainer = (AMPTrainer if amp else SimpleTrainer)(model, None, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = FLSLCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load weights as DefaultTrainer does, then open the data."""
        self.start_iter = resume_or_start(self.checkpointer, self.cfg.MODEL.WEIGHTS, resume, self)
        if self.start_iter:
            seed_run(self.cfg.SEED, self.start_iter)
        trim_metrics(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)
        self._trainer.data_loader = self.build_train_loader(self.cfg)

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's, with checkpoints that are whole or absent, and a way to stop."""
        checkpoints = Checkpoints(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        registered: list[HookBase] = []
        for hook in super().build_hooks():
            if isinstance(hook, hooks.EvalHook):  # a checkpoint is written before its evaluation
                registered.append(checkpoints)
            if isinstance(hook, hooks.PeriodicWriter):
                hook = PeriodicWriter(hook._writers, hook._period)
            if not isinstance(hook, hooks.PeriodicCheckpointer):
                registered.append(hook)
        return [*registered, LeaveWhenAsked(checkpoints, self.request)]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device, described in one line."""
        model = build_model(cfg)
        describe_model(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`flsl_d2.detection.solver.build_yaml_optimizer`."""
        return build_yaml_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's loader, on the project's reader of images."""
        return build_detection_train_loader(cfg, mapper=FLSLDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's loader, on the project's reader of images."""
        mapper = FLSLDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> FLSLCOCOEvaluator:
        """COCO's evaluator, with results in ``OUTPUT_DIR/inference``."""
        return FLSLCOCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def run_yaml_detection(
    cfg: CfgNode,
    resume: bool,
    eval_only: bool,
    allow_changes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, or only evaluate, in this process, one of possibly several.

    Args:
        cfg: from :func:`flsl_d2.engine.config_files.load_yaml_config`.
        resume: continue from the last checkpoint in the output folder, where there is one.
        eval_only: evaluate ``MODEL.WEIGHTS`` (with ``resume``: the last checkpoint).
        allow_changes: see :class:`flsl_d2.engine.run_folder.ResumeOptions`.
        overwrite: likewise.

    Returns:
        The evaluator's results when only evaluating, else None.

    Raises:
        InputError: the config, data, weights or output folder cannot be used.
        TrainingError: the last checkpoint cannot be written.
        SystemExit: of status 75, after a request to stop.
    """
    options = None if eval_only else ResumeOptions(resume, allow_changes, overwrite)
    start_run(cfg, cfg.OUTPUT_DIR, "OUTPUT_DIR", cfg.SEED, options)
    use_own_data_yaml(cfg, eval_only)
    classes, num_classes = num_classes_yaml(cfg)
    check_datasets(
        [] if eval_only else cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        num_classes,
        f"{classes} ",
        "MODEL.MASK_ON False" if cfg.MODEL.MASK_ON else "",
    )
    if eval_only:
        model = DetectionTrainer.build_model(cfg)
        checkpointer = FLSLCheckpointer(model, cfg.OUTPUT_DIR)
        load_for_evaluation(checkpointer, cfg.MODEL.WEIGHTS, resume, "MODEL.WEIGHTS ")
        return DetectionTrainer.test(cfg, wrap_ddp(model, broadcast_buffers=False))
    check_batch(cfg.SOLVER.IMS_PER_BATCH, "SOLVER.IMS_PER_BATCH")
    with stop_requests() as request:
        trainer = DetectionTrainer(cfg, request)
        trainer.resume_or_load(resume)
        trainer.train()
    return None
