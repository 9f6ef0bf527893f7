"""Partitions of an image: k-means, and how well one partition matches another.

A partition is an array of integers (H, W): pixels with the same number belong together, whichever
number it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.evaluation.labelled_images import IGNORED

__all__ = [
    "BOUNDARY_TOLERANCE",
    "adjusted_rand_index",
    "boundaries",
    "boundary_f_score",
    "enlarge_labels",
    "kmeans",
]


def kmeans(
    points: Tensor,
    num_clusters: int,
    seed: int | Sequence[int],
    num_restarts: int = 3,
    max_iterations: int = 50,
) -> Tensor:
    """Cluster by Lloyd's algorithm from k-means++ starts, and keep the run of least distortion.

    Args:
        points: (N, D).
        num_clusters: K; with fewer distinct points some clusters stay empty.
        seed: seed for the starts.
        num_restarts: number of starts.
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
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(max_iterations):
        previous, labels = labels, _squared_distances(points, centroids).argmin(dim=1)
        if torch.equal(previous, labels):
            break
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        counts = labels.bincount(minlength=num_clusters)
        # An empty cluster stays where it is.
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    distortion = _squared_distances(points, centroids).amin(dim=1).double().sum()
    return labels, float(distortion)


def _plus_plus(between: np.ndarray, num_clusters: int, generator: np.random.Generator) -> list[int]:
    """Draw starts by k-means++ (Arthur and Vassilvitskii, 2007).

    The odds of a point are its squared distance to the nearest start that was drawn before.

    Args:
        between: (N, N) squared distances.
        num_clusters: number of starts.
        generator: generator of the draws.
    """
    chosen = [int(generator.integers(len(between)))]
    nearest = between[chosen[0]].copy()
    while len(chosen) < num_clusters:
        odds = nearest.cumsum()
        place = generator.random() * odds[-1]
        # Where all points coincide with a start, all odds are 0 and any point will do.
        chosen.append(min(int(np.searchsorted(odds, place, side="right")), len(between) - 1))
        np.minimum(nearest, between[chosen[-1]], out=nearest)
    return chosen


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared Euclidean distances, (N, K)."""
    return torch.cdist(points, centroids, compute_mode="use_mm_for_euclid_dist").square()


BOUNDARY_TOLERANCE = 0.0075
"""Distance at which boundaries match, as a share of the diagonal (Martin et al., PAMI 2004)."""


def adjusted_rand_index(first: np.ndarray, second: np.ndarray) -> float:
    """Measure the agreement of two partitions about pairs, corrected for chance.

    The adjusted Rand index (Hubert and Arabie, Comparing partitions, 1985) is 1 for equal
    partitions, 0 on average for random ones, negative where they agree less than by chance.

    Args:
        first: labels of any shape.
        second: labels of the same shape.

    Returns:
        The index; 1 where both put everything into one part, or each pixel into its own.
    """
    first, second = _counted_from_zero(first), _counted_from_zero(second)
    joint = _counts(first * (int(second.max(initial=0)) + 1) + second)
    # Python's floats: products of the counts of pairs do not fit into 64-bit integers.
    together = _pairs(joint)
    in_first, in_second = _pairs(np.bincount(first)), _pairs(np.bincount(second))
    pairs = first.size * (first.size - 1) / 2
    expected = in_first * in_second / pairs if pairs else 0.0
    best = (in_first + in_second) / 2
    return 1.0 if best == expected else (together - expected) / (best - expected)


def _counted_from_zero(labels: np.ndarray) -> np.ndarray:
    """Flatten labels and make them small; all pixels are sorted only where labels are large."""
    labels = labels.ravel().astype(np.int64)
    if labels.size and np.ptp(labels) < labels.size:
        return labels - labels.min()
    return np.unique(labels, return_inverse=True)[1]


def _counts(labels: np.ndarray) -> np.ndarray:
    """Count how often each label occurs, in any order, possibly with zeros."""
    if labels.max(initial=0) < 4 * labels.size:
        return np.bincount(labels)
    return np.unique(labels, return_counts=True)[1]


def _pairs(counts: np.ndarray) -> float:
    counts = counts.astype(np.int64)
    return float((counts * (counts - 1) // 2).sum())


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Mark pixels whose label differs from the one to their right or below, (H, W) bool.

    There is no boundary where one of the two is `IGNORED`.
    """
    result = np.zeros(labels.shape, dtype=bool)
    known = labels != IGNORED
    differs = (labels[:, :-1] != labels[:, 1:]) & known[:, :-1] & known[:, 1:]
    result[:, :-1] |= differs
    differs = (labels[:-1] != labels[1:]) & known[:-1] & known[1:]
    result[:-1] |= differs
    return result


def boundary_f_score(
    truth: np.ndarray, predicted: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE
) -> float:
    """Harmonic mean of precision and recall of the boundaries between parts.

    A predicted boundary pixel is right if a true one lies within the tolerance, and a true one is
    found if a predicted one does; Euclidean distance, many to one, as in DAVIS.

    Args:
        truth: (H, W); predictions where it is `IGNORED` do not count.
        predicted: (H, W).
        tolerance: share of the diagonal; rounded up to whole pixels.

    Returns:
        F in [0, 1]; 1 where neither has a boundary, 0 where only one has.
    """
    true_edges = boundaries(truth)
    found_edges = boundaries(predicted) & (truth != IGNORED)
    if not true_edges.any() or not found_edges.any():
        return float(true_edges.any() == found_edges.any())
    radius = np.ceil(tolerance * np.hypot(*truth.shape))
    precision = (_distance_to(true_edges)[found_edges] <= radius).mean()
    recall = (_distance_to(found_edges)[true_edges] <= radius).mean()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def _distance_to(edges: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest edge, in pixels."""
    return cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def enlarge_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarge labels of tokens to labels of pixels, with smooth borders.

    Each part's indicator is resampled bilinearly and the largest wins, as for classes in
    :func:`flsl_d2.evaluation.segmentation.label_pixels`. The cost does not grow with the number of
    parts, because only the four tokens around a pixel matter.

    Args:
        labels: (rows, columns).
        size: H and W.

    Returns:
        (H, W); of equal shares the smallest label wins.
    """
    top, bottom, low = _neighbours(labels.shape[0], size[0])
    left, right, near = _neighbours(labels.shape[1], size[1])
    low, near = low[:, None], near[None]
    corners = [
        (labels[np.ix_(rows, columns)], row_share * column_share)
        for rows, row_share in ((top, 1 - low), (bottom, low))
        for columns, column_share in ((left, 1 - near), (right, near))
    ]
    winner = corners[0][0]
    contested = np.logical_or.reduce([label != winner for label, _ in corners[1:]])
    corners = [(label[contested], weight[contested]) for label, weight in corners]
    best = np.full(len(corners[0][0]), -1.0)
    chosen = np.zeros(len(best), dtype=labels.dtype)
    for candidate, _ in corners:
        share = sum(weight * (label == candidate) for label, weight in corners)
        better = (share > best) | ((share == best) & (candidate < chosen))
        best[better], chosen[better] = share[better], candidate[better]
    winner[contested] = chosen
    return winner


def _neighbours(count: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the cells before and after the centre of every pixel, and the share of the latter."""
    place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, count - 1), place - before
