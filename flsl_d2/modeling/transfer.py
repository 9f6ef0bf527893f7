"""Copies from the CPU to a device that nothing waits for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def needs_pinning(device: torch.device) -> bool:
    """Whether a copy to the device waits for it unless the memory is pinned (page-locked)."""
    return device.type == "cuda"


def to_device(data: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy data to a device behind the work it has been given, without waiting for that work.

    Args:
        data: tensor or array; it is pinned first where it is not yet.
        device: where to.
    """
    tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if needs_pinning(device) and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
