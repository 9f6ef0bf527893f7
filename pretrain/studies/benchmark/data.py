"""Benchmarks from image files to views, and on to updated weights with the loader's workers."""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from tqdm import tqdm

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.images.listing import find_images
from flsl_d2.images.reader import read_rgb
from flsl_d2.images.store import ImageStore, open_images
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.studies.benchmark.measuring import (
    Timing,
    prepared_device,
    reference_function,
    report,
    seconds_of,
    time_in_turn,
)
from pretrain.studies.benchmark.step import build_trainer, run_step
from pretrain.views import DEVICE_WORK


def benchmark_data(args: argparse.Namespace) -> None:
    """Measure each division of work between worker and device, and decoding alone."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cfg = load_lazy_config(args.config_file, args.opts)
    files = find_images(args.images)[: args.num_images]
    epochs = itertools.count()

    def over_files(make: Callable[[int, str], object]) -> Callable[[], Callable[[], None]]:
        def run() -> None:
            for index, file in enumerate(files):
                make(index, file)

        return lambda: run

    def views_of(dataset: PretrainDataset) -> Callable[[int, str], object]:
        return lambda index, _: dataset[next(epochs), index]

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
        # The epoch is part of the seed, so every repetition draws anew.
        steps[names[work] + "; reduced decoding" * reduced] = over_files(views_of(dataset))
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
    report(
        f"{len(files)} files of {args.images}, {args.repeats} repetitions in turn, one thread",
        rows,
        device,
        args.json,
        num_images=len(files),
        seconds={name: timing.seconds for name, timing in timings.items()},
    )


OWN = "flsl_d2"
WITHOUT_FILES = "flsl_d2, a batch in memory"


class _Run:
    """Steps of a real run; without ``read``, steps on its first batch alone."""

    def __init__(
        self, args: argparse.Namespace, files: ImageStore, device: torch.device, read: bool = True
    ) -> None:
        cfg = load_lazy_config(args.config_file, args.opts)
        dataset = PretrainDataset(files, instantiate(cfg.views))
        batches = iter(build_pretrain_loader(dataset, args.batch_size, args.workers))
        self.loader = _TimedLoader(batches if read else itertools.repeat(next(batches)))
        self.trainer = build_trainer(cfg, args.batch_size, device, args.precision, self.loader)

    def __call__(self) -> None:
        run_step(self.trainer)


class _TimedLoader:
    """Loader that records how long each batch was waited for."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.seconds: list[float] = []

    def __iter__(self) -> _TimedLoader:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds.append(time.perf_counter() - start)
        return batch


def benchmark_end_to_end(args: argparse.Namespace) -> None:
    """Measure training from files, and the share of the time in which the step waited for them.

    Each side runs alone for a round, from the start of its workers to their end. Were the sides to
    take turns at each step, the workers of one would fetch ahead during the step of the other.
    """
    device = prepared_device(args)
    files = open_images(args.images)  # shards as well
    sides: dict[str, Callable[[], Callable[[], None]]] = {}
    if args.reference_module:
        make_run = reference_function(args.reference_module, "make_run")
        sides["reference"] = lambda: make_run(
            files, args.batch_size, args.workers, device, args.precision
        )
    sides[OWN] = lambda: _Run(args, files, device)
    sides[WITHOUT_FILES] = lambda: _Run(args, files, device, read=False)
    timings = {name: Timing(make) for name, make in sides.items()}
    waited = 0.0
    rounds = [name for _ in range(args.rounds) for name in sides]
    for name in tqdm(rounds, desc="end-to-end", unit="side", disable=None):
        step = sides[name]()
        for _ in range(args.warmup):
            step()
        timings[name].seconds.append(seconds_of(step, args.repeats, device))
        if isinstance(step, _Run) and name == OWN:
            waited += sum(step.loader.seconds[-args.repeats :])
        del step
        gc.collect()  # ends its workers as well
    first = next(iter(sides))
    rows = [
        {
            "run": name,
            "images/s": timing.rate(args.batch_size * args.repeats),
            f"ratio to {first}": timing.speed_against(timings[first]),
            "data wait": waited / sum(timing.seconds) if name == OWN else None,
        }
        for name, timing in timings.items()
    ]
    report(
        f"{len(files)} files of {args.images}, batch {args.batch_size}, {args.workers} worker(s), "
        f"{args.precision} on {device}, median of {args.rounds} rounds of {args.repeats} steps",
        rows,
        device,
        args.json,
        batch_size=args.batch_size,
        workers=args.workers,
    )
