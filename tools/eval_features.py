#!/usr/bin/env python
"""Measure an encoder's frozen tokens: k-NN, linear probe and clusters, on any labelled data set."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detectron2.utils.logger import setup_logger

from flsl_d2.engine.command_line import described_parser, run_tool
from flsl_d2.evaluation.measures import MEASURES, report_features

EXAMPLES = f"""examples:
  all measures, on 200 images each of COCO's splits:
    tools/eval_features.py --weights output/flsl_vit_small_p16_in1k/teacher_backbone.pth \\
      --train coco_2017_train --val coco_2017_val --max-images 200
  naming the object in ImageNet's boxes:
    tools/eval_features.py --weights teacher_backbone.pth --measures knn_box \\
      --train imagenet_boxes_train --val imagenet_boxes_val --short-side 224 --device cuda

measures: {", ".join(MEASURES)}. Nothing is fine-tuned, and every image is encoded once for all of
them. The protocols are written down in docs/EVALUATION.md. A measure that fails is shown as failed
with the reason, the others go on, and the exit status is 2."""


def main() -> None:
    parser = described_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="encoder; 'random' for untrained ViT-S/16")
    add("--train", required=True, metavar="NAME", help="registered data set to learn labels from")
    add("--val", required=True, metavar="NAME", help="registered data set to score on")
    add("--measures", nargs="+", default=list(MEASURES), metavar="NAME", help="default: all")
    add("--json", type=Path, metavar="FILE", help="write scores, failures and settings there")
    add("--max-images", type=int, metavar="N", help="of each data set, drawn by seed; default: all")
    add("--short-side", type=int, default=448, metavar="PX", help="of images (default: 448)")
    add("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    setup_logger(name="flsl_d2", abbrev_name="flsl_d2")
    run_tool(
        lambda: report_features(
            args.weights,
            args.train,
            args.val,
            args.measures,
            args.json,
            seed=args.seed,
            device=args.device,
            max_images=args.max_images,
            short_side=args.short_side,
        )
    )


if __name__ == "__main__":
    main()
