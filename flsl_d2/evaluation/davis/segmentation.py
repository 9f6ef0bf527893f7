"""From a video and the mask of its first frame to the masks of the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.propagation import Propagation, propagate_through
from flsl_d2.evaluation.davis.sequences import Sequence, read_frame, read_mask
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["frame_size", "segment_sequence"]

_SIDE_UNIT = 64  # published numbers come from longer sides that are multiples of it
_READING_THREADS = 4
_FLAT = 1e-6


def frame_size(size: tuple[int, int], short_side: int, patch_size: int) -> tuple[int, int]:
    """What a frame is resized to: whole patches, the protocol's size where the patch allows it.

    The shorter side becomes `short_side`, cut to whole patches. The longer one keeps the aspect
    ratio up to being cut to a multiple of 64, or of the patch size where that does not divide 64;
    480 x 854 becomes 480 x 832 with patches of 8 or 16, and 476 x 854 with patches of 14.

    Args:
        size: height and width of the frame.
        short_side: in pixels.
        patch_size: of the encoder, in pixels.

    Raises:
        InputError: the shorter side is smaller than a patch.
    """
    if short_side < patch_size:
        raise InputError(
            f"the short side is {short_side} pixels, less than a patch of {patch_size}; "
            "the protocol's is 480."
        )
    unit = _SIDE_UNIT if _SIDE_UNIT % patch_size == 0 else patch_size
    short = short_side // patch_size * patch_size
    long = max(short_side * max(size) // min(size) // unit * unit, short)
    return (short, long) if size[0] <= size[1] else (long, short)


@torch.inference_mode()
def segment_sequence(
    encoder: FLSLViT,
    sequence: Sequence,
    settings: Propagation | None = None,
    short_side: int = 480,
    batch_size: int = 8,
) -> Iterator[np.ndarray]:
    """Masks of all frames of a sequence, the first one as given.

    All objects are propagated at once. Memory holds one batch of frames and the tokens of the
    context, besides the resized frames themselves.

    Args:
        encoder: in evaluation mode; its device is where all but reading and writing happens.
        sequence: checked.
        settings: of the propagation; the protocol's by default.
        short_side: see :func:`frame_size`.
        batch_size: frames that are encoded together.

    Yields:
        (H, W) uint8 for each frame, of the sequence's own size; 0 is the background.

    Raises:
        InputError: a file cannot be decoded, the first mask has no object, or the encoder gives
            numbers that are not finite.
    """
    first_mask = read_mask(sequence.masks[0])
    if not first_mask.any():
        raise InputError(f"mask '{sequence.masks[0]}' has no object, so nothing can be followed.")
    yield first_mask
    size = frame_size(sequence.size, short_side, encoder.patch_size)
    grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    first_labels = _token_labels(first_mask, grid).to(encoder.pos_embed.device)
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        images = pool.map(partial(_read_resized, size=size), sequence.frames)
        tokens = _tokens(encoder, images, batch_size)
        for labels in propagate_through(tokens, first_labels, grid, settings or Propagation()):
            yield _mask_of(labels, grid, size, sequence.size)


def _tokens(encoder: FLSLViT, images: Iterable[np.ndarray], batch_size: int) -> Iterator[Tensor]:
    """(N, D) of each image; encoded in batches."""
    device = encoder.pos_embed.device
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    for batch in _batches(images, batch_size):
        pixels = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2).float()
        tokens = encoder.forward_tokens((pixels - mean) / std)
        if not tokens.isfinite().all():
            raise InputError(
                "the encoder's tokens are not finite numbers; check the weights it was given."
            )
        yield from tokens


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_resized(path: Path, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(read_frame(path), size[::-1], interpolation=cv2.INTER_LINEAR)


def _token_labels(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """One-hot (N, 1 + objects): each token is what lies at the centre of its patch."""
    small = Image.fromarray(mask).resize(grid[::-1], Image.Resampling.NEAREST)
    indexes = torch.from_numpy(np.array(small)).long().flatten()
    return F.one_hot(indexes, int(mask.max()) + 1).float()


def _mask_of(
    labels: Tensor, grid: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> np.ndarray:
    """Soft labels (N, K) of tokens to indexes (H, W) of pixels.

    Each label is enlarged to the encoder's image and stretched to 0 to 1, so that a small object,
    whose label fades most, can still win; the largest does.
    """
    maps = labels.T.unflatten(1, grid)[None]
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A label that is the same everywhere has nothing to stretch but rounding.
    flat = high - low < _FLAT
    stretched = torch.where(flat, maps, (maps - low) / (high - low).clamp_min(_FLAT))
    mask = Image.fromarray(stretched.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(mask.resize(original[::-1], Image.Resampling.NEAREST))
