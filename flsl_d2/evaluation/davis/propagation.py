"""Propagation of the first frame's mask through a video by nearest neighbours of frozen tokens.

Shape suffixes: N tokens of a frame, D width, C frames of the context, K labels, H x W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.sequences import Sequence, read_mask
from flsl_d2.evaluation.features import device_of, encode_images, read_for, resize_pixels
from flsl_d2.modeling import Encoder

# Tokens that repeat, as in a still video, tie with the last of the nearest neighbours. All whose
# cosine similarity is this close count, because rounding would choose among them otherwise.
_TIE = 1e-6
_FLAT = 1e-6  # range of a label below which it is the same everywhere but for rounding

# Similarities held at once, 128 MiB of float32; at least those of a row of the grid.
_MAX_PAIRS = 2**25
_SIDE_UNIT = 64  # published numbers come from longer sides that are multiples of it
_READING_THREADS = 4


@dataclass(frozen=True)
class Propagation:
    """Settings of the propagation of labels; the defaults are the protocol's.

    Attributes:
        radius: radius of the neighbourhood in rows and in columns of tokens; 0 for no restriction.
        context: number of past frames that give labels, in addition to the first one.
        top_k: number of neighbours, of all those frames together, that give labels.
        temperature: T of the neighbours' weights exp(cosine similarity / T).
    """

    radius: int = 12
    context: int = 7
    top_k: int = 5
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("radius", 0), ("context", 0), ("top_k", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; give {least} or more.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; give a number above 0.")


def propagate_through(
    frames: Iterable[Tensor], first_labels: Tensor, grid: tuple[int, int], settings: Propagation
) -> Iterator[Tensor]:
    """Propagate labels (N, K) of the first frame to each later one, from the frames before it.

    Only the context is kept in memory. Rows of the results sum to 1 where those of the first do.
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
    """Label one frame's tokens (N, D) by their nearest neighbours in others (C, N, D): (N, K).

    All tokens are of unit length. The result is the average label of the ``top_k`` most similar
    tokens within the neighbourhood, and of any that tie with the last of them, weighted by
    exp(similarity / temperature). ``max_pairs`` bounds the similarities held at once.
    """
    rows, columns = grid
    radius = settings.radius or max(grid)
    step = max(max_pairs // (sources.shape[0] * rows * columns * columns), 1)
    # (C, N, .) as (rows, C, columns, .): a band of rows is then one block of memory.
    sources = sources.unflatten(1, grid).transpose(0, 1).contiguous()
    labels = labels.unflatten(1, grid).transpose(0, 1).contiguous()

    def apart(first: range, second: range) -> Tensor:
        """Mark positions on one axis further apart than the radius, (first, second) bool."""
        here, there = (torch.tensor(each, device=queries.device) for each in (first, second))
        return (here[:, None] - there).abs() > radius

    found = []
    for start in range(0, rows, step):
        end = min(start + step, rows)
        low, high = max(start - radius, 0), min(end + radius, rows)
        similarity = queries[start * columns : end * columns] @ sources[low:high].flatten(0, 2).T
        far = apart(range(start, end), range(low, high))[:, None, :, None, None]
        far = far | apart(range(columns), range(columns))[None, :, None, None, :]
        shape = (end - start, columns, high - low, sources.shape[1], columns)
        similarity.view(shape).masked_fill_(far, -torch.inf)
        nearest = similarity.topk(min(settings.top_k, similarity.shape[1]), dim=1).values
        similarity.masked_fill_(similarity < nearest[:, -1:] - _TIE, -torch.inf)
        weights = similarity.div_(settings.temperature).softmax(dim=1)
        found.append(weights @ labels[low:high].flatten(0, 2))
    return torch.cat(found)


def frame_size(size: tuple[int, int], short_side: int, patch_size: int) -> tuple[int, int]:
    """Size that a frame is resized to: whole patches, and the protocol's where the patch allows.

    The longer side keeps the aspect ratio and is cut to a multiple of 64, or of the patch size
    where that does not divide 64: 480 x 854 becomes 480 x 832 with patches of 16, and 476 x 854
    with 14.
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
    encoder: Encoder,
    sequence: Sequence,
    settings: Propagation | None = None,
    short_side: int = 480,
    batch_size: int = 8,
) -> Generator[np.ndarray, None, None]:
    """Segment all frames of a sequence by the mask of the first: yields masks (H, W) uint8.

    All objects are propagated at once; 0 is the background. Memory holds one batch of frames and
    the tokens of the context.
    """
    first_mask = read_mask(sequence.masks[0])
    if not first_mask.any():
        raise InputError(f"mask '{sequence.masks[0]}' has no object, so nothing can be followed.")
    yield first_mask
    size = frame_size(sequence.size, short_side, encoder.patch_size)
    grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    # Numbers may have gaps, and an absent object has nothing to be propagated.
    numbers, ranks = np.unique(first_mask, return_inverse=True)
    if numbers[0]:  # no background
        numbers, ranks = np.append(0, numbers), ranks + 1
    ranks = ranks.reshape(first_mask.shape).astype(np.uint8)
    # Each token has the label at the centre of its patch, one-hot (N, 1 + objects).
    small = Image.fromarray(ranks).resize(grid[::-1], Image.Resampling.NEAREST)
    indexes = torch.from_numpy(np.array(small)).long().flatten()
    first_labels = F.one_hot(indexes, int(ranks.max()) + 1).float().to(device_of(encoder))
    taken = encoder.input_format

    def read(path: Path) -> np.ndarray:
        return resize_pixels(read_for(taken, str(path)), size, cv2.INTER_LINEAR)

    with ThreadPoolExecutor(_READING_THREADS) as pool:
        tokens = _tokens(encoder, pool.map(read, sequence.frames), batch_size)
        for labels in propagate_through(tokens, first_labels, grid, settings or Propagation()):
            yield numbers.astype(np.uint8)[_mask_of(labels, grid, size, sequence.size)]


def _tokens(encoder: Encoder, images: Iterator[np.ndarray], batch_size: int) -> Iterator[Tensor]:
    """Yield the tokens (N, D) of each image, which are encoded in batches."""
    while batch := list(islice(images, batch_size)):
        tokens = encode_images(encoder, np.stack(batch))
        if not tokens.isfinite().all():
            raise InputError(
                "the encoder's tokens are not finite numbers; check the weights it was given."
            )
        yield from tokens


def _mask_of(
    labels: Tensor, grid: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> np.ndarray:
    """Turn soft labels (N, K) of tokens into indexes (H, W) of pixels.

    Each label is enlarged to the encoder's image and stretched to 0 to 1, because the label of a
    small object fades most; then the largest wins.
    """
    maps = labels.T.unflatten(1, grid)[None]
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low < _FLAT
    stretched = torch.where(flat, maps, (maps - low) / (high - low).clamp_min(_FLAT))
    mask = Image.fromarray(stretched.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(mask.resize(original[::-1], Image.Resampling.NEAREST))
