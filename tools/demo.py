#!/usr/bin/env python
"""Pre-train, fine-tune and compare on a small data set made on the spot: no download, no GPU."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flsl_d2.engine.command_line import run_tool
from pretrain.studies.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", default="output/demo", help="folder of everything (default: %(default)s)")
    add("--train-scenes", type=int, default=600, help="default: %(default)s")
    add("--val-scenes", type=int, default=100, help="default: %(default)s")
    add("--pretrain-iters", type=int, default=0, help="steps of pre-training (default: config)")
    add("--detection-iters", type=int, default=0, help="steps of fine-tuning (default: config)")
    args = parser.parse_args()
    run_tool(
        run_demo,
        args.output,
        args.train_scenes,
        args.val_scenes,
        args.pretrain_iters,
        args.detection_iters,
    )


if __name__ == "__main__":
    main()
