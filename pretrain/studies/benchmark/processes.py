"""A step of several processes: its speed, and the shares of what they exchange."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from detectron2.utils import comm

from flsl_d2.engine.launch import launch, wrap_ddp
from pretrain.step_numbers import StepNumbers
from pretrain.studies.benchmark.measuring import prepared_device, report, seconds_of
from pretrain.studies.benchmark.step import Step
from pretrain.trainer import PretrainTrainer


def benchmark_processes(args: argparse.Namespace) -> None:
    """Measure steps in the processes that torchrun has started, or in this one alone.

    The exchange of gradients is what a step takes longer than the same step without it, so the part
    that is hidden behind the backward pass does not count.
    """
    launch(_measure, 1, args=(args,), device=args.device)


def _measure(args: argparse.Namespace) -> None:
    device = prepared_device(args)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    step = Step(args.config_file, args.opts, args.batch_size, device, args.precision)
    trainer, world_size = step.trainer, comm.get_world_size()
    plain: torch.nn.Module = trainer.model
    wrapped = wrap_ddp(plain, broadcast_buffers=False, gradient_as_bucket_view=True)

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            trainer.model = model
            step()

        return run

    functions = {
        "step": step_of(wrapped),
        "step without exchange of gradients": step_of(plain),
        "exchange of numbers": lambda: _exchange_numbers(trainer, device),
    }
    medians = {name: _median(function, args, device) for name, function in functions.items()}
    if not comm.is_main_process():
        return
    whole = medians["step"]
    alone = medians["step without exchange of gradients"]
    row = {
        "processes": world_size,
        "images/s": args.batch_size * world_size / whole,
        "s/step": whole,
        "share of gradients": max(1 - alone / whole, 0.0),
        "share of numbers": medians["exchange of numbers"] / whole,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    title = f"{args.batch_size} images a process, {args.precision} on {device.type}"
    report(title, [row], device, args.json, batch_size=args.batch_size, seconds=medians)


def _median(function: Callable[[], None], args: argparse.Namespace, device: torch.device) -> float:
    """Median duration; all processes run the function equally often."""
    for _ in range(args.warmup):
        function()
    comm.synchronize()
    return statistics.median(seconds_of(function, 1, device) for _ in range(args.repeats))


def _exchange_numbers(trainer: PretrainTrainer, device: torch.device) -> None:
    scalars = {str(i): torch.zeros((), device=device) for i in range(10)}
    counts = {"data_time": 0.0, "failed": 0.0, "stop": 0.0}
    StepNumbers(0, trainer.schedules(0), scalars, counts).read()
