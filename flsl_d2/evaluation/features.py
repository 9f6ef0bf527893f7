"""Frozen encoders and the tokens of images, as every evaluation and picture uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.engine.gpus import check_device
from flsl_d2.errors import InputError
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import channels_format, preview, read_image
from flsl_d2.images.stored_format import stored_format
from flsl_d2.modeling import Encoder, FLSLViT, InputFormat
from flsl_d2.modeling.timm_backbone import TIMM_PREFIX, TimmBackbone, build_timm_backbone
from flsl_d2.weights import build_encoder

RANDOM = "random"
_encoding_dtype: ContextVar[torch.dtype | None] = ContextVar("encoding_dtype", default=None)


def device_of(encoder: Encoder) -> torch.device:
    """Return the device that holds an encoder's weights."""
    return next(iter(encoder.state_dict().values())).device


def usable_device(name: str) -> torch.device:
    """Return a device by its name; InputError where this machine does not have it."""
    check_device(name)
    return torch.device(name)


def frozen_encoder(
    weights: str, seed: int = 0, architecture: Mapping[str, Any] | None = None
) -> Encoder:
    """Build an encoder in evaluation mode, on the CPU, whose parameters take no gradient.

    The weights are a file or URL of :func:`flsl_d2.weights.build_encoder`, ``timm:NAME``, or
    ``random``: an untrained ViT-S/16, or :class:`FLSLViT` of the ``architecture``, from the seed.
    The global generators are not touched.
    """
    encoder: FLSLViT | TimmBackbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights == RANDOM:
            encoder = FLSLViT(**(architecture or {}))
        elif weights.startswith(TIMM_PREFIX):
            encoder = build_timm_backbone(weights)
        else:
            encoder = build_encoder(weights)
    encoder.eval().requires_grad_(False)
    return encoder


class TokenFeatures(NamedTuple):
    """Tokens (N, D) of one image, row-major over the grid (rows, columns).

    The image is what the encoder saw, (H, W, 3) uint8 RGB of whole patches.
    """

    tokens: Tensor
    grid: tuple[int, int]
    image: np.ndarray

    def on_cpu(self) -> TokenFeatures:
        """Return the tokens as float32 on the CPU; ValueError if they do not fill the grid."""
        if self.tokens.ndim != 2 or len(self.tokens) != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"tokens of shape {tuple(self.tokens.shape)} do not fill a grid of {self.grid[0]} "
                f"x {self.grid[1]}: expected (N, D) with N = rows * columns"
            )
        return self._replace(tokens=self.tokens.detach().cpu().float())


@contextmanager
def encoding_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Encode images under autocast to a data type within the context; tokens stay float32."""
    token = _encoding_dtype.set(dtype)
    try:
        yield
    finally:
        _encoding_dtype.reset(token)


def read_for(taken: InputFormat, path: str) -> np.ndarray:
    """Read a picture as an encoder takes it: (H, W, 3) uint8 RGB, or (H, W, C) stored values."""
    if (taken.channels, taken.bits) == (3, 8):
        return read_image(path)
    try:
        bits = stored_format(path)[1]
    except OSError as error:
        raise InputError(f"the image '{printable(path)}' cannot be used ({error}).") from None
    if bits != taken.bits:
        raise InputError(
            f"the image '{printable(path)}' has {bits} bits a channel, and the encoder takes "
            f"{taken.bits} bits of {taken.channels} channel(s); give pictures like those that it "
            "was trained on."
        )
    return read_image(path, channels_format(taken.channels))


def resize_pixels(image: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """Resize an image (H, W, C) to a height and width by OpenCV, which drops a single channel."""
    return cv2.resize(image, size[::-1], interpolation=interpolation).reshape(*size, -1)


@torch.inference_mode()
def encode_images(encoder: Encoder, images: np.ndarray, pad: bool = False) -> Tensor:
    """Normalise and encode images (B, H, W, C) of the encoder's input format: (B, N, D) float32.

    The images have whole patches, or ``pad`` adds zeros at the right and the bottom.
    """
    device = device_of(encoder)
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
    taken = encoder.input_format
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (taken.mean, taken.std))
    pixels, dtype = (pixels - mean) / std, _encoding_dtype.get()
    if pad:
        missing = [-side % encoder.patch_size for side in pixels.shape[-2:]]
        pixels = F.pad(pixels, (0, missing[1], 0, missing[0]))
    with torch.autocast(device.type, dtype) if dtype else nullcontext():
        return encoder.forward_tokens(pixels).float()


def extract_tokens(
    encoder: Encoder, image: np.ndarray, short_side: int | None = 448, max_long_side: int = 1333
) -> TokenFeatures:
    """Encode one image (H, W, C), as :func:`read_for` returns it, to tokens of the last block.

    Its shorter side gets so many pixels (None: its own), and both are rounded to whole patches.
    """
    channels = encoder.input_format.channels
    is_rgb = (channels, encoder.input_format.bits) == (3, 8)
    if image.ndim != 3 or image.shape[2] != channels or (is_rgb and image.dtype != np.uint8):
        expected = "uint8 RGB (H, W, 3)" if is_rgb else f"stored values (H, W, {channels})"
        raise InputError(
            f"the image is {image.dtype} of shape {image.shape}, and the encoder takes images of "
            f"{channels} channel(s); give {expected}."
        )
    patch, sides = encoder.patch_size, image.shape[:2]
    factor = 1.0
    if short_side is not None:
        factor = min(short_side / min(sides), max_long_side / max(sides))
    rows, columns = (max(round(side * factor / patch), 1) for side in sides)
    interpolation = cv2.INTER_AREA if columns * patch < sides[1] else cv2.INTER_CUBIC
    resized = resize_pixels(image, (rows * patch, columns * patch), interpolation)
    tokens = encode_images(encoder, resized[None])[0]
    return TokenFeatures(tokens, (rows, columns), preview(resized))
