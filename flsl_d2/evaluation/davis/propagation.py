"""Label propagation: a frame's tokens take the labels of their nearest neighbours in past frames.

The protocol of Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS
2020), as DINO (Caron et al., ICCV 2021) and FLSL use it to compare frozen features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flsl_d2.errors import InputError

__all__ = ["Propagation", "propagate", "propagate_through"]

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
