"""Train and evaluate detectors: one loop for LazyConfigs and for YAML configs."""

from __future__ import annotations

import argparse
import logging
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
    check_datasets,
    names_of,
    num_classes_key,
    reason_of,
    use_own_data,
)
from flsl_d2.detection.model_folder import write_description
from flsl_d2.detection.setup import Detection, keep_classes, seed_run, start_run
from flsl_d2.detection.yaml_training import load_yaml_config, yaml_detection
from flsl_d2.engine.checkpoints import (
    Checkpoints,
    EndedEarly,
    KeepBest,
    LeaveWhenAsked,
    StopEarly,
    StoppableEval,
)
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.engine.launch import has_native_bf16, launch, wrap_ddp
from flsl_d2.engine.progress import FirstSteps
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
_KEYS = {
    "output": "train.output_dir",
    "weights": "train.init_checkpoint=",
    "batch": "dataloader.train.total_batch_size",
}


def launch_detection(args: argparse.Namespace) -> None:
    """Run a command line of ``tool_argument_parser`` in as many processes as it asks for."""
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
    cfg: DictConfig, resume: bool, eval_only: bool, *resume_options: bool
) -> dict[str, Any] | None:
    """Train, or only evaluate, in this process, one of possibly several.

    Data sets are checked, and the loader and evaluator of each test set are tried, before training
    starts.

    Args:
        cfg: config as in ``configs/coco``.
        resume: continue from the last checkpoint in the output folder, where there is one.
        eval_only: evaluate ``train.init_checkpoint`` (with ``resume``: the last checkpoint).
        *resume_options: ``allow_changes`` and ``overwrite`` of
            :class:`flsl_d2.engine.run_folder.ResumeOptions`.

    Returns:
        The results on the first rank when only evaluating, by test set where there are several;
            else None.

    Raises:
        InputError: the config, data, weights or output folder cannot be used.
        TrainingError: the last checkpoint cannot be written.
        SystemExit: a stop was requested; the status is 75.
    """
    prepare_output(Path(cfg.train.output_dir), _KEYS["output"], ["flsl_d2"])
    use_own_data(cfg, eval_only)
    return _run(_lazy_detection(cfg, eval_only), resume, eval_only, *resume_options)


def run_yaml_detection(
    cfg: CfgNode, resume: bool, eval_only: bool, *resume_options: bool
) -> dict[str, Any] | None:
    """Do the same as :func:`run_lazy_detection` from a YAML config."""
    prepare_output(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR", ["flsl_d2"])
    return _run(yaml_detection(cfg), resume, eval_only, *resume_options)


def _lazy_detection(cfg: DictConfig, eval_only: bool) -> Detection:
    settings, classes = cfg.train, num_classes_key(cfg)
    if settings.get("patience") and not settings.get("best_metric"):
        raise InputError(
            f"train.patience is {settings.patience}, but there is no value to watch; set "
            "train.best_metric=bbox/AP, or train.patience=0."
        )
    at_evaluation = bool(OmegaConf.select(cfg, "train.amp.evaluation"))
    dtype = None if eval_only and not at_evaluation else _amp_dtype(cfg)
    test = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    masks = OmegaConf.select(cfg, "model.roi_heads.mask_in_features")
    return Detection(
        cfg=cfg,
        keys={**_KEYS, "classes": f"{classes}=", "masks_off": _MASKS_OFF if masks else ""},
        output_dir=settings.output_dir,
        seed=settings.get("seed", -1),
        device=settings.device,
        weights=settings.init_checkpoint,
        train_names=names_of(cfg.dataloader.train.dataset.names),
        image_format=OmegaConf.select(cfg, "dataloader.train.mapper.image_format") or "",
        test_names=names_of(test) if test and "evaluator" in cfg.dataloader else [],
        num_classes=OmegaConf.select(cfg, classes) if classes else None,
        batch_size=cfg.dataloader.train.total_batch_size,
        max_iter=settings.max_iter,
        eval_period=settings.eval_period,
        checkpoint_period=settings.checkpointer.period,
        keep_last=settings.checkpointer.get("max_to_keep"),
        log_period=settings.log_period,
        trackers=settings.get("trackers") or [],
        best_metric=settings.get("best_metric") or "",
        patience=settings.get("patience") or 0,
        precision=dtype,
        evaluation_precision=dtype if at_evaluation else None,
        ddp=_ddp_options(cfg, dtype),
        prepare=partial(_prepare, cfg, eval_only),
        build_model=partial(_build_model, cfg),
        build_optimizer=partial(_build_optimizer, cfg),
        build_scheduler=lambda _: instantiate(cfg.lr_multiplier),
        build_train_loader=lambda: instantiate(cfg.dataloader.train),
        build_test_set=partial(_test_set, cfg),
    )


def _amp_dtype(cfg: DictConfig) -> torch.dtype | None:
    if not cfg.train.amp.enabled:
        return None
    name = OmegaConf.select(cfg, "train.amp.dtype", default="float16")
    if name not in _DTYPES:
        raise InputError(f"train.amp.dtype is {name!r}; use {' or '.join(_DTYPES)}.")
    if name == "bfloat16" and str(cfg.train.device).startswith("cuda") and not has_native_bf16():
        logger.warning("This GPU emulates bfloat16 and is slow at it; float16 is faster.")
    return _DTYPES[name]


def _ddp_options(cfg: DictConfig, dtype: torch.dtype | None) -> dict[str, Any]:
    """Arguments of DDP; gradients are sent in float16 only if they are scaled for it."""
    options = dict(cfg.train.ddp)
    if dtype != torch.float16:  # without its scaler, small gradients would vanish
        options["fp16_compression"] = False
    return options


def _prepare(cfg: DictConfig, eval_only: bool) -> None:
    if not eval_only and comm.is_main_process():  # before objects take the place of the mappers
        write_description(cfg, cfg.train.output_dir)
    for split in ("train", "test"):
        if OmegaConf.select(cfg, f"dataloader.{split}.mapper") is not None:
            node = cfg.dataloader[split]
            node.mapper = CheckedMapper(instantiate(node.mapper))


def _build_model(cfg: DictConfig) -> nn.Module:
    try:
        return instantiate(cfg.model).to(cfg.train.device)
    except TypeError as error:  # a key that was added with + and that nothing takes
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(f"the model's config has a key that nothing takes: {error}.") from error


def _build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    cfg.optimizer.params.model = model
    return instantiate(cfg.optimizer)


def _test_set(cfg: DictConfig, name: str) -> tuple[DataLoader[Any], DatasetEvaluator]:
    several = len(names_of(cfg.dataloader.test.dataset.names)) > 1
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


def _run(
    run: Detection,
    resume: bool,
    eval_only: bool,
    allow_changes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    start_run(run, None if eval_only else ResumeOptions(resume, allow_changes, overwrite))
    train = [] if eval_only else run.train_names
    if run.precision is not None and not str(run.device).startswith("cuda"):
        logger.info("Mixed precision is for GPUs only; training on %s in float32.", run.device)
        run.precision = run.evaluation_precision = None
    keys = run.keys
    model_keys = keys["classes"], keys["masks_off"]
    check_datasets(train, run.test_names, run.num_classes, *model_keys, run.image_format)
    run.prepare()
    if eval_only:
        model = run.build_model()
        _describe(model)
        checkpointer = FLSLCheckpointer(model, run.output_dir)
        if not run.weights and not (resume and checkpointer.has_checkpoint()):
            raise InputError(
                f"--eval-only has no weights to evaluate; give {keys['weights']}DETECTOR.pth, or "
                "--resume for the last checkpoint in the output folder."
            )
        checkpointer.require_whole = True
        checkpointer.resume_or_load(run.weights, resume=resume)
        return _evaluate(run, wrap_ddp(model, broadcast_buffers=False))
    world = comm.get_world_size()
    if run.batch_size < 1 or run.batch_size % world:
        raise InputError(
            f"{keys['batch']} is {run.batch_size}, which {world} process(es) cannot share equally; "
            f"use a positive multiple of {world}."
        )
    for name in run.test_names:
        _try_test_set(run, name)
    with stop_requests() as request:
        _train(run, resume, request)
    return None


def _try_test_set(run: Detection, name: str) -> None:
    """Build a test set and map its first image, so that it fails before the first step."""
    try:
        loader, evaluator = run.build_test_set(name)
        evaluator.reset()
        if hasattr(loader.dataset, "__getitem__"):
            loader.dataset[0]
    except InputError:
        raise
    except Exception as error:
        logger.debug("The test set %s failed.", name, exc_info=True)
        raise InputError(
            f"the test set {name!r} cannot be evaluated ({reason_of(error)}); correct its files or "
            "its evaluator, or train without evaluation."
        ) from error


def _train(run: Detection, resume: bool, request: StopRequest) -> None:
    model = run.build_model()
    _describe(model)
    optimizer = run.build_optimizer(model)
    wrapped = wrap_ddp(model, **run.ddp)
    trainer = _trainer(wrapped, optimizer, run.precision)
    checkpointer = FLSLCheckpointer(wrapped, run.output_dir, trainer=trainer)
    # The data come last: reading COCO's annotations takes longer than finding unusable weights.
    start_iter = _resume_or_start(checkpointer, run.weights, resume, trainer)
    if start_iter:
        seed_run(run.seed, start_iter)
    trim_metrics(Path(run.output_dir, "metrics.json"), start_iter)
    trainer.data_loader = run.build_train_loader()
    keep_classes(run.output_dir, run.train_names[0])
    trainer.register_hooks(_hooks(run, wrapped, optimizer, checkpointer, request))
    with suppress(EndedEarly):
        trainer.train(start_iter, run.max_iter)


def _describe(model: nn.Module) -> None:
    """Log one line about a model, where Detectron2 prints all of its modules."""
    parts = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in model.named_children()
    }
    logger.info(
        "%s on %s: %.1fM parameters, %.1fM trained (%s).",
        type(model).__name__,
        next(model.parameters(), torch.empty(0)).device,
        sum(parts.values()),
        sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6,
        ", ".join(f"{name} {count:.1f}M" for name, count in parts.items()),
    )


def _trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
) -> SimpleTrainer:
    if dtype is None:
        return SimpleTrainer(model, None, optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    return AMPTrainer(model, None, optimizer, grad_scaler=scaler, precision=dtype)


def _resume_or_start(
    checkpointer: FLSLCheckpointer, weights: str, resume: bool, trainer: SimpleTrainer
) -> int:
    """Load the last checkpoint with the state of training, or the starting weights alone."""
    found = resume and checkpointer.has_checkpoint()
    try:
        if weights or found:
            checkpointer.resume_or_load(weights, resume=resume)
    except KeyError as error:  # such as a YAML run of 0.2, on Detectron2's DefaultTrainer
        raise InputError(
            f"the last checkpoint in '{checkpointer.save_dir}' has no {error} of this trainer; "
            "continue with the version that wrote it, or start anew from its weights."
        ) from error
    if found:
        # The checkpoint holds the number of the step that had just been done.
        logger.info("Resuming after step %d.", trainer.iter + 1)
        return trainer.iter + 1
    if resume:
        logger.info("No checkpoint in %s to resume; starting anew.", checkpointer.save_dir)
    if not weights:
        logger.warning("No weights were given: starting from random ones.")
    return 0


def _hooks(
    run: Detection,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpointer: FLSLCheckpointer,
    request: StopRequest,
) -> list[HookBase]:
    """Build the hooks in the order they run: a checkpoint is written before its evaluation."""
    checkpoints = Checkpoints(checkpointer, run.checkpoint_period, run.keep_last)
    registered = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=run.build_scheduler(optimizer)),
        checkpoints,
        StoppableEval(run.eval_period, lambda: _evaluate(run, model), checkpoints, request),
    ]
    best = None
    if comm.is_main_process():
        registered.append(FirstSteps(20, "evaluations", logger, run.log_period))
        if run.best_metric:
            best = KeepBest(run.eval_period, checkpointer, run.best_metric)
            registered.append(best)
        writers = default_writers(run.output_dir, run.max_iter)
        if run.trackers:
            cfg = run.cfg
            if isinstance(cfg, DictConfig):  # the optimizer's node holds the model, no setting
                cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "optimizer"])
            writers += build_trackers(run.trackers, run.output_dir, flat_config(cfg))
        registered.append(PeriodicWriter(writers, period=run.log_period))
    if run.patience:
        registered.append(StopEarly(checkpoints, best, run.patience, run.eval_period))
    return [*registered, LeaveWhenAsked(checkpoints, request)]


def _evaluate(run: Detection, model: nn.Module) -> dict[str, Any]:
    """Evaluate on each test set; results are nested by name where there are several."""
    results, dtype = {}, run.evaluation_precision
    for name in run.test_names:
        loader, evaluator = run.build_test_set(name)
        with torch.autocast("cuda", dtype) if dtype else nullcontext():
            results[name] = inference_on_dataset(model, loader, evaluator)
        logger.info("Results on the test set %s:", name)
        print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results
