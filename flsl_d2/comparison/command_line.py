"""From the command line of ``tools/compare.py`` to a comparison."""

from __future__ import annotations

import argparse
from pathlib import Path

from flsl_d2.comparison.compare import Comparison, run_comparison
from flsl_d2.comparison.detection import DetectionEvaluation
from flsl_d2.comparison.evaluations import (
    DavisEvaluation,
    Evaluation,
    FeatureEvaluation,
    check_measures,
)
from flsl_d2.comparison.lists import comma_separated, seeds_of
from flsl_d2.errors import InputError

__all__ = ["compare_command"]


def compare_command(args: argparse.Namespace, tools: Path) -> None:
    """Run the comparison that a command line asks for.

    Args:
        args: see ``tools/compare.py --help``.
        tools: folder of the command lines.

    Raises:
        InputError, WorkerError: see :func:`flsl_d2.comparison.compare.run_comparison`.
    """
    evaluations: list[Evaluation] = []
    for text in args.eval:
        evaluations += _evaluations(text, args, tools)
    names = [evaluation.name for evaluation in evaluations]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise InputError(f"--eval has {twice[0]} twice; name each evaluation once.")
    if args.overrides and not any(isinstance(e, DetectionEvaluation) for e in evaluations):
        raise InputError(
            f"override {args.overrides[0]!r} is for a detection config, and there is none; "
            "add --eval detection=CONFIG.py."
        )
    run_comparison(
        Comparison(
            encoders=args.encoder,
            evaluations=evaluations,
            output=args.output,
            seeds=seeds_of(args.seeds) or [0],
            device=args.device,
            num_gpus=args.num_gpus,
            gpus_per_job=args.gpus_per_job,
            num_pictures=args.pictures,
        )
    )


def _evaluations(text: str, args: argparse.Namespace, tools: Path) -> list[Evaluation]:
    kind, equals, value = text.partition("=")
    if equals and kind == "detection":
        several = sum(other.startswith("detection=") for other in args.eval) > 1
        name = f"detection {Path(value).stem}" if several else "detection"
        return [DetectionEvaluation(tools, value, args.overrides, args.device, name)]
    if equals and kind == "davis":
        return [DavisEvaluation(tools, value, args.device)]
    names = comma_separated(text)
    check_measures(names)
    if not args.train or not args.val:
        raise InputError(f"--eval {text} needs data; give --train NAME and --val NAME.")
    return [
        FeatureEvaluation(
            tools, name, args.train, args.val, args.device, args.max_images, args.short_side
        )
        for name in names
    ]
