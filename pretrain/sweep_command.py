"""From the command line of ``tools/sweep.py`` to a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from flsl_d2.comparison.detection import DetectionEvaluation
from flsl_d2.comparison.evaluations import Evaluation, FeatureEvaluation
from flsl_d2.comparison.lists import comma_separated, seeds_of
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from pretrain.grid import parse_axis
from pretrain.sweep import Sweep, run_sweep

__all__ = ["sweep_command"]


def sweep_command(args: argparse.Namespace, tools: Path) -> None:
    """Run the sweep that a command line asks for.

    Args:
        args: see ``tools/sweep.py --help``.
        tools: folder of the command lines.

    Raises:
        InputError, WorkerError: see :func:`pretrain.sweep.run_sweep`.
    """
    run_sweep(
        Sweep(
            tools=tools,
            config_file=args.config_file,
            axes=[parse_axis(text) for text in args.grid],
            overrides=args.overrides,
            seeds=seeds_of(args.seeds),
            output=args.output,
            evaluations=_evaluations(args, tools),
            num_gpus=args.num_gpus,
            gpus_per_job=args.gpus_per_job,
        )
    )


def _evaluations(args: argparse.Namespace, tools: Path) -> list[Evaluation]:
    if bool(args.eval_train) != bool(args.eval_val):
        raise InputError("--eval-train and --eval-val belong together; give both or neither.")
    device = load_lazy_config(args.config_file, args.overrides).train.device
    names = comma_separated(args.measures) if args.eval_val else []
    found: list[Evaluation] = [
        FeatureEvaluation(
            tools, name, args.eval_train, args.eval_val, device, args.max_images, args.short_side
        )
        for name in names
    ]
    if args.detection:
        found.append(DetectionEvaluation(tools, args.detection, args.detection_override, device))
    elif args.detection_override:
        raise InputError("--detection-override changes --detection, which is not given.")
    return found
