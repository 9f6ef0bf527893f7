"""Partitions of an image (H, W), whose numbers are names: k-means, and how boundaries match."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.evaluation.benchmarks import IGNORED

# Distance at which boundaries match, as a share of the diagonal (Martin et al., PAMI 2004).
BOUNDARY_TOLERANCE = 0.0075


def kmeans(
    points: Tensor, num_clusters: int, seed: int | Sequence[int], num_restarts: int = 3
) -> Tensor:
    """Cluster points (N, D) by scikit-learn's k-means, the best of k-means++ starts: (N,) int64.

    With fewer distinct points than clusters some clusters stay empty.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    state, count = int(np.random.default_rng(seed).integers(2**32)), min(num_clusters, len(points))
    model = KMeans(count, n_init=num_restarts, max_iter=50, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        labels = model.fit_predict(points.detach().cpu().float().numpy())
    return torch.from_numpy(labels).to(points.device, torch.int64)


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Mark pixels whose label differs from the one to their right or below, (H, W) bool.

    There is no boundary where one of the two is `IGNORED`.
    """
    result = np.zeros(labels.shape, dtype=bool)
    known = labels != IGNORED
    result[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & known[:, :-1] & known[:, 1:]
    result[:-1] |= (labels[:-1] != labels[1:]) & known[:-1] & known[1:]
    return result


def match_boundaries(found: np.ndarray, true: np.ndarray, tolerance: float) -> float:
    """F, the harmonic mean of precision and recall of boundary pixels (H, W) bool, 0 to 1.

    A pixel is matched if the other boundary has one within the tolerance, a share of the image's
    diagonal that is rounded up to whole pixels. F is 1 where neither has a boundary.
    """
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    radius = np.ceil(tolerance * np.hypot(*true.shape))
    # Matches lie within the bounding box of the boundaries, and objects are small.
    rows, columns = (np.flatnonzero((found | true).any(axis=axis)) for axis in (1, 0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    found, true = found[window], true[window]
    precision = (_distance_to(true)[found] <= radius).mean()
    recall = (_distance_to(found)[true] <= radius).mean()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def _distance_to(edges: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def boundary_f_score(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F of the boundaries between parts; predictions do not count where the truth is `IGNORED`."""
    found = boundaries(predicted) & (truth != IGNORED)
    return match_boundaries(found, boundaries(truth), BOUNDARY_TOLERANCE)


def enlarge_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarge labels of tokens (rows, columns) to labels of pixels (H, W), with smooth borders.

    Each part's indicator is resampled bilinearly and the largest wins; of equal shares the smallest
    label. Only the four tokens around a pixel matter, so many parts cost no more than few.
    """
    (top, bottom, low), (left, right, near) = map(_neighbours, labels.shape, size)
    corners = np.stack([labels[np.ix_(r, c)] for r in (top, bottom) for c in (left, right)])
    result = corners[0].copy()
    contested = (corners != result).any(axis=0)
    around = corners[:, contested]
    weights = [np.outer(r, c)[contested] for r in (1 - low, low) for c in (1 - near, near)]
    shares = np.stack([((around == label) * weights).sum(axis=0) for label in around])
    largest = shares == shares.max(axis=0, initial=0)
    result[contested] = np.where(largest, around, labels.max()).min(axis=0)
    return result


def _neighbours(count: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the cells before and after the centre of every pixel, and the share of the latter."""
    place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, count - 1), place - before
