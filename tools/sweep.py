#!/usr/bin/env python
"""Pre-train over a grid of settings, evaluate each teacher, and write a table, plots and a page."""

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))

from flsl_d2.engine.command_line import described_parser, parse_tool_arguments, run_tool
from pretrain.studies.sweep import sweep_command

EXAMPLES = """examples:
  v (weight of the intra-view loss) against gamma (of volume maximisation), on the CPU:
    tools/sweep.py --config-file configs/demo/flsl_vit_scenes.py --output output/sweep \\
      --grid schedules.intra_weight=0.01,0.03 --grid model.loss.volume_weight=1,5 \\
      --eval-train pennfudan_train --eval-val pennfudan_val \\
      dataset.name= dataset.root=photos train.max_iter=100
  three seeds of each, two runs at a time on eight GPUs, and Mask R-CNN from each teacher:
    tools/sweep.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py \\
      --grid model.head.num_centroids=2048,4096 --seeds 0,1,2 --num-gpus 8 --gpus-per-job 4 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --output output/centroids

Interrupted (Ctrl-C, SIGTERM, power), the same command goes on: what is done stays, a run that was
cut off resumes from its last checkpoint, what failed is tried again. A changed grid uses the runs
that it has in common with the earlier one. docs/SWEEP.md explains the table."""


def main() -> None:
    parser = described_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="pre-training config of all runs")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a config key and its values; several --grid are combined. One number for a pair of "
        "schedules.* stands for start and end",
    )
    add("--seeds", default="", metavar="0,1", help="values of train.seed (default: the config's)")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of everything")
    add("--eval-train", default="", metavar="NAME", help="data set that the measures learn from")
    add("--eval-val", default="", metavar="NAME", help="data set that they score")
    add(
        "--measures",
        default="knn_segmentation,cluster_quality",
        metavar="A,B",
        help="of frozen features, with --eval-train and --eval-val (default: %(default)s)",
    )
    add("--max-images", type=int, metavar="N", help="most images of either (default: all)")
    add("--short-side", type=int, metavar="PX", help="of those images (default: 448)")
    add("--detection", default="", metavar="FILE", help="detection config to fine-tune from each")
    add(
        "--detection-override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change to the detection config; may be repeated",
    )
    add("--num-gpus", type=int, default=1, metavar="N", help="to use; on the CPU, processes")
    add("--gpus-per-job", type=int, default=1, metavar="N", help="for each of the runs (default 1)")
    add("overrides", nargs="*", metavar="key=value", help="changes to the config of all runs")
    run_tool(sweep_command, parse_tool_arguments(parser), TOOLS)


if __name__ == "__main__":
    main()
