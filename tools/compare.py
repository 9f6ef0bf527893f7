#!/usr/bin/env python
"""Evaluate a list of encoders alike, and put the results side by side: tables and one page."""

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))

import torch

from flsl_d2.engine.command_line import described_parser, parse_tool_arguments, run_tool
from flsl_d2.experiments.compare import compare_command

EXAMPLES = """examples:
  two weight files and an untrained encoder, by measures of frozen features:
    tools/compare.py --encoder random --encoder flsl=teacher_backbone.pth --encoder dino=dino.pth \\
      --eval knn_segmentation,cluster_quality --train pennfudan_train --val pennfudan_val \\
      --output output/comparison
  Mask R-CNN from each as well, three seeds, on eight GPUs; overrides are the detector's:
    tools/compare.py --encoder random --encoder flsl=teacher_backbone.pth --seeds 0,1,2 \\
      --eval detection=configs/coco/mask_rcnn_flsl_vit_s16_1x.py --num-gpus 8 --gpus-per-job 8 \\
      --output output/comparison dataloader.train.total_batch_size=16

Interrupted, the same command goes on; encoders and evaluations may be added to it. A weight file
or an evaluation that fails is a failed cell with its reason, and the others go on.
docs/COMPARE.md explains the table."""


def main() -> None:
    parser = described_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="weights of any readable source, or 'random': untrained, with the architecture of "
        "the first file ('random:NAME': of that one); may be repeated",
    )
    add(
        "--eval",
        action="append",
        default=[],
        metavar="A,B",
        help="measures of frozen features, detection=CONFIG.py, davis=FOLDER; may be repeated",
    )
    add("--train", default="", metavar="NAME", help="data set that the measures learn from")
    add("--val", default="", metavar="NAME", help="data set that they score")
    add("--max-images", type=int, metavar="N", help="most images of either (default: all)")
    add("--short-side", type=int, metavar="PX", help="of those images (default: 448)")
    add("--seeds", default="0", metavar="0,1", help="of all evaluations (default: 0)")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of everything")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--num-gpus", type=int, default=1, metavar="N", help="to use; on the CPU, processes")
    add("--gpus-per-job", type=int, default=1, metavar="N", help="for each detector (default: 1)")
    add("--pictures", type=int, default=3, metavar="N", help="images to show; 0: none (default: 3)")
    add("overrides", nargs="*", metavar="key=value", help="changes to the detection configs")
    run_tool(compare_command, parse_tool_arguments(parser), TOOLS)


if __name__ == "__main__":
    main()
