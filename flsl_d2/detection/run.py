"""Fine-tuning and evaluating a detector, from a config of either kind, as a tool runs it."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from omegaconf import DictConfig

from flsl_d2.detection.lazy import run_lazy_detection
from flsl_d2.detection.yaml import run_yaml_detection
from flsl_d2.engine.config_files import load_config
from flsl_d2.engine.launch import launch
from flsl_d2.errors import InputError

__all__ = ["launch_detection", "run_detection"]

_GROUPS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def launch_detection(args: argparse.Namespace) -> None:
    """Run what a command line asks for, in as many processes.

    Args:
        args: of :func:`flsl_d2.engine.command_line.tool_argument_parser` with ``eval_only``.

    Raises:
        InputError: see :mod:`flsl_d2.detection.lazy`.
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
    functions, neither of which travels to another process.
    """
    cfg = _load(args)
    run = run_yaml_detection if isinstance(cfg, CfgNode) else run_lazy_detection
    run(cfg, args.resume, args.eval_only, args.allow_changes, args.overwrite)


def _load(args: argparse.Namespace) -> DictConfig | CfgNode:
    cfg = load_config(args.config_file, args.opts)
    lacking = [] if isinstance(cfg, CfgNode) else [group for group in _GROUPS if group not in cfg]
    if lacking:
        raise InputError(
            f"config file {args.config_file!r} has no {', '.join(lacking)}, so it is not a "
            "detection config; pre-training configs are for tools/pretrain_net.py."
        )
    return cfg
