"""The encoder that a command line names, ready to be evaluated."""

from __future__ import annotations

import torch

from flsl_d2.checkpoint import build_encoder
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT

__all__ = ["RANDOM", "frozen_encoder", "usable_device"]

RANDOM = "random"


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        InputError: PyTorch does not know it, or sees none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"the device {name!r} is unknown to PyTorch; give cuda or cpu.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"the device is {name!r}, but PyTorch sees no GPU here; give cpu.")
    return device


def frozen_encoder(weights: str, seed: int = 0) -> FLSLViT:
    """An encoder in evaluation mode, on the CPU, whose parameters take no gradient.

    Args:
        weights: file or URL, see :func:`flsl_d2.checkpoint.build_encoder`; ``random`` for an
            untrained ViT-S/16.
        seed: of untrained weights. The global generators are not touched.

    Raises:
        InputError: the file cannot be used.
    """
    if weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = FLSLViT()
    else:
        encoder = build_encoder(weights)
    return encoder.eval().requires_grad_(False)
