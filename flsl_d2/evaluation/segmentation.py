"""Semantic segmentation from frozen tokens: k-NN and a linear probe.

Shape suffixes: N tokens of an image, D width, C classes, M tokens of the bank, Q queries, K
neighbours, H x W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import IGNORED, LabelledDataset
from flsl_d2.evaluation.samples import Measure, Sample, Task

WEIGHT_DECAY = 1e-3
_MAX_PAIRS = 2**25  # similarities held at once: 128 MiB of float32
_LARGE_BANK = 2**17
_MAX_LISTED_CLASSES = 20
_MEDIUM_AREA, _LARGE_AREA = 32**2, 96**2  # pixels, as in COCO's evaluation
_ELONGATED = 2.0  # longer side over shorter side of an object's bounding box


def nearest(
    queries: Tensor, bank: Tensor, num_neighbours: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Find the entries of a bank (M, D) most similar to queries (Q, D), all of unit length.

    Returns indices (Q, K) by falling similarity, and weights exp(cosine / T), (Q, K).
    """
    if bank.device.type == "cpu" and len(bank) >= _LARGE_BANK and find_spec("faiss"):
        import faiss  # about twice as fast as PyTorch there

        found = faiss.knn(queries.numpy(), bank.numpy(), num_neighbours, faiss.METRIC_INNER_PRODUCT)
        cosine, indices = map(torch.from_numpy, found)
        return indices, (cosine / temperature).exp()
    step = max(_MAX_PAIRS // len(bank), 1)
    parts = [(part @ bank.T).topk(num_neighbours, dim=1) for part in queries.split(step)]
    cosine = torch.cat([part.values for part in parts])
    return torch.cat([part.indices for part in parts]), (cosine / temperature).exp()


def retrieve(
    tokens: Tensor, memory: tuple[Tensor, Tensor], num_neighbours: int, temperature: float
) -> Tensor:
    """Average the class shares of the memory's tokens nearest to each of (Q, D): (Q, C).

    The weights exp(cosine / T), scaled to sum to 1, are those of cross-attention.
    """
    bank, shares = memory
    k = min(num_neighbours, len(bank))
    indices, weights = nearest(F.normalize(tokens, dim=1), bank, k, temperature)
    return torch.einsum("nk,nkc->nc", weights / weights.sum(dim=1, keepdim=True), shares[indices])


def fit_linear(tokens: Tensor, shares: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Fit multinomial logistic regression from tokens (M, D) to shares (M, C), by L-BFGS.

    Minimises the mean cross-entropy plus ``WEIGHT_DECAY / 2`` times the squared weights of the
    standardised channels, from weights of 0, so that nothing is drawn at random. Double precision
    keeps rounding, which varies with the number of threads, out of the result. Returns weight (D,
    C) and bias (C,), to be applied to tokens that are not standardised.
    """
    tokens, shares = tokens.double(), shares.double()
    mean, std = tokens.mean(dim=0), tokens.std(dim=0, unbiased=False)
    gain = torch.where(std > 1e-6 * std.amax().clamp(min=1e-12), 1 / std.clamp(min=1e-12), 0.0)
    standardised = (tokens - mean) * gain
    weight = tokens.new_zeros(tokens.shape[1], shares.shape[1], requires_grad=True)
    bias = tokens.new_zeros(shares.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=num_steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(standardised @ weight + bias, shares)
        loss = loss + WEIGHT_DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    fitted = weight.detach() * gain[:, None]
    return fitted, bias.detach() - mean @ fitted


class TokenBank:
    """Tokens of training images with the share of each class among the pixels of their patches."""

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []
        self._shares: list[Tensor] = []

    def add(self, tokens: Tensor, shares: np.ndarray, chosen: np.ndarray) -> None:
        """Add the chosen ones of an image's tokens (N, D) and shares (N, C)."""
        index = torch.from_numpy(chosen)
        self._tokens.append(tokens[index.to(tokens.device)])
        self._shares.append(torch.from_numpy(shares)[index].to(tokens.device))

    def all(self) -> tuple[Tensor, Tensor]:
        """Return tokens (M, D) and shares (M, C); InputError where no patch had a label."""
        if not any(len(part) for part in self._tokens):
            raise InputError("no pixel of the training images has a label; use other images.")
        return torch.cat(self._tokens), torch.cat(self._shares)

    def memory(self) -> tuple[Tensor, Tensor]:
        """Return what :meth:`all` does, the tokens of unit length."""
        tokens, shares = self.all()
        return F.normalize(tokens, dim=1), shares


def check_pixel_classes(*datasets: LabelledDataset) -> tuple[str, ...]:
    """Return the classes of pixels; InputError where a data set has none, or two differ."""
    first, last = datasets[0], datasets[-1]
    if first.pixel_classes != last.pixel_classes:
        raise InputError(
            f"{first.name!r} has {len(first.pixel_classes)} pixel classes and {last.name!r} "
            f"{len(last.pixel_classes)}, or other names; use two splits of one data set."
        )
    if not first.pixel_classes:
        raise InputError(
            f"the data set {first.name!r} names no classes of pixels; give one with masks, or "
            "set `stuff_classes` in its metadata."
        )
    return first.pixel_classes


def patch_distributions(
    labels: np.ndarray, grid: tuple[int, int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count the share of each class in every patch of a grid, from labels (H, W).

    Returns (N, C) float32, and (N,) bool: which patches have a labelled pixel (others are 0).
    """
    rows, columns = (
        (np.arange(length) * 2 + 1) * count // (2 * length)
        for length, count in zip(labels.shape, grid, strict=True)
    )
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
        """Mean IoU in percent, over the classes that occur in the truth or over all."""
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

    Sizes are COCO's, of the visible pixels as annotated; wide and tall are boxes from 2 : 1 up.
    """

    GROUPS = ("small", "medium", "large", "wide", "square", "tall")

    def __init__(self) -> None:
        self._shares: dict[str, list[float]] = defaultdict(list)

    def add(self, objects: Sequence[tuple[np.ndarray, int]], predicted: np.ndarray) -> None:
        """Add the objects of one image (masks and classes), with the predicted classes (H, W)."""
        for mask, category in objects:
            area = np.count_nonzero(mask)
            size = "small" if area < _MEDIUM_AREA else "medium" if area < _LARGE_AREA else "large"
            height, width = (np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (1, 0))
            wide, tall = width >= _ELONGATED * height, height >= _ELONGATED * width
            share = float((predicted[mask] == category).mean())
            for group in (size, "wide" if wide else "tall" if tall else "square"):
                self._shares[group].append(share)

    def results(self) -> dict[str, float]:
        """Return ``recall_<group>`` in percent, mean over the objects, for groups with objects."""
        return {
            f"recall_{group}": 100 * float(np.mean(self._shares[group]))
            for group in self.GROUPS
            if self._shares[group]
        }


class _Segmentation(Measure):
    """Measure that labels the tokens by what a bank of patches teaches, and scores the pixels."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.classes = check_pixel_classes(task.train, task.val)
        self.bank, self.recall = TokenBank(), ObjectRecall()
        self.confusion = Confusion(len(self.classes))

    def _scores(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def observe_train(self, sample: Sample) -> None:
        # The draw depends on the seed and the index of the image alone.
        count, size = len(self.task.train.images), self.options.bank_size
        first, last = (size * (sample.index + step) // count for step in (0, 1))
        labels = sample.image.semantic
        shares, labelled = patch_distributions(labels, sample.grid, len(self.classes))
        candidates = np.flatnonzero(labelled)
        generator = np.random.default_rng([self.task.seed, sample.index])
        chosen = generator.choice(candidates, min(last - first, len(candidates)), replace=False)
        self.bank.add(sample.tokens, shares, np.sort(chosen))

    def observe_val(self, sample: Sample) -> None:
        truth = sample.image.semantic
        size = (truth.shape[0], truth.shape[1])
        predicted = label_pixels(self._scores(sample.tokens), sample.grid, size)
        self.confusion.add(truth, predicted)
        if "sem_seg_file_name" not in sample.image.record:
            self.recall.add(sample.image.objects, predicted)

    def results(self) -> dict[str, float]:
        return self.confusion.results(self.classes) | self.recall.results()


class KnnSegmentation(_Segmentation):
    """Mean IoU of labels voted by the nearest patches of a memory bank."""

    name = "knn_segmentation"

    def fit(self) -> None:
        self.memory = self.bank.memory()

    def _scores(self, tokens: Tensor) -> Tensor:
        return retrieve(tokens, self.memory, self.options.num_neighbours, self.options.temperature)


class LinearSegmentation(_Segmentation):
    """Mean IoU of a linear classifier of tokens, each channel standardised over the bank."""

    name = "linear_segmentation"

    def fit(self) -> None:
        self.weight, self.bias = fit_linear(*self.bank.all(), self.options.probe_steps)

    def _scores(self, tokens: Tensor) -> Tensor:
        return (tokens.double() @ self.weight + self.bias).float()
