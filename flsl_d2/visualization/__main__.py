"""Command line of the pictures of tokens: ``python -m flsl_d2.visualization``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    described_parser,
    named_weights,
    run_tool,
)
from flsl_d2.visualization.visualize import visualize

DESCRIPTION = """Draw what the tokens of encoders group: attention, modes, clusters, principal
components, nearest patches and centroids, as PNG files and as one page, index.html, in which any
token can be clicked."""
EXAMPLES = """examples:
  a pre-trained encoder beside an untrained one, on 8 images of a folder:
    tools/visualize.py --weights output/pretrain/teacher_backbone.pth random --images photos
  the centroids as well, which only checkpoints hold, on images of COCO, larger:
    tools/visualize.py --weights flsl=output/pretrain/model_final.pth --dataset coco_2017_val \\
      --short-side 640
  one image, seen from two of its tokens:
    tools/visualize.py --weights FILE --images street.jpg --token 210,140 --token 33,300

docs/VISUALIZATION.md says what the pictures show and how to read them."""


def point(text: str) -> tuple[float, float]:
    """Pixel of an image, written as X,Y."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y, such as 120,80") from None
    return x, y


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the encoders that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add_option(
        parser,
        "--weights",
        type=named_weights,
        action="extend",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="encoders to show side by side, and their names on the pages: files or URLs of any "
        "known layout, timm:NAME, or 'random' for untrained weights of the first file's shape",
    )
    images = "image files, folders of images"
    add("--images", nargs="+", default=[], metavar="PATH", help=images)
    most = "most images of each folder and data set (default: %(default)s)"
    add_option(parser, "--max-images", default=8, help=most)
    add_option(parser, "--output", default=Path("output/pictures"))
    token = "token to look from, in pixels of the image; may be repeated (default: the middle)"
    add("--token", type=point, action="append", default=[], metavar="X,Y", help=token)
    side = "shorter side of images in pixels; 0 keeps their size (default: what takes a minute)"
    add_option(parser, "--short-side", help=side, default=None)
    add_option(parser, "--device")
    add_defaults(
        parser,
        (
            "--scale",
            1.0,
            "scale of attention and mean-shift, times sqrt(D); larger values give more, smaller "
            "clusters, and pre-training uses 0.1",
        ),
        ("--iterations", 5, "mean-shift steps"),
        ("--dataset", "", "data set registered in Detectron2"),
    )
    args = parser.parse_args(arguments)
    names = [name for name, _ in args.weights]
    run_tool(
        visualize,
        [source for _, source in args.weights],
        args.images,
        args.dataset,
        str(args.output),
        args.token,
        names if any(names) else (),
        args.short_side,
        args.scale,
        args.iterations,
        args.max_images,
        args.device,
    )


if __name__ == "__main__":
    main()
