#!/usr/bin/env python
"""Write the label images of a semantic data set, once, before training or evaluating on it."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.engine.command_line import described_parser, run_tool
from flsl_d2.images.label_images import PREPARATIONS

EXAMPLE = """examples:
  tools/prepare_labels.py ade20k
  tools/prepare_labels.py coco-stuff --root datasets --workers 8

For ade20k the tool reads ADEChallengeData2016/annotations and writes
ADEChallengeData2016/annotations_detectron2; for coco-stuff it reads
coco/annotations/panoptic_*2017.json and coco/panoptic_*2017, and writes coco/panoptic_stuff_*2017.
An interrupted run continues where it stopped."""


def main() -> None:
    parser = described_parser(__doc__, EXAMPLE)
    parser.add_argument("dataset", choices=PREPARATIONS, help="data set to prepare")
    parser.add_argument(
        "--root", metavar="FOLDER", help="folder of all data sets (default: $DETECTRON2_DATASETS)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes (default: one per core)",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_tool(PREPARATIONS[args.dataset], args.root, args.workers)


if __name__ == "__main__":
    main()
