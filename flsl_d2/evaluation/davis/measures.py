"""J and F of DAVIS, and their statistics over a sequence.

The definitions are those of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for
Video Object Segmentation" (CVPR 2016), Sec. 5. What the paper leaves open (tolerance, borders of
the image, quarters of a sequence) follows the benchmark's own evaluation of DAVIS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

__all__ = ["Statistics", "boundary_accuracy", "region_similarity", "statistics"]

_TOLERANCE = 0.008  # distance within which boundaries match, as a share of the diagonal


class Statistics(NamedTuple):
    """A measure over the frames of one object, or the average over objects; 0 to 1.

    Attributes:
        mean: mean over the frames.
        recall: share of the frames above 0.5.
        decay: mean of the first quarter of the frames minus mean of the last.
    """

    mean: float
    recall: float
    decay: float


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection over union.

    Args:
        mask: (H, W) bool, the prediction.
        truth: (H, W) bool.

    Returns:
        0 to 1; 1 where both are empty.
    """
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """F, the harmonic mean of precision and recall of boundary pixels.

    A boundary pixel is matched if the other mask has one within a distance of 0.8% of the image's
    diagonal, rounded up to whole pixels.

    Args:
        mask: (H, W) bool, the prediction.
        truth: (H, W) bool.

    Returns:
        0 to 1; 1 where neither mask has a boundary, 0 where only one has.
    """
    radius = math.ceil(_TOLERANCE * math.hypot(*mask.shape))
    found, true = _boundary(mask), _boundary(truth)
    num_found, num_true = np.count_nonzero(found), np.count_nonzero(true)
    if num_found == 0 or num_true == 0:
        return float(num_found == num_true)
    # Matches lie within the bounding box of the boundaries, and objects are small.
    window = _bounding_box(found | true)
    found, true = found[window], true[window]
    precision = np.count_nonzero(found & _thickened(true, radius)) / num_found
    recall = np.count_nonzero(true & _thickened(found, radius)) / num_true
    if precision + recall == 0:
        return 0.0
    return 2 * precision * recall / (precision + recall)


def statistics(values: Sequence[float]) -> Statistics:
    """Mean, recall and decay of a measure over the scored frames of one object.

    The quarters overlap by the frame where they meet, as in the benchmark's evaluation.

    Args:
        values: value of each frame, in order; at least one.

    Raises:
        ValueError: ``values`` is empty or has several axes.
    """
    frames = np.asarray(values, dtype=np.float64)
    if frames.ndim != 1 or not len(frames):
        raise ValueError(f"values have shape {frames.shape}; give a sequence of one or more")
    # Halves round up; the small addend keeps them from rounding to even.
    ends = np.round(np.linspace(1, len(frames), 5) + 1e-10).astype(int) - 1
    first, last = frames[ends[0] : ends[1] + 1], frames[ends[3] : ends[4] + 1]
    return Statistics(
        float(frames.mean()), float((frames > 0.5).mean()), float(first.mean() - last.mean())
    )


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Mark pixels that differ from a neighbour to the right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")  # there is no boundary at the border
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _bounding_box(pixels: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _thickened(pixels: np.ndarray, radius: int) -> np.ndarray:
    return cv2.dilate(pixels.astype(np.uint8), _disk(radius)).astype(bool)


@cache
def _disk(radius: int) -> np.ndarray:
    """(2r + 1, 2r + 1) uint8, 1 up to the distance r from the centre."""
    offsets = np.arange(-radius, radius + 1)
    return (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)
