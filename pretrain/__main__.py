"""Command line of pre-training: ``python -m pretrain`` in the checkout."""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.engine.command_line import parse_tool_arguments, run_tool, tool_argument_parser
from pretrain.run import launch_pretraining

DESCRIPTION = "Pre-train a vision transformer with FLSL."
EXAMPLES = """examples:
  a folder of images and nothing else; recipe, batch, learning rate and length follow from the
  number of images and the memory of the device:
    tools/pretrain_net.py --images photos
  8 GPUs, ImageNet-1k in $DETECTRON2_DATASETS/imagenet/train:
    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py --num-gpus 8
  a chosen recipe on files of one's own, on the CPU, for a first look:
    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py \\
      --images photos train.device=cpu train.max_iter=200 dataloader.total_batch_size=16
  COCO's images without their labels:
    tools/pretrain_net.py --images coco_2017_train

At the end <output_dir>/teacher_backbone.pth is what train.init_checkpoint= of tools/train_net.py
and MODEL.WEIGHTS of any Detectron2 project load."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = tool_argument_parser(DESCRIPTION, EXAMPLES, config_required=False)
    parser.add_argument(
        "--images",
        metavar="SOURCE",
        default="",
        help="folder, pattern in quotes, text file of paths or registered data set; sets "
        "dataset.root or dataset.name, and makes --config-file optional",
    )
    parser.set_defaults(preset="")
    args = parse_tool_arguments(parser, arguments)
    if not args.images and not args.config_file:
        parser.error("give --images SOURCE, or a recipe by --config-file FILE")
    run_tool(launch_pretraining, args)


if __name__ == "__main__":
    main()
