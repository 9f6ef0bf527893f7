"""Command line of pre-training: ``python -m pretrain`` in the checkout."""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.engine.command_line import parse_tool_arguments, run_tool, tool_argument_parser
from pretrain.run import launch_pretraining

__all__ = ["main"]

DESCRIPTION = "Pre-train a vision transformer with FLSL."
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Pre-train as a command line describes."""
    parser = tool_argument_parser(DESCRIPTION, EXAMPLES)
    run_tool(launch_pretraining, parse_tool_arguments(parser, arguments))


if __name__ == "__main__":
    main()
