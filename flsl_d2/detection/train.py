"""Train and evaluate detectors: the entry of the command line, and the engine of LazyConfigs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, default_writers, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from flsl_d2.detection.checks import (
    CheckedMapper,
    check_batch,
    check_datasets,
    check_test_set,
    describe_model,
    mixed_precision,
    names_of,
)
from flsl_d2.detection.description import write_description
from flsl_d2.detection.own_data import num_classes_key, use_own_data
from flsl_d2.detection.setup import (
    keep_classes,
    load_for_evaluation,
    resume_or_start,
    seed_run,
    start_run,
)
from flsl_d2.detection.yaml_training import load_yaml_config, run_yaml_detection
from flsl_d2.engine.checkpoints import (
    Checkpoints,
    EndedEarly,
    KeepBest,
    LeaveWhenAsked,
    StopEarly,
    StoppableEval,
)
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.engine.first_steps import FirstSteps
from flsl_d2.engine.launch import has_native_bf16, launch, wrap_ddp
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
from flsl_d2.weights import FLSLCheckpointer

logger = logging.getLogger(__name__)

_GROUPS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_MASKS_OFF = "model.roi_heads.mask_in_features=null dataloader.train.mapper.use_instance_mask=false"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def launch_detection(args: argparse.Namespace) -> None:
    """Run the command line's request in as many processes as it asks for.

    Args:
        args: result of :func:`flsl_d2.engine.command_line.tool_argument_parser` with ``eval_only``.

    Raises:
        InputError: see :func:`run_lazy_detection`.
    """
    cfg = _load(args)
    launch(
        run_detection,
        args.num_gpus,
        args.num_machines,
        args.machine_rank,
        args.dist_url,
        args=(args,),
        device=cfg.MODEL.DEVICE if isinstance(cfg, CfgNode) else cfg.train.device,
    )


def run_detection(args: argparse.Namespace) -> None:
    """Train or evaluate in this process, one of possibly several.

    Each process loads the config itself, because a LazyConfig may register data sets and define
    functions, and neither can be sent to another process.
    """
    cfg = _load(args)
    run = run_yaml_detection if isinstance(cfg, CfgNode) else run_lazy_detection
    run(cfg, args.resume, args.eval_only, args.allow_changes, args.overwrite)


def _load(args: argparse.Namespace) -> DictConfig | CfgNode:
    if is_yaml(args.config_file):
        return load_yaml_config(args.config_file, args.opts)
    cfg = load_lazy_config(args.config_file, args.opts)
    missing = [group for group in _GROUPS if group not in cfg]
    if missing:
        raise InputError(
            f"config file {args.config_file!r} has no {', '.join(missing)}, so it is not a "
            "detection config; pre-training configs are for tools/pretrain_net.py."
        )
    return cfg


def run_lazy_detection(
    cfg: DictConfig,
    resume: bool,
    eval_only: bool,
    allow_changes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Train, or only evaluate, in this process, one of possibly several.

    Data sets are checked, and the loader and evaluator of each test set are tried, before
    training starts.

    Args:
        cfg: config with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and ``train``,
            as in ``configs/coco``.
        resume: continue from the last checkpoint in the output folder, where there is one.
        eval_only: evaluate ``train.init_checkpoint`` (with ``resume``: the last checkpoint).
        allow_changes: see :class:`flsl_d2.engine.run_folder.ResumeOptions`.
        overwrite: see :class:`flsl_d2.engine.run_folder.ResumeOptions`.

    Returns:
        The results on the first rank when only evaluating, by test set where there are several;
        else None.

    Raises:
        InputError: the config, data, weights or output folder cannot be used.
        TrainingError: the last checkpoint cannot be written.
        SystemExit: a stop was requested; the status is 75.
    """
    seed = OmegaConf.select(cfg, "train.seed", default=-1)
    options = None if eval_only else ResumeOptions(resume, allow_changes, overwrite)
    prepare_output(Path(cfg.train.output_dir), "train.output_dir", ["flsl_d2"])
    use_own_data(cfg, eval_only)
    start_run(cfg, cfg.train.output_dir, "train.output_dir", seed, options)
    if cfg.train.get("patience") and not cfg.train.get("best_metric"):
        raise InputError(
            f"train.patience is {cfg.train.patience}, but there is no value to watch; set "
            "train.best_metric=bbox/AP, or train.patience=0."
        )
    classes = num_classes_key(cfg)
    check_datasets(
        [] if eval_only else names_of(cfg.dataloader.train.dataset.names),
        _test_names(cfg),
        OmegaConf.select(cfg, classes) if classes else None,
        f"{classes}=",
        _MASKS_OFF if OmegaConf.select(cfg, "model.roi_heads.mask_in_features") else "",
    )
    if not eval_only and comm.is_main_process():  # before objects take the place of the mappers
        write_description(cfg, cfg.train.output_dir)
    for split in ("train", "test"):
        if OmegaConf.select(cfg, f"dataloader.{split}.mapper") is not None:
            node = cfg.dataloader[split]
            node.mapper = CheckedMapper(instantiate(node.mapper))
    if eval_only:
        model = _build_model(cfg)
        checkpointer = FLSLCheckpointer(model, cfg.train.output_dir)
        load_for_evaluation(
            checkpointer, cfg.train.init_checkpoint, resume, "train.init_checkpoint="
        )
        return _evaluate(cfg, wrap_ddp(model, broadcast_buffers=False))
    for name in _test_names(cfg):
        check_test_set(name, partial(_test_set, cfg, name))
    with stop_requests() as request:
        _train(cfg, _build_model(cfg), resume, request)
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
    dtype = _amp_dtype(cfg)
    wrapped = wrap_ddp(model, **_ddp_options(cfg, dtype))
    trainer = _trainer(wrapped, optimizer, dtype)
    checkpointer = FLSLCheckpointer(wrapped, cfg.train.output_dir, trainer=trainer)
    # The data come last: reading COCO's annotations takes longer than finding unusable weights.
    start_iter = resume_or_start(checkpointer, cfg.train.init_checkpoint, resume, trainer)
    if start_iter:
        seed_run(OmegaConf.select(cfg, "train.seed", default=-1), start_iter)
    trim_metrics(Path(cfg.train.output_dir, "metrics.json"), start_iter)
    trainer.data_loader = instantiate(cfg.dataloader.train)
    if comm.is_main_process():
        keep_classes(cfg.train.output_dir, names_of(cfg.dataloader.train.dataset.names)[0])
    trainer.register_hooks(_hooks(cfg, wrapped, checkpointer, request))
    with suppress(EndedEarly):
        trainer.train(start_iter, cfg.train.max_iter)


def _amp_dtype(cfg: DictConfig) -> torch.dtype | None:
    """Return the data type of mixed precision; None for training in float32."""
    if not mixed_precision(cfg.train.amp.enabled, cfg.train.device):
        return None
    name = OmegaConf.select(cfg, "train.amp.dtype", default="float16")
    if name not in _DTYPES:
        raise InputError(f"train.amp.dtype is {name!r}; use {' or '.join(_DTYPES)}.")
    if name == "bfloat16" and not has_native_bf16():
        logger.warning("This GPU emulates bfloat16 and is slow at it; float16 is faster.")
    return _DTYPES[name]


def _ddp_options(cfg: DictConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Arguments of DDP; gradients are sent in float16 only if they are scaled for it."""
    options = dict(cfg.train.ddp)
    if dtype != torch.float16:  # without its scaler, small gradients would vanish
        options["fp16_compression"] = False
    return options


def _trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
) -> SimpleTrainer:
    if dtype is None:
        return SimpleTrainer(model, None, optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    return AMPTrainer(model, None, optimizer, grad_scaler=scaler, precision=dtype)


def _hooks(
    cfg: DictConfig, model: nn.Module, checkpointer: FLSLCheckpointer, request: StopRequest
) -> list[HookBase]:
    """Build the hooks in the order they run: a checkpoint is written before its evaluation."""
    settings = cfg.train
    period, keep = settings.checkpointer.period, settings.checkpointer.get("max_to_keep")
    checkpoints = Checkpoints(checkpointer, period, keep)
    registered = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        checkpoints,
        StoppableEval(settings.eval_period, lambda: _evaluate(cfg, model), checkpoints, request),
    ]
    best = None
    if comm.is_main_process():
        registered.append(FirstSteps(20, "evaluations", logger, settings.log_period))
        if settings.get("best_metric"):
            best = KeepBest(settings.eval_period, checkpointer, settings.best_metric)
            registered.append(best)
        writers = default_writers(settings.output_dir, settings.max_iter)
        if names := OmegaConf.select(cfg, "train.trackers"):
            # The optimizer's node holds the model, which is no setting.
            logged = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "optimizer"])
            writers += build_trackers(names, settings.output_dir, flat_config(logged))
        registered.append(PeriodicWriter(writers, period=settings.log_period))
    if settings.get("patience"):
        registered.append(StopEarly(checkpoints, best, settings.patience))
    return [*registered, LeaveWhenAsked(checkpoints, request)]


def _test_names(cfg: DictConfig) -> list[str]:
    """Names of the test sets; empty where nothing is evaluated."""
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    return names_of(names) if names and "evaluator" in cfg.dataloader else []


def _test_set(cfg: DictConfig, name: str) -> tuple[DataLoader[Any], DatasetEvaluator]:
    """Build the loader and the evaluator of one of the test sets."""
    several = len(_test_names(cfg)) > 1
    # The optimizer's node holds the model, which must not be copied.
    cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "optimizer"])
    cfg.dataloader.test.dataset.names = name
    evaluators = cfg.dataloader.evaluator
    nodes = list(evaluators) if isinstance(evaluators, ListConfig) else [evaluators]
    for node in nodes:
        if several and node.get("output_dir"):
            node.output_dir = f"{node.output_dir}/{name}"
    evaluator = DatasetEvaluators([instantiate(node) for node in nodes])
    return instantiate(cfg.dataloader.test), evaluator


def _test_sets(cfg: DictConfig) -> Iterator[tuple[str, DataLoader[Any], DatasetEvaluator]]:
    for name in _test_names(cfg):
        yield (name, *_test_set(cfg, name))


def _evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Evaluate on each test set; results are nested by name where there are several."""
    results = {}
    dtype = _amp_dtype(cfg) if OmegaConf.select(cfg, "train.amp.evaluation") else None
    for name, loader, evaluator in _test_sets(cfg):
        with torch.autocast("cuda", dtype) if dtype else nullcontext():
            results[name] = inference_on_dataset(model, loader, evaluator)
        logger.info("Results on the test set %s:", name)
        print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results
