"""From scores of tokens to labels of pixels, and mean intersection over union.

Shape suffixes: N tokens on a grid of rows x columns, H x W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import IGNORED

__all__ = ["Confusion", "label_pixels", "patch_distributions"]


def patch_distributions(
    labels: np.ndarray, grid: tuple[int, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Share of each class in every patch.

    Args:
        labels: (H, W) classes of pixels, `IGNORED` for none.
        grid: rows and columns of patches that the image is cut into.
        num_classes: C.

    Returns:
        (N, C) float32 whose rows sum to 1, and (N,) bool: which patches have a labelled pixel
        (the other rows are 0).
    """
    height, width = labels.shape
    rows = (np.arange(height) * 2 + 1) * grid[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * grid[1] // (2 * width)
    cells = rows[:, None] * grid[1] + columns
    labelled = labels != IGNORED
    counts = np.bincount(
        cells[labelled] * num_classes + labels[labelled], minlength=grid[0] * grid[1] * num_classes
    ).reshape(-1, num_classes)
    total = counts.sum(axis=1, keepdims=True)
    return (counts / np.maximum(total, 1)).astype(np.float32), total[:, 0] > 0


def label_pixels(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The class with the highest score at every pixel.

    Args:
        scores: (N, C) of the tokens; resampled bilinearly to pixels.
        grid: rows and columns, N = rows * columns.
        size: H and W.

    Returns:
        (H, W) int64. Of equal scores the lowest class wins.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    label = torch.zeros(size, dtype=torch.int64, device=scores.device)
    # One class at a time: all of them would take gigabytes for a large image with many classes.
    for index, plane in enumerate(scores.T.reshape(-1, 1, 1, *grid)):
        full = F.interpolate(plane, size=size, mode="bilinear", align_corners=False)[0, 0]
        better = full > best
        best[better] = full[better]
        label[better] = index
    return label.cpu().numpy()


class Confusion:
    """Counts of pixels by their true and their predicted class.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count the pixels of one image; those whose truth is `IGNORED` are left out."""
        num_classes = len(self.counts)
        known = truth != IGNORED
        pairs = truth[known] * num_classes + predicted[known]
        self.counts += np.bincount(pairs, minlength=num_classes**2).reshape(self.counts.shape)

    def results(self, names: Sequence[str]) -> dict[str, float]:
        """Mean IoU over the classes that occur in the truth, and pixel accuracy, in percent.

        The IoU of each is there, too, where the data set has at most 20 classes.

        Raises:
            InputError: nothing was counted.
        """
        if not self.counts.any():
            raise InputError("no pixel of the validation images has a label; use other images.")
        hits = np.diag(self.counts)
        true, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        occurs = true > 0
        iou = 100.0 * hits / np.maximum(true + predicted - hits, 1)
        scores = {
            "mIoU": float(iou[occurs].mean()),
            "pixel_accuracy": float(100.0 * hits.sum() / true.sum()),
        }
        if len(names) <= 20:
            scores |= {f"IoU-{names[i]}": float(iou[i]) for i in np.flatnonzero(occurs)}
        return scores
