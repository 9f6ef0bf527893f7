"""J and F of DAVIS, and their statistics over a sequence.

The definitions are those of Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for
Video Object Segmentation" (CVPR 2016), Sec. 5. What the paper leaves open (tolerance, borders of
the image, quarters of a sequence) follows the benchmark's own evaluation of DAVIS 2017.
"""

from __future__ import annotations

import numpy as np

from flsl_d2.evaluation.partitions import match_boundaries

_TOLERANCE = 0.008  # distance within which boundaries match, as a share of the diagonal


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection over union of two masks (H, W) bool; 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """F of the boundaries of two masks (H, W) bool, within 0.8% of the image's diagonal."""
    return match_boundaries(_boundary(mask), _boundary(truth), _TOLERANCE)


def statistics(values: np.ndarray) -> np.ndarray:
    """Mean, recall and decay over the scored frames, along the first axis: (3, ...).

    Recall is the share of the frames above 0.5, decay the mean of the first quarter minus that of
    the last. The quarters overlap by the frame where they meet, as in the benchmark's evaluation.
    """
    # Halves round up; the small addend keeps them from rounding to even.
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return np.stack([values.mean(0), (values > 0.5).mean(0), first.mean(0) - last.mean(0)])


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Mark pixels that differ from a neighbour to the right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")  # there is no boundary at the border
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
