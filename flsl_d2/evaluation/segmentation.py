"""Linear segmentation probe: one linear layer on frozen tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.knn_box import nearest
from flsl_d2.evaluation.labelled_images import IGNORED, LabelledDataset
from flsl_d2.evaluation.samples import Options, Sample
from flsl_d2.modeling import FLSLViT

__all__ = [
    "Confusion",
    "KnnSegmentation",
    "LinearSegmentation",
    "PatchBank",
    "check_pixel_classes",
    "fit_linear",
    "label_pixels",
    "patch_distributions",
]


class PatchBank:
    """Tokens with the share of each class among the pixels of their patch.

    Every image gives the same number of patches, drawn uniformly among those with a labelled
    pixel; what is drawn depends on the seed and the index of the image alone.

    Args:
        dataset: the training images.
        size: most patches in the bank.
        seed: of the draw.
    """

    def __init__(self, dataset: LabelledDataset, size: int, seed: int) -> None:
        if size < 1:
            raise InputError(f"bank_size is {size}; give at least 1, or leave it out for 10000.")
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
        """Tokens (M, D) and shares (M, C), on the device of the tokens.

        Raises:
            InputError: not one patch has a label.
        """
        if not self._tokens:
            raise InputError("no pixel of the training images has a label; use other images.")
        tokens = torch.cat(self._tokens)
        return tokens, torch.cat(self._shares).to(tokens.device)


def check_pixel_classes(train: LabelledDataset, val: LabelledDataset) -> tuple[str, ...]:
    """The classes of pixels, the same in both data sets.

    Raises:
        InputError: they differ, or there are none.
    """
    if train.pixel_classes != val.pixel_classes:
        raise InputError(
            f"{train.name!r} has {len(train.pixel_classes)} pixel classes and {val.name!r} "
            f"{len(val.pixel_classes)}, or other names; use two splits of one data set."
        )
    if not train.pixel_classes:
        raise InputError(
            f"the data set {train.name!r} does not name its classes; set `stuff_classes` in its "
            "metadata."
        )
    return train.pixel_classes


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


class KnnSegmentation:
    """Mean IoU of labels voted by the nearest patches of a memory bank.

    Each token takes the class shares of its k most similar bank patches (cosine), averaged with
    weights exp(cosine / T). The averages are resampled bilinearly to the pixels of the
    annotations, and the largest wins. The bank holds at most ``bank_size`` patches of the training
    images, see :class:`flsl_d2.evaluation.segmentation.PatchBank`.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        train: LabelledDataset,
        val: LabelledDataset,
        options: Options,
        seed: int,
    ) -> None:
        self.classes = check_pixel_classes(train, val)
        self.options = options
        self.bank = PatchBank(train, options.bank_size, seed)
        self.confusion = Confusion(len(self.classes))

    def observe_train(self, sample: Sample) -> None:
        """Put patches into the bank."""
        self.bank.add(sample)

    def fit(self) -> None:
        """Normalise the bank."""
        tokens, self.shares = self.bank.all()
        self.tokens = F.normalize(tokens, dim=1)

    def observe_val(self, sample: Sample) -> None:
        """Segment an image and count its pixels."""
        queries = F.normalize(sample.tokens, dim=1)
        k = min(self.options.num_neighbours, len(self.tokens))
        indices, weights = nearest(queries, self.tokens, k, self.options.temperature)
        votes = torch.einsum("nk,nkc->nc", weights, self.shares[indices])
        votes = votes / weights.sum(dim=1, keepdim=True)
        truth = sample.image.semantic
        self.confusion.add(truth, label_pixels(votes, sample.grid, truth.shape))

    def results(self) -> dict[str, float]:
        """``mIoU``, ``pixel_accuracy`` and, of a few classes, the IoU of each; in percent."""
        return self.confusion.results(self.classes)


WEIGHT_DECAY = 1e-3


class LinearSegmentation:
    """Mean IoU of a linear classifier of tokens.

    It learns the class shares of at most ``bank_size`` training patches (:class:`PatchBank`) from
    their tokens, each channel standardised over the bank. Its logits are resampled bilinearly to
    the pixels of the annotations, and the largest wins.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        train: LabelledDataset,
        val: LabelledDataset,
        options: Options,
        seed: int,
    ) -> None:
        if options.probe_steps < 1:
            raise InputError(f"probe_steps is {options.probe_steps}; give at least 1.")
        self.classes = check_pixel_classes(train, val)
        self.steps = options.probe_steps
        self.bank = PatchBank(train, options.bank_size, seed)
        self.confusion = Confusion(len(self.classes))

    def observe_train(self, sample: Sample) -> None:
        """Put patches into the bank."""
        self.bank.add(sample)

    def fit(self) -> None:
        """Train the layer."""
        tokens, shares = self.bank.all()
        self.weight, self.bias = fit_linear(tokens, shares, self.steps)

    def observe_val(self, sample: Sample) -> None:
        """Segment an image and count its pixels."""
        logits = sample.tokens.double() @ self.weight + self.bias
        truth = sample.image.semantic
        self.confusion.add(truth, label_pixels(logits.float(), sample.grid, truth.shape))

    def results(self) -> dict[str, float]:
        """``mIoU``, ``pixel_accuracy`` and, of a few classes, the IoU of each; in percent."""
        return self.confusion.results(self.classes)


def fit_linear(tokens: Tensor, shares: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with soft targets, by L-BFGS on all data at once.

    Minimises the mean cross-entropy plus ``WEIGHT_DECAY / 2`` times the squared weights of the
    standardised channels, from weights of 0: nothing is drawn. In double precision, because the
    solver would carry rounding, which varies with the number of threads, into its result.

    Args:
        tokens: (M, D).
        shares: (M, C), rows sum to 1.
        num_steps: iterations of the solver; it may converge earlier.

    Returns:
        Weight (D, C) and bias (C,), float64, to be applied to tokens as they are.
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
    weight = weight.detach() * gain[:, None]
    return weight, bias.detach() - mean @ weight
