#!/usr/bin/env python
"""Write UAVDT's annotations in COCO format, once, before training or evaluating on it."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.annotations.uavdt import convert_uavdt
from flsl_d2.engine.command_line import described_parser, run_tool

EXAMPLE = """example:
  tools/convert_uavdt.py --root datasets/uavdt

The folder holds the unpacked UAV-benchmark-M, UAV-benchmark-MOTD_v1.0 and M_attr. The tool writes
annotations/instances_train.json and annotations/instances_test.json, which are the data sets
uavdt_train and uavdt_test if the folder is $DETECTRON2_DATASETS/uavdt."""


def main() -> None:
    parser = described_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--root", metavar="FOLDER", help="folder of UAVDT (default: $DETECTRON2_DATASETS/uavdt)"
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_tool(convert_uavdt, parser.parse_args().root)


if __name__ == "__main__":
    main()
