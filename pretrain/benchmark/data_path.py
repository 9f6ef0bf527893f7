"""From an image file to what the training device receives, on one core."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import cv2
import numpy as np
import torch
from detectron2.config import instantiate

from flsl_d2.engine.config_files import load_lazy_config
from pretrain.benchmark.reference import reference_function
from pretrain.benchmark.report import print_table, write_json
from pretrain.benchmark.timing import time_in_turn
from pretrain.data import PretrainDataset
from pretrain.images import find_images, read_rgb
from pretrain.views import DEVICE_WORK

__all__ = ["benchmark_data"]


def benchmark_data(args: argparse.Namespace) -> None:
    """Images/s of each division of work between worker and device, and of decoding alone."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cfg = load_lazy_config(args.config_file, args.opts)
    files = find_images(args.images)[: args.num_images]
    places = itertools.count()

    def over_files(make: Callable[[int, str], object]) -> Callable[[], Callable[[], None]]:
        def run() -> None:
            for index, file in enumerate(files):
                make(index, file)

        return lambda: run

    steps = {}
    if args.reference_module:
        make_views = reference_function(args.reference_module, "make_views")
        steps["reference"] = over_files(lambda _, file: make_views(file))
    names = {
        "nothing": "all views on the CPU",
        "augmentation": "crops on the CPU, augmentation on the device",
        "crops": "teacher's crop on the CPU, the rest on the device",
    }
    for work, reduced in itertools.product(DEVICE_WORK, (False, True)):
        cfg.views.update(on_device=work, reduced_decoding=reduced)
        dataset = PretrainDataset(files, instantiate(cfg.views))
        # Every repetition draws anew: the epoch is part of the seed.
        steps[names[work] + "; reduced decoding" * reduced] = over_files(
            lambda index, _, dataset=dataset: dataset[next(places), index]
        )
    steps["decoding alone"] = over_files(lambda _, file: read_rgb(file))
    device = torch.device("cpu")
    timings = time_in_turn(steps, args.repeats, args.warmup, device)
    first = next(iter(timings))
    rows = [
        {
            "data path": name,
            "images/s per core": timing.rate(len(files)),
            f"ratio to {first}": timing.speed_against(timings[first]),
            "spread": float(np.ptp(timing.seconds) / timing.median),
        }
        for name, timing in timings.items()
    ]
    print(f"{len(files)} files of {args.images}, {args.repeats} repetitions in turn, one thread")
    print_table(rows)
    write_json(
        args.json,
        device,
        num_images=len(files),
        seconds={name: timing.seconds for name, timing in timings.items()},
    )
