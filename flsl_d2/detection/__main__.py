"""Command line of fine-tuning and evaluation: ``python -m flsl_d2.detection``."""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.detection.train import launch_detection
from flsl_d2.engine.command_line import parse_tool_arguments, run_tool, tool_argument_parser

DESCRIPTION = "Fine-tune a detector on an FLSL encoder, and evaluate it."
EXAMPLES = """examples:
  COCO, 8 GPUs, from a pre-trained encoder:
    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_1x.py --num-gpus 8 \\
      train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth
  the same from the YAML config:
    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_1x.yaml --num-gpus 8 \\
      MODEL.WEIGHTS output/flsl_vit_small_p16_in1k/teacher_backbone.pth
  your own COCO-format files (their categories set the number of classes), one GPU:
    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_1x.py \\
      dataloader.train.dataset.json_file=parts/train.json \\
      dataloader.train.dataset.image_root=parts/images \\
      dataloader.test.dataset.json_file=parts/val.json \\
      dataloader.test.dataset.image_root=parts/images \\
      dataloader.train.total_batch_size=2 optimizer.lr=1.25e-5
  data that is registered in Detectron2 (one category):
    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_1x.py \\
      dataloader.train.dataset.names=pennfudan_train dataloader.test.dataset.names=pennfudan_val \\
      model.roi_heads.num_classes=1
  evaluate a trained detector, on the CPU:
    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_1x.py --eval-only \\
      train.device=cpu train.init_checkpoint=output/mask_rcnn_flsl_vit_s16_1x/model_final.pth
  go on with an interrupted run: the same command with --resume

COCO lies in $DETECTRON2_DATASETS/coco, as Detectron2 expects it."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = tool_argument_parser(DESCRIPTION, EXAMPLES, eval_only=True)
    run_tool(launch_detection, parse_tool_arguments(parser, arguments))


if __name__ == "__main__":
    main()
