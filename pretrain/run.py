"""A whole pre-training run: from a config to checkpoints and the exported teacher."""

from __future__ import annotations

import argparse
import errno
import logging
from functools import partial
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from omegaconf import DictConfig

from flsl_d2.agreement import decided_by_main
from flsl_d2.engine.checkpoints import Checkpoints
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.launch import launch, wrap_ddp
from flsl_d2.engine.progress import FirstSteps
from flsl_d2.engine.run_folder import (
    PRETRAINING_KEYS,
    PeriodicWriter,
    ResumeOptions,
    check_and_keep_run,
    flat_config,
    prepare_output,
    trim_metrics,
)
from flsl_d2.engine.stopping import StopRequest, stop_requests
from flsl_d2.engine.trackers import build_trackers
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import write_text
from flsl_d2.images.store import ImageStore, open_images
from flsl_d2.weights import FLSLCheckpointer
from pretrain.batch_norm import synchronise_batch_norm
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.health import HealthReport
from pretrain.hooks import EncoderPictures, ExportTeacher, FeatureMeasures
from pretrain.initial_weights import open_initial_encoder
from pretrain.methods import Method
from pretrain.monitor import CollapseWatch, ConsoleProgress, Monitor
from pretrain.optimizer import build_adamw
from pretrain.presets import PRESET_FILE, use_images
from pretrain.schedules import Schedules, set_run_length
from pretrain.sharding import check_sharding
from pretrain.step_numbers import BadNumbersError, write_bad_numbers
from pretrain.stored_channels import (
    normalise_stored_values,
    stored_channels,
    use_stored_channels,
)
from pretrain.summary import FIRST_STEPS, describe_run
from pretrain.trainer import (
    PretrainTrainer,
    records_graphs,
    resolve_compile,
    resolve_precision,
)
from pretrain.views import CutViews

logger = logging.getLogger("pretrain")

# Configs from before images were read from servers have the first two alone.
_IMAGE_KEYS = ("root", "name", "cache_dir", "cache_gb", "patience")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)


def launch_pretraining(args: argparse.Namespace) -> None:
    """Load the config of a command line and run it in the number of processes it asks for.

    Without a config, a preset for the images is chosen (:mod:`pretrain.presets`).
    """
    if args.images:
        use_images(args)
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
    # Each process loads the config itself, because data sets that a config registers and functions
    # that it defines exist only where it is loaded.
    run_pretraining(_load(args), args.resume, args.allow_changes, args.overwrite, args.preset)


def _load(args: argparse.Namespace) -> DictConfig:
    cfg = load_lazy_config(args.config_file, args.opts)
    lacking = [group for group in ("model", "views", "schedules", "train") if group not in cfg]
    if lacking:
        raise InputError(
            f"config file {args.config_file!r} has no {', '.join(lacking)}, so it is not a "
            "pre-training config; detection configs are for tools/train_net.py."
        )
    return cfg


def run_pretraining(
    cfg: DictConfig,
    resume: bool,
    allow_changes: bool = False,
    overwrite: bool = False,
    preset: str = "",
) -> None:
    """Pre-train in this process, one of possibly several, once the input is checked.

    Args:
        cfg: config like those in ``configs/pretrain/``.
        resume: whether to continue from the last checkpoint of the output folder, if there is one.
        allow_changes: see :class:`flsl_d2.engine.run_folder.ResumeOptions`; also ``overwrite``.
        preset: text of the config file that repeats the run, which the folder gets as well.

    Raises:
        InputError: the config, the images or the output folder cannot be used.
        TrainingError: numbers are not finite, the folder can no longer be written, or the server of
            the images stays away.
        SystemExit: the run was asked to stop; the status is 75.
    """
    with stop_requests() as request:
        _run(cfg, ResumeOptions(resume, allow_changes, overwrite), request, preset)


def _run(cfg: DictConfig, options: ResumeOptions, request: StopRequest, preset: str) -> None:
    train, data, output = cfg.train, cfg.dataset, Path(cfg.train.output_dir)
    prepare_output(output, "train.output_dir", ["pretrain", "flsl_d2"])
    files = open_images(**{key: data[key] for key in _IMAGE_KEYS if key in data})
    use_stored_channels(cfg, files)
    initial = open_initial_encoder(cfg)
    also = {"images": files.names.digest}
    check_and_keep_run(cfg, output, "train.output_dir", options, PRETRAINING_KEYS, also)
    if preset and comm.is_main_process():
        write_text(output / PRESET_FILE, preset)
    precision = resolve_precision(train.precision, train.device)
    batch_size, world_size = cfg.dataloader.total_batch_size, comm.get_world_size()
    max_iter = set_run_length(cfg, len(files))
    schedules: Schedules = instantiate(cfg.schedules)
    views: CutViews = instantiate(cfg.views)
    seed_all_rng(train.seed)
    torch.set_float32_matmul_precision("high" if train.get("tf32") else "highest")
    model = instantiate(cfg.model).to(train.device)
    if train.get("sync_bn") and world_size > 1:
        synchronise_batch_norm(model)
    method: Method = model
    if initial is not None:
        method.start_from(initial)
    normalise_stored_values(method, cfg, files)
    compile_mode = train.get("compile_mode", "default")
    encoder, changing = method.exported_encoder(), type(method).__name__
    if getattr(method, "changes_shapes", False):
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each shape
    else:
        changing = ""
    mode = resolve_compile(train.compile, compile_mode, train.device, encoder, changing)
    check_sharding(train.get("sharding", "none"))
    if mode:
        method.compile_blocks(mode=mode)
    method.check_run(views, batch_size // world_size // max(train.accumulation_steps, 1))
    views.keep_crops = method.needs_crops
    channels = stored_channels(cfg)
    dataset = PretrainDataset(files, views, train.seed, data.on_error, data.max_pixels, channels)
    for line in describe_run(cfg, files, method, schedules, precision):
        logger.info("%s", line)
    trainer = PretrainTrainer(
        wrap_ddp(model, **ddp_options(train.accumulation_steps)),
        None,
        build_adamw(model, train.get("betas", (0.9, 0.999))),
        schedules,
        precision,
        train.clip_norm,
        train.clip_mode,
        train.seed,
        train.accumulation_steps,
        records_graphs(mode),
    )
    trainer.stop_asked = lambda: bool(request)
    trainer.reads_now = partial(_reads_now, cfg, max_iter)
    named = output / "unreadable_images.txt"
    monitor = Monitor(train.log_period, batch_size, named, len(files), data.max_failed_share)
    trainer.register_hooks([hooks.IterationTimer(), monitor])  # before their state is loaded
    checkpointer = FLSLCheckpointer(trainer.model, str(output), trainer=trainer)
    start_iter = _resume(checkpointer, trainer, options, output)
    trainer.data_loader = build_pretrain_loader(
        dataset,
        batch_size,
        cfg.dataloader.num_workers,
        comm.get_rank(),
        world_size,
        start_iter,
        cfg.dataloader.get("prefetch_factor", 2),
        train.device,
    )
    trainer.register_hooks(_hooks(cfg, checkpointer, trainer, monitor, files, request, start_iter))
    request.step = lambda: trainer.iter + 1
    try:
        trainer.train(start_iter, max_iter)
    except BadNumbersError as error:
        # All processes are here; one of them writes the file, and all raise the same error.
        found = partial(write_bad_numbers, error, files, batch_size, train.seed, str(output))
        raise decided_by_main(found) from error
    except SystemExit:
        _raise_data_error(trainer)
        raise
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise TrainingError(
            f"'{output}' can no longer be written ({error.strerror}); the checkpoints in it are "
            "untouched: make room and continue with --resume."
        ) from error


def ddp_options(accumulation_steps: int) -> dict[str, bool]:
    """Return the arguments of ``DistributedDataParallel`` for a method.

    Every weight has a gradient in each step, so the graph is declared to be static, except where
    gradients are accumulated, which PyTorch does without exchanging them.
    """
    static = accumulation_steps == 1
    return {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "static_graph": static,
    }


def _reads_now(cfg: DictConfig, max_iter: int, done: int) -> bool:
    """Whether a step is logged or saved, so that its numbers are needed at once."""
    periods = (cfg.train.log_period, cfg.train.checkpoint_period)
    on_gpu = str(cfg.train.device).startswith("cuda")
    return not on_gpu or done >= max_iter or any(done % period == 0 for period in periods)


def _raise_data_error(trainer: PretrainTrainer) -> None:
    """Raise, on all processes, the error for which one of them has no images for the next step."""
    own = trainer.last_batch.next_error if trainer.last_batch else None
    error = next((e for e in comm.all_gather(own) if e is not None), None)
    if error is not None:
        raise TrainingError(
            f"{error}; the checkpoint after step {trainer.iter + 1} is written: continue with "
            "--resume."
        )


def _resume(
    checkpointer: FLSLCheckpointer,
    trainer: PretrainTrainer,
    options: ResumeOptions,
    output: Path,
) -> int:
    start_iter = 0
    if options.resume and checkpointer.has_checkpoint():
        checkpointer.resume_or_load("", resume=True)
        start_iter = trainer.iter + 1
        logger.info("Resumed after step %d.", start_iter)
    elif options.resume:
        logger.info("No checkpoint in %s to resume; starting anew.", output)
    if comm.is_main_process():
        trim_metrics(output / "metrics.json", start_iter)
        if start_iter == 0:
            (output / "unreadable_images.txt").unlink(missing_ok=True)
    comm.synchronize()
    return start_iter


def _hooks(
    cfg: DictConfig,
    checkpointer: FLSLCheckpointer,
    trainer: PretrainTrainer,
    monitor: Monitor,
    files: ImageStore,
    request: StopRequest,
    start_iter: int,
) -> list[HookBase]:
    """Return the hooks in the order in which they run: a step is logged before it is saved."""
    train, side, max_iter = cfg.train, cfg.views.global_size, trainer.schedules.total_iters
    output, period = Path(train.output_dir), train.log_period
    num_centroids, watch = trainer.method.num_centroids, CollapseWatch()
    registered: list[HookBase] = [watch]
    if comm.is_main_process():
        registered.append(FirstSteps(FIRST_STEPS, "pictures and scores", logger, period))
    if train.measures.val:
        registered.append(FeatureMeasures(**train.measures, request=request, folder=output))
    if comm.is_main_process():
        writers = [
            ConsoleProgress(max_iter, len(files) / monitor.total_batch_size, num_centroids),
            # Each step is written unsmoothed.
            JSONWriter(str(output / "metrics.json"), window_size=1),
            # TensorBoard hides the steps that were logged after the checkpoint.
            TensorboardXWriter(str(output), purge_step=start_iter),
            *build_trackers(train.trackers, output, flat_config(cfg)),
        ]
        registered += [
            EncoderPictures(
                files,
                output / "pictures",
                train.pictures_period,
                side,
                max_share=train.get("pictures_max_share", 1.0),
                request=request,
            ),
            HealthReport(
                files, watch, train.health_period, side, 0 if stored_channels(cfg) else 12
            ),
            PeriodicWriter(writers, period),
            ExportTeacher(output / "teacher_backbone.pth", train.checkpoint_period),
        ]
    checkpoints = Checkpoints(
        checkpointer,
        train.checkpoint_period,
        train.checkpoint_keep,
        train.checkpoint_keep_every,
        stop_agreed=lambda: trainer.stop_agreed,
        prepare=monitor.gather,
        background=train.get("checkpoint_async", False),
    )
    return [*registered, checkpoints]
