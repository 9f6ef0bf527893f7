"""From a video and the mask of its first frame to the masks of the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.sequences import Sequence, read_frame, read_mask
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "Propagation",
    "frame_size",
    "propagate",
    "propagate_through",
    "segment_sequence",
]

# Cosine similarities this close to the last of the nearest are as near. Tokens that repeat, as in
# a still video, tie; without this, rounding would choose among them.
_TIE = 1e-6

# Similarities held at once, 128 MiB of float32; a row of the grid is the least.
_MAX_PAIRS = 2**25


@dataclass(frozen=True)
class Propagation:
    """How labels are propagated; the defaults are the protocol's.

    Attributes:
        radius: of the neighbourhood in tokens, in rows and in columns; 0 for no restriction.
        context: how many past frames give labels, besides the first one.
        top_k: how many neighbours, of all those frames together, give labels.
        temperature: of the neighbours' weights exp(cosine similarity / temperature).

    Raises:
        InputError: a value out of range.
    """

    radius: int = 12
    context: int = 7
    top_k: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("radius", self.radius, 0),
            ("context", self.context, 0),
            ("top_k", self.top_k, 1),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; give {least} or more.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; give a number above 0.")


def propagate_through(
    frames: Iterable[Tensor],
    first_labels: Tensor,
    grid: tuple[int, int],
    settings: Propagation,
) -> Iterator[Tensor]:
    """Labels of every frame after the first, each from those before it.

    Args:
        frames: tokens (N, D) of each frame, in order. Only the context is kept.
        first_labels: (N, K), what each token of the first frame is.
        grid: rows and columns of tokens.
        settings: of the propagation.

    Yields:
        (N, K) float32 for each frame but the first. Rows sum to 1 where those of `first_labels`
        do.
    """
    first: tuple[Tensor, Tensor] | None = None
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.context)
    for tokens in frames:
        tokens = F.normalize(tokens.float(), dim=1)
        if first is None:
            first = tokens, first_labels.float()
            continue
        sources, labels = zip(first, *past, strict=True)
        found = propagate(tokens, torch.stack(sources), torch.stack(labels), grid, settings)
        past.append((tokens, found))
        yield found


def propagate(
    queries: Tensor,
    sources: Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    settings: Propagation,
    max_pairs: int = _MAX_PAIRS,
) -> Tensor:
    """Labels of one frame's tokens from their nearest neighbours in other frames.

    Args:
        queries: (N, D), unit length; row-major over the grid.
        sources: (C, N, D), likewise, of C frames.
        labels: (C, N, K) of the sources.
        grid: rows and columns, N = rows * columns.
        settings: of the propagation; `context` is not used here.
        max_pairs: bound of the similarities held at once. Changes the memory, not the result.

    Returns:
        (N, K): the average label of the `top_k` most similar tokens within the neighbourhood
        (and of any that tie with the last of them), weighted by exp(similarity / temperature).
    """
    rows, columns = grid
    radius = settings.radius or max(grid)
    step = max(max_pairs // (sources.shape[0] * rows * columns * columns), 1)
    # (C, N, .) as (rows, C, columns, .): a band of rows is then one block of memory.
    sources = sources.unflatten(1, grid).transpose(0, 1).contiguous()
    labels = labels.unflatten(1, grid).transpose(0, 1).contiguous()
    found = []
    for start in range(0, rows, step):
        end = min(start + step, rows)
        low, high = max(start - radius, 0), min(end + radius, rows)
        similarity = queries[start * columns : end * columns] @ sources[low:high].flatten(0, 2).T
        far = _apart(start, end, low, high, radius, queries.device)[:, None, :, None, None]
        far = far | _apart(0, columns, 0, columns, radius, queries.device)[None, :, None, None, :]
        shape = (end - start, columns, high - low, sources.shape[1], columns)
        similarity.view(shape).masked_fill_(far, -torch.inf)
        weights = _nearest_weights(similarity, settings)
        found.append(weights @ labels[low:high].flatten(0, 2))
    return torch.cat(found)


def _apart(start: int, end: int, low: int, high: int, radius: int, device: torch.device) -> Tensor:
    """(end - start, high - low) bool: positions on one axis further apart than the radius."""
    here = torch.arange(start, end, device=device)[:, None]
    there = torch.arange(low, high, device=device)
    return (here - there).abs() > radius


def _nearest_weights(similarity: Tensor, settings: Propagation) -> Tensor:
    """(n, m) similarities to weights that sum to 1; zero beyond the nearest. In place."""
    top_k = min(settings.top_k, similarity.shape[1])
    nearest = similarity.topk(top_k, dim=1).values
    similarity.masked_fill_(similarity < nearest[:, -1:] - _TIE, -torch.inf)
    return similarity.div_(settings.temperature).softmax(dim=1)


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
