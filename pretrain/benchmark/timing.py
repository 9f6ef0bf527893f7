"""Timing of several things in turn, and what a step keeps in memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["Timing", "stored_for_backward", "time_in_turn"]


@dataclass
class Timing:
    """Repeated measurements of one thing.

    Attributes:
        seconds: of each repetition, in the order of measurement.
        peak_bytes: the most memory that the GPU held during any of them; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    def speed_against(self, other: Timing) -> float:
        """How many times as fast as another, measured in turn: the median over the rounds.

        What slows the machine for a while slows both of a round, so their ratio stays.
        """
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def time_in_turn(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int,
    device: torch.device,
) -> dict[str, Timing]:
    """Time functions A, B, A, B, ..., so that what the machine does beside them hits all alike.

    Args:
        functions: by name.
        repeats: measurements of each.
        warmup: runs of each before the first measurement (compilation, caches, clocks).
        device: is waited for before and after each run.
    """
    timings = {name: Timing() for name in functions}
    rounds = tqdm(range(-warmup, repeats), desc="benchmark", unit="round", disable=None)
    for number in rounds:
        for name, function in functions.items():
            _wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            function()
            _wait(device)
            seconds = time.perf_counter() - start
            if number < 0:
                continue
            timings[name].seconds.append(seconds)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
                timings[name].peak_bytes = max(peak, timings[name].peak_bytes or 0)
    return timings


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stored_for_backward(forward: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the model's own weights.

    It is the part of a step's memory that grows with the batch, and can be counted on a CPU, too.
    Memory that several saved tensors share counts once.

    Args:
        forward: runs the forward pass; its result is kept alive while counting.
        model: whose parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # a freed address would be used again and counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())
