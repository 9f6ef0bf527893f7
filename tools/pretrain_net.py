#!/usr/bin/env python
"""Pre-train a vision transformer with FLSL."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.engine.command_line import parse_tool_arguments, run_tool, tool_argument_parser
from pretrain.run import launch_pretraining

EXAMPLES = """examples:
  8 GPUs, ImageNet-1k in $DETECTRON2_DATASETS/imagenet/train:
    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py --num-gpus 8
  a folder of images, on the CPU, for a first look:
    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py \\
      dataset.root=photos train.device=cpu train.max_iter=200 dataloader.total_batch_size=16
  COCO's images without their labels:
    tools/pretrain_net.py --config-file ... dataset.name=coco_2017_train

At the end <output_dir>/teacher_backbone.pth is what train.init_checkpoint= of tools/train_net.py
and MODEL.WEIGHTS of any Detectron2 project load."""


def main() -> None:
    args = parse_tool_arguments(tool_argument_parser(__doc__, EXAMPLES))
    run_tool(launch_pretraining, args)


if __name__ == "__main__":
    main()
