"""What a detection run consists of, read from a LazyConfig or from a YAML config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import DictConfig, ListConfig
from torch import nn

from flsl_d2.engine.solver import build_yaml_optimizer

__all__ = ["DetectionRun", "lazy_run", "yaml_run"]


@dataclass
class DetectionRun:
    """The settings of a run, and functions that build its parts when they are needed.

    Attributes:
        output_dir: of the run, and the config key that says so.
        weights: file to start from, empty for none.
        max_iter: steps.
        amp: mixed precision, where the device has it.
        ddp: options of DistributedDataParallel.
        checkpoints: ``period`` and ``max_to_keep``.
        eval_period: steps between evaluations, 0 for the end only.
        log_period: steps between lines on the console.
        device: ``cuda`` or ``cpu``.
        seed: negative for a random one.
        total_batch_size: images a step, of all processes.
        train_names: registered data sets to train on.
        test_names: registered data sets to evaluate on.
        build_model: makes the model.
        build_optimizer: makes the optimiser of a model.
        build_train_loader: makes the loader.
        build_scheduler: makes what ``hooks.LRScheduler`` takes, from the optimiser.
        build_tests: makes (name, loader, evaluator) for each data set to evaluate on.
    """

    output_dir: str
    output_key: str
    weights: str
    max_iter: int
    amp: bool
    ddp: dict[str, Any]
    checkpoints: dict[str, int]
    eval_period: int
    log_period: int
    device: str
    seed: int
    total_batch_size: int
    train_names: list[str]
    test_names: list[str]
    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    build_train_loader: Callable[[], Iterable]
    build_scheduler: Callable[[torch.optim.Optimizer], Any]
    build_tests: Callable[[], list[tuple[str, Iterable, DatasetEvaluator]]]


def lazy_run(cfg: DictConfig) -> DetectionRun:
    """A run from a LazyConfig with ``model, dataloader, optimizer, lr_multiplier, train``."""
    train, data = cfg.train, cfg.dataloader

    def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        cfg.optimizer.params.model = model
        return instantiate(cfg.optimizer)

    def build_tests() -> list[tuple[str, Iterable, DatasetEvaluator]]:
        if "evaluator" not in data:
            return []
        if data.evaluator.get("output_dir") is None:
            data.evaluator.output_dir = f"{train.output_dir}/inference"
        name = _names(data.test.dataset.names)[0]
        return [(name, instantiate(data.test), instantiate(data.evaluator))]

    return DetectionRun(
        output_dir=train.output_dir,
        output_key="train.output_dir",
        weights=train.init_checkpoint,
        max_iter=train.max_iter,
        amp=train.amp.enabled,
        ddp=dict(train.ddp),
        checkpoints=dict(train.checkpointer),
        eval_period=train.eval_period,
        log_period=train.log_period,
        device=train.device,
        seed=train.get("seed", -1),
        total_batch_size=data.train.total_batch_size,
        train_names=_names(data.train.dataset.names),
        test_names=_names(data.test.dataset.names),
        build_model=lambda: instantiate(cfg.model).to(train.device),
        build_optimizer=build_optimizer,
        build_train_loader=lambda: instantiate(data.train),
        build_scheduler=lambda _optimizer: instantiate(cfg.lr_multiplier),
        build_tests=build_tests,
    )


def yaml_run(cfg: CfgNode) -> DetectionRun:
    """A run from a YAML config, with the parts that Detectron2's ``DefaultTrainer`` would build."""

    def build_tests() -> list[tuple[str, Iterable, DatasetEvaluator]]:
        folder = f"{cfg.OUTPUT_DIR}/inference"
        return [
            (
                name,
                build_detection_test_loader(cfg, name),
                COCOEvaluator(name, output_dir=folder),
            )
            for name in cfg.DATASETS.TEST
        ]

    return DetectionRun(
        output_dir=cfg.OUTPUT_DIR,
        output_key="OUTPUT_DIR",
        weights=cfg.MODEL.WEIGHTS,
        max_iter=cfg.SOLVER.MAX_ITER,
        amp=cfg.SOLVER.AMP.ENABLED,
        ddp={"broadcast_buffers": False},
        checkpoints={"period": cfg.SOLVER.CHECKPOINT_PERIOD},
        eval_period=cfg.TEST.EVAL_PERIOD,
        log_period=20,
        device=cfg.MODEL.DEVICE,
        seed=cfg.SEED,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        train_names=list(cfg.DATASETS.TRAIN),
        test_names=list(cfg.DATASETS.TEST),
        build_model=lambda: build_model(cfg),
        build_optimizer=lambda model: build_yaml_optimizer(cfg, model),
        build_train_loader=lambda: build_detection_train_loader(cfg),
        build_scheduler=lambda optimizer: build_lr_scheduler(cfg, optimizer),
        build_tests=build_tests,
    )


def _names(names: str | Sequence[str]) -> list[str]:
    return list(names) if isinstance(names, (list, tuple, ListConfig)) else [names]
