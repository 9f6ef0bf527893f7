"""A whole pre-training run: from a config to checkpoints and the exported teacher."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from detectron2.config import instantiate
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from omegaconf import DictConfig

from flsl_d2.checkpoint import FLSLCheckpointer
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.launch import launch, wrap_ddp
from flsl_d2.engine.output_folder import prepare_output
from flsl_d2.errors import InputError
from pretrain.data import PretrainDataset, build_pretrain_loader, image_files
from pretrain.hooks import ConsoleProgress, ExportTeacher, Monitor
from pretrain.optimizer import build_adamw
from pretrain.schedules import Schedules
from pretrain.trainer import PretrainTrainer, resolve_precision
from pretrain.views import NestedViews

__all__ = ["launch_pretraining", "run_pretraining"]

logger = logging.getLogger("pretrain")


def launch_pretraining(args: argparse.Namespace) -> None:
    """Load the config of a command line and run it in as many processes as asked for."""
    launch(
        _run_in_process,
        args.num_gpus,
        args.num_machines,
        args.machine_rank,
        args.dist_url,
        args=(args,),
        device=_load(args).train.device,
    )


def _run_in_process(args: argparse.Namespace) -> None:
    # Each process loads the config itself: one that registers data sets or defines functions
    # takes effect only where it is loaded.
    run_pretraining(_load(args), args.resume)


def _load(args: argparse.Namespace) -> DictConfig:
    cfg = load_lazy_config(args.config_file, args.opts)
    lacking = [group for group in ("model", "views", "schedules", "train") if group not in cfg]
    if lacking:
        raise InputError(
            f"config file {args.config_file!r} has no {', '.join(lacking)}, so it is not a "
            "pre-training config; detection configs are for tools/train_net.py."
        )
    return cfg


def run_pretraining(cfg: DictConfig, resume: bool) -> None:
    """Pre-train in this process, one of possibly several.

    Everything that can be wrong with the input is found before the first step.

    Args:
        cfg: as of ``configs/pretrain/*.py``.
        resume: continue from the last checkpoint of the output folder, where there is one.
    """
    output = Path(cfg.train.output_dir)
    prepare_output(cfg, output, "train.output_dir", ["pretrain"])
    files = image_files(**{key: cfg.dataset[key] for key in ("root", "name")})
    precision = resolve_precision(cfg.train.precision, cfg.train.device)
    batch_size = cfg.dataloader.total_batch_size
    iters_per_epoch = len(files) / batch_size
    max_iter = cfg.train.max_iter or round(cfg.train.epochs * iters_per_epoch)
    cfg.schedules.update(
        total_batch_size=batch_size, iters_per_epoch=iters_per_epoch, total_iters=max_iter
    )
    schedules: Schedules = instantiate(cfg.schedules)
    views: NestedViews = instantiate(cfg.views)
    seed_all_rng(cfg.train.seed)
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.compile:
        model.compile_blocks()
    views.keep_crops = model.previous_stage is not None
    dataset = PretrainDataset(files, views, cfg.train.seed, on_error=cfg.dataset.on_error)
    logger.info(
        "%d images; %d steps of %d images (%.2f epochs) in %s on %s, %d process(es)",
        len(files),
        max_iter,
        batch_size,
        max_iter / iters_per_epoch,
        precision,
        cfg.train.device,
        comm.get_world_size(),
    )
    trainer = PretrainTrainer(
        wrap_ddp(model, broadcast_buffers=False),
        None,
        build_adamw(model),
        schedules,
        precision,
        cfg.train.clip_norm,
        cfg.train.clip_mode,
        cfg.train.seed,
    )
    checkpointer = FLSLCheckpointer(trainer.model, str(output), trainer=trainer)
    start_iter = 0
    if resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start_iter = trainer.iter + 1
        logger.info("Resumed after step %d.", start_iter)
    trainer.data_loader = build_pretrain_loader(
        dataset,
        batch_size,
        cfg.dataloader.num_workers,
        comm.get_rank(),
        comm.get_world_size(),
        start_iter,
    )
    num_centroids = len(model.loss.log_prior)
    trainer.register_hooks(
        _hooks(cfg, checkpointer, output, max_iter, iters_per_epoch, num_centroids)
    )
    trainer.train(start_iter, max_iter)


def _hooks(
    cfg: DictConfig,
    checkpointer: FLSLCheckpointer,
    output: Path,
    max_iter: int,
    iters_per_epoch: float,
    num_centroids: int,
) -> list:
    period = cfg.train.log_period
    monitor = Monitor(period, cfg.dataloader.total_batch_size, output / "unreadable_images.txt")
    if not comm.is_main_process():
        return [hooks.IterationTimer(), monitor]
    writers = [
        ConsoleProgress(max_iter, iters_per_epoch, num_centroids),
        JSONWriter(str(output / "metrics.json"), window_size=1),  # what each step was, unsmoothed
        TensorboardXWriter(str(output)),
    ]
    return [
        hooks.IterationTimer(),
        monitor,
        hooks.PeriodicCheckpointer(
            checkpointer, cfg.train.checkpoint_period, max_to_keep=cfg.train.checkpoint_keep
        ),
        ExportTeacher(output / "teacher_backbone.pth", cfg.train.checkpoint_period),
        hooks.PeriodicWriter(writers, period),
    ]
