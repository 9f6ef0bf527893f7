#!/usr/bin/env python
"""Video object segmentation on DAVIS 2017 with an encoder's frozen tokens: J, F and J&F."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from detectron2.utils.logger import setup_logger

from flsl_d2.engine.command_line import described_parser, run_tool
from flsl_d2.evaluation.davis import DavisRun, Propagation, run_davis

EXAMPLES = """examples:
  the validation split, by the protocol of published numbers:
    tools/eval_davis.py --weights output/flsl_vit_small_p16_in1k/teacher_backbone.pth \\
      --davis-root $DETECTRON2_DATASETS/DAVIS
  masks for the benchmark's server, of a split whose masks are not public:
    tools/eval_davis.py --weights teacher_backbone.pth --split test-dev --masks-only

The first frame's mask is propagated: every token takes the label of its nearest neighbours in the
first frame and the last few. Nothing is trained. The protocol is written down in
docs/EVALUATION.md. A sequence with missing or unusable files is reported as failed with the
reason, the others go on, and the exit status is 2."""


def main() -> None:
    parser = described_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    add("--weights", required=True, metavar="FILE", help="encoder; 'random' for untrained ViT-S/16")
    add(
        "--davis-root",
        type=Path,
        default=Path(datasets, "DAVIS"),
        metavar="DIR",
        help="with JPEGImages, Annotations and ImageSets (default: $DETECTRON2_DATASETS/DAVIS)",
    )
    add("--split", default="val", help="list of sequences (default: %(default)s)")
    add("--year", default="2017", help="of the lists (default: %(default)s)")
    add("--resolution", default="480p", help="folder of the frames (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("output/davis"),
        metavar="DIR",
        help="gets masks/<sequence>/<frame>.png and results.json (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="results (default: results.json in --output)")
    add("--masks-only", action="store_true", help="write masks, score nothing")
    add("--short-side", type=int, default=480, metavar="PX", help="of frames (default: 480)")
    add("--radius", type=int, default=12, help="of the neighbourhood in tokens, 0: all; default 12")
    add("--context", type=int, default=7, help="last frames that give labels (default: 7)")
    add("--top-k", type=int, default=5, help="neighbours that give labels (default: 5)")
    add("--temperature", type=float, default=0.1, help="of their weights (default: 0.1)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    add("--batch-size", type=int, default=8, help="frames encoded at once (default: 8)")
    args = parser.parse_args()
    run_tool(_run, args)


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
