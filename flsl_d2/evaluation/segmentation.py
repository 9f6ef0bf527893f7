"""Semantic segmentation from frozen tokens: k-NN and a linear probe.

Shape suffixes: N tokens of an image, D width, C classes, M patches of the bank, H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.classifiers import fit_linear, retrieve
from flsl_d2.evaluation.labelled_images import IGNORED, LabelledDataset
from flsl_d2.evaluation.samples import Sample, Task

_MAX_LISTED_CLASSES = 20
_MEDIUM_AREA, _LARGE_AREA = 32**2, 96**2  # pixels, as in COCO's evaluation
_ELONGATED = 2.0  # longer side over shorter side of an object's bounding box


class PatchBank:
    """Tokens with the share of each class among the pixels of their patch, at most ``size``.

    Every image gives the same number of patches, drawn uniformly among those with a labelled
    pixel. The draw depends on the seed and the index of the image alone.
    """

    def __init__(self, dataset: LabelledDataset, size: int, seed: int) -> None:
        self.num_classes = len(dataset.pixel_classes)
        self.num_images, self.size, self.seed = len(dataset.images), size, seed
        self._tokens: list[Tensor] = []
        self._shares: list[Tensor] = []

    def add(self, sample: Sample) -> None:
        """Draw the patches of one image."""
        first, last = (self.size * (sample.index + step) // self.num_images for step in (0, 1))
        shares, labelled = patch_distributions(sample.image.semantic, sample.grid, self.num_classes)
        candidates = np.flatnonzero(labelled)
        wanted = min(last - first, len(candidates))
        if not wanted:
            return
        generator = np.random.default_rng([self.seed, sample.index])
        chosen = np.sort(generator.choice(candidates, wanted, replace=False))
        self._tokens.append(sample.tokens[torch.as_tensor(chosen, device=sample.tokens.device)])
        self._shares.append(torch.from_numpy(shares[chosen]))

    def all(self) -> tuple[Tensor, Tensor]:
        """Return tokens (M, D) and shares (M, C), on the device of the tokens.

        Raises:
            InputError: no patch has a label.
        """
        if not self._tokens:
            raise InputError("no pixel of the training images has a label; use other images.")
        tokens = torch.cat(self._tokens)
        return tokens, torch.cat(self._shares).to(tokens.device)


def check_labelled_pixels(dataset: LabelledDataset) -> None:
    """Raise InputError where a data set names no classes of pixels."""
    if not dataset.pixel_classes:
        raise InputError(
            f"the data set {dataset.name!r} names no classes of pixels; give one with masks, or "
            "set `stuff_classes` in its metadata."
        )


def check_pixel_classes(train: LabelledDataset, val: LabelledDataset) -> tuple[str, ...]:
    """Return the classes of pixels; InputError where the data sets differ, or have none."""
    if train.pixel_classes != val.pixel_classes:
        raise InputError(
            f"{train.name!r} has {len(train.pixel_classes)} pixel classes and {val.name!r} "
            f"{len(val.pixel_classes)}, or other names; use two splits of one data set."
        )
    check_labelled_pixels(train)
    return train.pixel_classes


def patch_distributions(
    labels: np.ndarray, grid: tuple[int, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the share of each class in every patch of a grid, from labels (H, W).

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
    """Return the best class of every pixel, (H, W) int64, from scores (N, C) of the tokens.

    Scores are resampled bilinearly; the lowest of several classes with equal scores wins.
    """
    best = torch.full(size, -torch.inf, device=scores.device)
    label = torch.zeros(size, dtype=torch.int64, device=scores.device)
    # All classes at once would take gigabytes for a large image with many classes.
    for index, plane in enumerate(scores.T.reshape(-1, 1, 1, *grid)):
        full = F.interpolate(plane, size=size, mode="bilinear", align_corners=False)[0, 0]
        better = full > best
        best[better] = full[better]
        label[better] = index
    return label.cpu().numpy()


class Confusion:
    """Counts of pixels by their true and their predicted class (or cluster)."""

    def __init__(self, num_classes: int, num_predicted: int | None = None) -> None:
        self.counts = np.zeros((num_classes, num_predicted or num_classes), dtype=np.int64)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Count the pixels of one image, except those whose truth is `IGNORED`."""
        known = truth != IGNORED
        pairs = truth[known] * self.counts.shape[1] + predicted[known]
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def iou(self) -> np.ndarray:
        """IoU of every true class with every predicted one, (C, P), in percent."""
        true, predicted = self.counts.sum(axis=1), self.counts.sum(axis=0)
        return 100.0 * self.counts / np.maximum(true[:, None] + predicted - self.counts, 1)

    def mean_iou(self, all_classes: bool = False) -> float:
        """Mean IoU in percent, over the classes that occur in the truth or over all.

        Raises:
            InputError: no pixel was counted.
        """
        if not self.counts.any():
            raise InputError("no pixel of the validation images has a label; use other images.")
        counted = self.counts.any(axis=1) | all_classes
        return float(np.diag(self.iou())[counted].mean())

    def results(self, names: Sequence[str]) -> dict[str, float]:
        """Mean IoU and pixel accuracy in percent, and the IoU of each of at most 20 classes."""
        accuracy = 100.0 * np.trace(self.counts) / max(self.counts.sum(), 1)
        scores = {"mIoU": self.mean_iou(), "pixel_accuracy": float(accuracy)}
        if len(names) <= _MAX_LISTED_CLASSES:
            occurs = np.flatnonzero(self.counts.any(axis=1)).tolist()
            scores |= {f"IoU-{names[i]}": float(self.iou()[i, i]) for i in occurs}
        return scores


class ObjectRecall:
    """Share of an object's pixels that get its class, by size and by aspect ratio of the object.

    Sizes are those of COCO, by the visible pixels of the image as annotated: small is below 32 x
    32, large from 96 x 96 up. A bounding box at least twice as wide as high is wide, at least
    twice as high as wide is tall, any other is square.
    """

    GROUPS = ("small", "medium", "large", "wide", "square", "tall")

    def __init__(self) -> None:
        self._shares: dict[str, list[float]] = defaultdict(list)

    def add(self, objects: Sequence[tuple[np.ndarray, int]], predicted: np.ndarray) -> None:
        """Add the objects of one image, with the predicted classes (H, W)."""
        for mask, category in objects:
            area = np.count_nonzero(mask)
            size = "small" if area < _MEDIUM_AREA else "medium" if area < _LARGE_AREA else "large"
            share = float((predicted[mask] == category).mean())
            for group in (size, _aspect_group(mask)):
                self._shares[group].append(share)

    def results(self) -> dict[str, float]:
        """Return ``recall_<group>`` in percent, mean over the objects, for groups with objects."""
        return {
            f"recall_{group}": 100 * float(np.mean(self._shares[group]))
            for group in self.GROUPS
            if self._shares[group]
        }


def _aspect_group(mask: np.ndarray) -> str:
    height, width = (np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (1, 0))
    if width >= _ELONGATED * height:
        return "wide"
    return "tall" if height >= _ELONGATED * width else "square"


class _Segmentation(ABC):
    """Measure that labels the tokens by what a bank of patches teaches, and scores the pixels."""

    name: str
    without_direction: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        self.classes = check_pixel_classes(task.train, task.val)
        self.options = task.options
        self.bank = PatchBank(task.train, task.options.bank_size, task.seed)
        self.confusion = Confusion(len(self.classes))
        self.recall = ObjectRecall()

    @abstractmethod
    def fit(self) -> None:
        """Learn from the bank."""

    @abstractmethod
    def _scores(self, tokens: Tensor) -> Tensor:
        """(N, D) tokens to scores (N, C) of the classes."""

    def observe_train(self, sample: Sample) -> None:
        """Put patches into the bank."""
        self.bank.add(sample)

    def observe_val(self, sample: Sample) -> None:
        """Segment an image and count its pixels."""
        truth = sample.image.semantic
        size = (truth.shape[0], truth.shape[1])
        predicted = label_pixels(self._scores(sample.tokens), sample.grid, size)
        self.confusion.add(truth, predicted)
        if "sem_seg_file_name" not in sample.image.record:
            self.recall.add(sample.image.objects, predicted)

    def results(self) -> dict[str, float]:
        """Return ``mIoU``, ``pixel_accuracy``, the IoU of a few classes, and recall, in percent."""
        return self.confusion.results(self.classes) | self.recall.results()


class KnnSegmentation(_Segmentation):
    """Mean IoU of labels voted by the nearest patches of a memory bank.

    Each token takes the class shares of its k most similar bank patches (cosine), averaged with
    weights exp(cosine / T). The averages are resampled bilinearly to the pixels of the
    annotations, and the largest wins. The bank holds at most ``bank_size`` patches of the training
    images, see :class:`PatchBank`.
    """

    name = "knn_segmentation"

    def fit(self) -> None:
        """Normalise the bank."""
        tokens, self.shares = self.bank.all()
        self.tokens = F.normalize(tokens, dim=1)

    def _scores(self, tokens: Tensor) -> Tensor:
        k, temperature = self.options.num_neighbours, self.options.temperature
        return retrieve(F.normalize(tokens, dim=1), self.tokens, self.shares, k, temperature)


class LinearSegmentation(_Segmentation):
    """Mean IoU of a linear classifier of tokens.

    It learns the class shares of at most ``bank_size`` training patches (:class:`PatchBank`) from
    their tokens, each channel standardised over the bank. Its logits are resampled bilinearly to
    the pixels of the annotations, and the largest wins.
    """

    name = "linear_segmentation"

    def fit(self) -> None:
        """Train the layer."""
        tokens, shares = self.bank.all()
        self.weight, self.bias = fit_linear(tokens, shares, self.options.probe_steps)

    def _scores(self, tokens: Tensor) -> Tensor:
        return (tokens.double() @ self.weight + self.bias).float()
