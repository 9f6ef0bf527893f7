"""Frozen features: the tokens of an image, as every evaluation and picture uses them."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD
from flsl_d2.weights import build_encoder

__all__ = [
    "RANDOM",
    "TokenFeatures",
    "extract_tokens",
    "frozen_encoder",
    "usable_device",
]

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
        weights: file or URL, see :func:`flsl_d2.weights.build_encoder`; ``random`` for an
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


class TokenFeatures(NamedTuple):
    """Tokens of one image.

    Attributes:
        tokens: (N, D) float32, row-major over the grid, on the encoder's device.
        grid: rows and columns of tokens, N = rows * columns.
        image: (H, W, 3) uint8 RGB as the encoder saw it, H and W multiples of the patch size.
    """

    tokens: Tensor
    grid: tuple[int, int]
    image: np.ndarray


@torch.inference_mode()
def extract_tokens(
    encoder: FLSLViT,
    image: np.ndarray,
    short_side: int | None = 448,
    max_long_side: int = 1333,
) -> TokenFeatures:
    """Tokens of the encoder's last block for one image.

    The image keeps its aspect ratio up to the rounding of both sides to whole patches.

    Args:
        encoder: in evaluation mode.
        image: (H, W, 3) uint8 RGB.
        short_side: pixels to resize the shorter side to; None keeps the size of the image.
        max_long_side: bound of the longer side in pixels, where the image is resized.

    Raises:
        InputError: not an (H, W, 3) uint8 image.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"the image is {image.dtype} of shape {image.shape}; give uint8 RGB (H, W, 3)."
        )
    patch = encoder.patch_size
    height, width = image.shape[:2]
    factor = 1.0
    if short_side is not None:
        factor = min(short_side / min(height, width), max_long_side / max(height, width))
    rows = max(round(height * factor / patch), 1)
    columns = max(round(width * factor / patch), 1)
    size = (columns * patch, rows * patch)
    shrinks = size[0] < width
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    device = encoder.pos_embed.device
    pixels = torch.from_numpy(resized).to(device).permute(2, 0, 1).float()
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    tokens = encoder.forward_tokens(((pixels - mean) / std)[None])[0]
    return TokenFeatures(tokens.float(), (rows, columns), resized)
