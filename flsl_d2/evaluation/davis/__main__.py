"""Command line of video object segmentation: ``python -m flsl_d2.evaluation.davis``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import setup_logger

from flsl_d2.engine.command_line import add_defaults, add_option, described_parser, run_tool
from flsl_d2.evaluation.davis.propagation import Propagation
from flsl_d2.evaluation.davis.run import DavisRun, run_davis

DESCRIPTION = "Segment the videos of DAVIS 2017 with an encoder's frozen tokens: J, F and J&F."
EXAMPLES = """examples:
  the validation split, by the protocol of published numbers:
    tools/eval_davis.py --weights output/flsl_vit_small_p16_in1k/teacher_backbone.pth \\
      --davis-root $DETECTRON2_DATASETS/DAVIS
  masks for the benchmark's server, of a split whose masks are not public:
    tools/eval_davis.py --weights teacher_backbone.pth --split test-dev --masks-only

The first frame's mask is propagated: every token takes the label of its nearest neighbours in the
first frame and the last few. Nothing is trained. docs/EVALUATION.md describes the protocol. A
sequence with missing or unusable files is reported as failed with the reason, the others go on,
and the exit status is 2."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Segment the sequences that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_option(parser, "--weights", required=True)
    add_option(
        parser,
        "--davis-root",
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets"), "DAVIS"),
        help="with JPEGImages, Annotations and ImageSets (default: $DETECTRON2_DATASETS/DAVIS)",
    )
    add_option(
        parser,
        "--output",
        default=Path("output/davis"),
        help="gets masks/<sequence>/<frame>.png and results.json (default: %(default)s)",
    )
    add_option(parser, "--json", help="results (default: results.json in --output)")
    masks_only = "write masks and compute no scores"
    parser.add_argument("--masks-only", action="store_true", help=masks_only)
    add_option(parser, "--short-side", default=480)
    add_option(parser, "--device")
    add_defaults(
        parser,
        ("--split", "val", "list of sequences"),
        ("--year", "2017", "year of the lists"),
        ("--resolution", "480p", "folder of the frames"),
        ("--radius", 12, "radius of the neighbourhood in tokens; 0: all tokens"),
        ("--context", 7, "number of last frames that give labels"),
        ("--top-k", 5, "number of neighbours that give labels"),
        ("--temperature", 0.1, "temperature of the neighbours' weights"),
        ("--batch-size", 8, "frames encoded at once"),
        ("--seed", 0, "seed of untrained weights"),
    )
    run_tool(_run, parser.parse_args(arguments))


def _run(args: argparse.Namespace) -> None:
    run = DavisRun(
        root=args.davis_root,
        output=args.output,
        split=args.split,
        year=args.year,
        resolution=args.resolution,
        short_side=args.short_side,
        propagation=Propagation(args.radius, args.context, args.top_k, args.temperature),
        batch_size=args.batch_size,
        score=not args.masks_only,
    )
    setup_logger()
    run_davis(run, args.weights, args.device, args.json, args.seed)


if __name__ == "__main__":
    main()
