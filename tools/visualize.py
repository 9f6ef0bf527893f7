#!/usr/bin/env python
"""Look at what encoders group: attention, modes, clusters, PCA, nearest patches and centroids.

Writes PNG files and one page, index.html, in which any token can be clicked."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.engine.command_line import described_parser, run_tool
from flsl_d2.visualization.visualize import visualize

EXAMPLES = """examples:
  a pre-trained encoder beside an untrained one, on 8 images of a folder:
    tools/visualize.py --weights output/pretrain/teacher_backbone.pth random --images photos
  the centroids, too (they are in checkpoints only), on images of COCO, larger:
    tools/visualize.py --weights output/pretrain/model_final.pth --dataset coco_2017_val \\
      --short-side 640
  one image, seen from two of its tokens:
    tools/visualize.py --weights FILE --images street.jpg --token 210,140 --token 33,300

docs/VISUALIZATION.md says what the pictures show and how to read them."""


def point(text: str) -> tuple[float, float]:
    """X,Y in pixels."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y, such as 120,80") from None
    return x, y


def main() -> None:
    parser = described_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--weights",
        nargs="+",
        required=True,
        metavar="FILE",
        help="encoders to see side by side: files in any known layout, or 'random' (ViT-S/16)",
    )
    add("--names", nargs="+", default=[], metavar="NAME", help="of the encoders, on the pages")
    add("--images", nargs="+", default=[], metavar="PATH", help="image files, folders of images")
    add("--dataset", default="", metavar="NAME", help="a data set registered in Detectron2")
    add("--max-images", type=int, default=8, metavar="N", help="of a folder or data set (8)")
    add("--output", default="output/pictures", metavar="DIR", help="default: %(default)s")
    add(
        "--token",
        type=point,
        action="append",
        default=[],
        metavar="X,Y",
        help="look from here, in pixels of the original image; may be repeated (the middle)",
    )
    add(
        "--short-side",
        type=int,
        default=448,
        metavar="PIXELS",
        help="resize images to this shorter side; 0 keeps their size (default: %(default)s)",
    )
    add(
        "--scale",
        type=float,
        default=1.0,
        metavar="S",
        help="of attention and mean-shift, times sqrt(D); larger values give more, smaller "
        "clusters, pre-training itself uses 0.1 (default: %(default)s)",
    )
    add("--iterations", type=int, default=5, metavar="N", help="of mean-shift (%(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    run_tool(
        visualize,
        args.weights,
        args.images,
        args.dataset,
        args.output,
        args.token,
        args.names,
        args.short_side,
        args.scale,
        args.iterations,
        args.max_images,
        args.device,
    )


if __name__ == "__main__":
    main()
