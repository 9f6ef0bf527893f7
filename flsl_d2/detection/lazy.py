"""Training and evaluating a detector from a LazyConfig."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from flsl_d2.detection.checks import (
    check_batch,
    check_datasets,
    describe_model,
    mixed_precision,
    names_of,
)
from flsl_d2.detection.own_data import num_classes_key, use_own_data
from flsl_d2.detection.setup import load_for_evaluation, resume_or_start, seed_run, start_run
from flsl_d2.engine.checkpoints import Checkpoints, LeaveWhenAsked
from flsl_d2.engine.launch import wrap_ddp
from flsl_d2.engine.run_folder import PeriodicWriter, ResumeOptions, trim_metrics
from flsl_d2.engine.stopping import StopRequest, stop_requests
from flsl_d2.errors import InputError
from flsl_d2.weights import FLSLCheckpointer

__all__ = ["run_lazy_detection"]

logger = logging.getLogger(__name__)

_MASKS_OFF = "model.roi_heads.mask_in_features=null dataloader.train.mapper.use_instance_mask=false"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def run_lazy_detection(
    cfg: DictConfig,
    resume: bool,
    eval_only: bool,
    allow_changes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, or only evaluate, in this process, one of possibly several.

    Everything that can be wrong with the input is found before the first step.

    Args:
        cfg: with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``, as in
            ``configs/coco``.
        resume: continue from the last checkpoint in the output folder, where there is one.
        eval_only: evaluate ``train.init_checkpoint`` (with ``resume``: the last checkpoint).
        allow_changes: see :class:`flsl_d2.engine.run_folder.ResumeOptions`.
        overwrite: likewise.

    Returns:
        The evaluator's results on the first rank when only evaluating, else None.

    Raises:
        InputError: the config, data, weights or output folder cannot be used.
        TrainingError: the last checkpoint cannot be written.
        SystemExit: of status 75, after a request to stop.
    """
    seed = OmegaConf.select(cfg, "train.seed", default=-1)
    options = None if eval_only else ResumeOptions(resume, allow_changes, overwrite)
    start_run(cfg, cfg.train.output_dir, "train.output_dir", seed, options)
    use_own_data(cfg, eval_only)
    test = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    train = [] if eval_only else names_of(cfg.dataloader.train.dataset.names)
    classes = num_classes_key(cfg)
    check_datasets(
        train,
        names_of(test) if test else [],
        OmegaConf.select(cfg, classes) if classes else None,
        f"{classes}=",
        _MASKS_OFF if OmegaConf.select(cfg, "model.roi_heads.mask_in_features") else "",
    )
    model = _build_model(cfg)
    if eval_only:
        checkpointer = FLSLCheckpointer(model, cfg.train.output_dir)
        load_for_evaluation(
            checkpointer, cfg.train.init_checkpoint, resume, "train.init_checkpoint="
        )
        return _evaluate(cfg, wrap_ddp(model, broadcast_buffers=False))
    with stop_requests() as request:
        _train(cfg, model, resume, request)
    return None


def _build_model(cfg: DictConfig) -> nn.Module:
    try:
        model = instantiate(cfg.model)
    except TypeError as error:  # a key that was added with + and that nothing takes
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(f"the model's config has a key that nothing takes: {error}.") from error
    model.to(cfg.train.device)
    describe_model(model)
    return model


def _train(cfg: DictConfig, model: nn.Module, resume: bool, request: StopRequest) -> None:
    check_batch(cfg.dataloader.train.total_batch_size, "dataloader.train.total_batch_size")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    wrapped = wrap_ddp(model, **cfg.train.ddp)
    trainer = _trainer(cfg, wrapped, optimizer)
    checkpointer = FLSLCheckpointer(wrapped, cfg.train.output_dir, trainer=trainer)
    # The data come last: reading COCO's annotations takes longer than finding unusable weights.
    start_iter = resume_or_start(checkpointer, cfg.train.init_checkpoint, resume, trainer)
    if start_iter:
        seed_run(OmegaConf.select(cfg, "train.seed", default=-1), start_iter)
    trim_metrics(Path(cfg.train.output_dir, "metrics.json"), start_iter)
    trainer.data_loader = instantiate(cfg.dataloader.train)
    trainer.register_hooks(_hooks(cfg, wrapped, checkpointer, request))
    trainer.train(start_iter, cfg.train.max_iter)


def _trainer(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    if not mixed_precision(cfg.train.amp.enabled, cfg.train.device):
        return SimpleTrainer(model, None, optimizer)
    dtype = OmegaConf.select(cfg, "train.amp.dtype", default="float16")
    if dtype not in _DTYPES:
        raise InputError(f"train.amp.dtype is {dtype!r}; use {' or '.join(_DTYPES)}.")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    return AMPTrainer(model, None, optimizer, grad_scaler=scaler, precision=_DTYPES[dtype])


def _hooks(
    cfg: DictConfig, model: nn.Module, checkpointer: FLSLCheckpointer, request: StopRequest
) -> list[Any]:
    """In the order in which they run: a checkpoint is written before its evaluation."""
    settings = cfg.train
    period, keep = settings.checkpointer.period, settings.checkpointer.get("max_to_keep")
    checkpoints = Checkpoints(checkpointer, period, keep)
    registered = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        checkpoints,
        hooks.EvalHook(settings.eval_period, lambda: _evaluate(cfg, model)),
    ]
    if comm.is_main_process():
        writers = default_writers(settings.output_dir, settings.max_iter)
        registered.append(PeriodicWriter(writers, period=settings.log_period))
    return [*registered, LeaveWhenAsked(checkpoints, request)]


def _evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any] | None:
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results
