"""Copies from the CPU to a device that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor


def needs_pinning(device: torch.device) -> bool:
    """Whether a copy to the device waits for it unless the memory is pinned (page-locked)."""
    return device.type == "cuda"


def to_device(data: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy data to a device behind the work it has been given, without waiting for that work."""
    tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if needs_pinning(device) and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def beside_computing(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Context of large copies to a device, which go on while it works off what it was given.

    Yields:
        A function like :func:`to_device`. What it returns can be used after the context.
    """
    if device.type != "cuda":
        yield lambda data: to_device(data, device)
        return
    computing, copying = torch.cuda.current_stream(device), _copying_stream(device)

    def send(data: Tensor) -> Tensor:
        copy = to_device(data, device)
        copy.record_stream(computing)  # its memory is not used again before
        return copy

    with torch.cuda.stream(copying):
        yield send
    computing.wait_stream(copying)


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
