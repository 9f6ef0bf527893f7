"""k-means of one image's tokens, the baseline of mean-shift clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["kmeans"]


def kmeans(
    points: Tensor,
    num_clusters: int,
    seed: int | Sequence[int],
    num_restarts: int = 3,
    max_iterations: int = 50,
) -> Tensor:
    """Lloyd's algorithm from k-means++ starts; the start with the least distortion is kept.

    Args:
        points: (N, D).
        num_clusters: K; with fewer distinct points some clusters stay empty.
        seed: of the starts.
        num_restarts: how many starts are tried.
        max_iterations: bound of the steps after each start.

    Returns:
        (N,) int64 in [0, K), on the device of the points.
    """
    num_clusters = min(num_clusters, len(points))
    generator = np.random.default_rng(seed)
    between = _squared_distances(points, points).double().cpu().numpy()
    runs = [
        _run(points, between, num_clusters, generator, max_iterations) for _ in range(num_restarts)
    ]
    return min(runs, key=lambda run: run[1])[0]


def _run(
    points: Tensor,
    between: np.ndarray,
    num_clusters: int,
    generator: np.random.Generator,
    max_iterations: int,
) -> tuple[Tensor, float]:
    centroids = points[_plus_plus(between, num_clusters, generator)]
    labels = None
    for _ in range(max_iterations):
        distances = _squared_distances(points, centroids)
        previous, labels = labels, distances.argmin(dim=1)
        if previous is not None and torch.equal(previous, labels):
            break
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        counts = labels.bincount(minlength=num_clusters)
        # An empty cluster stays where it is.
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    distortion = _squared_distances(points, centroids).amin(dim=1).double().sum()
    return labels, float(distortion)


def _plus_plus(between: np.ndarray, num_clusters: int, generator: np.random.Generator) -> list[int]:
    """Starts drawn in turn with odds of the squared distance to the nearest earlier one
    (Arthur and Vassilvitskii, 2007).

    Args:
        between: (N, N) squared distances.
        num_clusters: how many.
        generator: of the draws.
    """
    chosen = [int(generator.integers(len(between)))]
    nearest = between[chosen[0]].copy()
    while len(chosen) < num_clusters:
        odds = nearest.cumsum()
        place = generator.random() * odds[-1]
        # Where all points are at a start already, odds are 0 and any point serves.
        chosen.append(min(int(np.searchsorted(odds, place, side="right")), len(between) - 1))
        np.minimum(nearest, between[chosen[-1]], out=nearest)
    return chosen


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """(N, K)."""
    return torch.cdist(points, centroids, compute_mode="use_mm_for_euclid_dist").square()
