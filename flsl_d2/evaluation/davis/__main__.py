"""Command line of video object segmentation: ``python -m flsl_d2.evaluation.davis``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import setup_logger

from flsl_d2.engine.command_line import add_option, described_parser, run_tool, user_path
from flsl_d2.evaluation.davis import DavisRun, Propagation, run_davis

__all__ = ["main"]

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
    add = parser.add_argument
    add_option(parser, "--weights", required=True)
    add(
        "--davis-root",
        type=user_path,
        default=Path(user_path(os.getenv("DETECTRON2_DATASETS", "datasets")), "DAVIS"),
        metavar="DIR",
        help="with JPEGImages, Annotations and ImageSets (default: $DETECTRON2_DATASETS/DAVIS)",
    )
    add("--split", default="val", help="list of sequences (default: %(default)s)")
    add("--year", default="2017", help="year of the lists (default: %(default)s)")
    add("--resolution", default="480p", help="folder of the frames (default: %(default)s)")
    add_option(
        parser,
        "--output",
        default=Path("output/davis"),
        help="gets masks/<sequence>/<frame>.png and results.json (default: %(default)s)",
    )
    add_option(parser, "--json", help="results (default: results.json in --output)")
    add("--masks-only", action="store_true", help="write masks and compute no scores")
    add_option(parser, "--short-side", default=480)
    add("--radius", type=int, default=12, help="of the neighbourhood in tokens, 0: all; default 12")
    add("--context", type=int, default=7, help="last frames that give labels (default: 7)")
    add("--top-k", type=int, default=5, help="neighbours that give labels (default: 5)")
    add("--temperature", type=float, default=0.1, help="of the neighbours' weights (default: 0.1)")
    add_option(parser, "--device")
    add("--batch-size", type=int, default=8, help="frames encoded at once (default: 8)")
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
    run_davis(run, args.weights, args.device, args.json)


if __name__ == "__main__":
    main()
