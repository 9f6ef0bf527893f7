"""From image files to updated weights, with the loader's own workers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from flsl_d2.engine.config_files import load_lazy_config
from pretrain.benchmark.reference import reference_function
from pretrain.benchmark.report import print_table, write_json
from pretrain.benchmark.timing import time_in_turn
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.images import find_images
from pretrain.optimizer import build_adamw
from pretrain.trainer import PretrainTrainer, resolve_precision

__all__ = ["benchmark_end_to_end"]


class _Run:
    """Steps of a real run."""

    def __init__(self, args: argparse.Namespace, files: list[str], device: torch.device) -> None:
        cfg = load_lazy_config(args.config_file, args.opts)
        cfg.schedules.update(
            total_batch_size=args.batch_size, iters_per_epoch=1000, total_iters=10**6
        )
        model = instantiate(cfg.model).to(device).train()
        if cfg.train.compile:
            model.compile_blocks()
        dataset = PretrainDataset(files, instantiate(cfg.views))
        self.loader = _Waiting(iter(build_pretrain_loader(dataset, args.batch_size, args.workers)))
        self.trainer = PretrainTrainer(
            model,
            self.loader,
            build_adamw(model),
            instantiate(cfg.schedules),
            resolve_precision(args.precision, device.type),
            cfg.train.clip_norm,
            cfg.train.clip_mode,
        )
        self.trainer.iter = 0

    def __call__(self) -> None:
        with EventStorage(self.trainer.iter) as self.trainer.storage:
            self.trainer.run_step()
        self.trainer.iter += 1


class _Waiting:
    """A loader that adds up how long it was waited for."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.seconds = batches, []

    def __iter__(self) -> _Waiting:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds.append(time.perf_counter() - start)
        return batch


def benchmark_end_to_end(args: argparse.Namespace) -> None:
    """Images/s from files, and the share of the time in which the step waited for them."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    files = find_images(args.images)
    steps: dict[str, Callable[[], None]] = {}
    if args.reference_module:
        make_run = reference_function(args.reference_module, "make_run")
        steps["reference"] = make_run(files, args.batch_size, args.workers, device, args.precision)
    run = steps["flsl_d2"] = _Run(args, files, device)
    timings = time_in_turn(steps, args.repeats, args.warmup, device)
    first = next(iter(timings))
    waited = sum(run.loader.seconds[-args.repeats :]) / sum(timings["flsl_d2"].seconds)
    rows = [
        {
            "run": name,
            "images/s": args.batch_size * len(timing.seconds) / sum(timing.seconds),
            f"ratio to {first}": sum(timings[first].seconds) / sum(timing.seconds),
            "data wait": waited if name == "flsl_d2" else None,
        }
        for name, timing in timings.items()
    ]
    print(
        f"{len(files)} files of {args.images}, batch {args.batch_size}, {args.workers} worker(s), "
        f"{args.precision} on {device}, {args.repeats} steps"
    )
    print_table(rows)
    write_json(args.json, device, batch_size=args.batch_size, workers=args.workers, rows=rows)
