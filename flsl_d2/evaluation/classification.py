"""Naming whole images and the objects in boxes from frozen tokens: k-NN and a linear probe."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.samples import Measure, Options, Sample, Task
from flsl_d2.evaluation.segmentation import fit_linear, nearest

logger = logging.getLogger("detectron2.flsl_d2.evaluation")

_CELLS = 3  # cells of a box along each side
_MIN_CLASSES_FOR_TOP5 = 5


class NeighbourVotes:
    """Votes of the k most similar entries of a bank (M, D), for each k that it has tokens for."""

    def __init__(self, bank: Tensor, labels: Tensor, num_classes: int, options: Options) -> None:
        self.bank, self.labels, self.num_classes = F.normalize(bank, dim=1), labels, num_classes
        self.num_images, self.hits = 0, Counter[str]()
        self.temperature = options.temperature
        self.ks = sorted(k for k in options.class_neighbours if k <= len(bank))
        if not self.ks:
            raise InputError(
                f"the bank has {len(bank)} tokens, too few for k = "
                f"{min(options.class_neighbours)}; use more training images."
            )

    def __call__(self, queries: Tensor) -> dict[str, Tensor]:
        """Add the votes for all queries (Q, D): (C,) by ``k10`` and so on."""
        queries = F.normalize(queries, dim=1)
        indices, weights = nearest(queries, self.bank, self.ks[-1], self.temperature)
        labels = self.labels[indices]
        return {
            f"k{k}": weights.new_zeros(self.num_classes).index_add_(
                0, labels[:, :k].flatten(), weights[:, :k].flatten()
            )
            for k in self.ks
        }

    def count(self, scores: Mapping[str, Tensor], truth: int) -> None:
        """Count whether scores (C,) have the truth on top; the lowest of equal ones is first."""
        self.num_images += 1
        for name, score in scores.items():
            ranking = score.argsort(descending=True, stable=True).tolist()
            self.hits[f"{name}_top1"] += truth == ranking[0]
            if len(ranking) >= _MIN_CLASSES_FOR_TOP5:
                self.hits[f"{name}_top5"] += truth in ranking[:5]

    def accuracies(self) -> dict[str, float]:
        """Return the share of the counted images, in percent: ``k10_top1`` and so on."""
        return {name: 100 * count / self.num_images for name, count in self.hits.items()}


class _Naming(Measure):
    """Base of measures that learn some tokens and one class of every image."""

    num_classes: int
    votes: NeighbourVotes

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.tokens: list[Tensor] = []
        self.labels: list[int] = []

    def fit(self) -> None:
        if not self.tokens:
            raise InputError("no training image has a box; use a data set with boxes.")
        bank = torch.cat(self.tokens)
        labels = torch.tensor(self.labels, device=bank.device)
        labels = labels.repeat_interleave(len(self.tokens[0]))
        self.votes = NeighbourVotes(bank, labels, self.num_classes, self.options)

    def results(self) -> dict[str, float]:
        if not self.votes.num_images:
            raise InputError("no validation image has a box; use a data set with boxes.")
        return self.votes.accuracies()


class Classification(_Naming):
    """Accuracy of the class of an image from its mean token, by k-NN and a linear probe."""

    name = "classification"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        train, val = task.train, task.val
        for dataset in (train, val):
            if not dataset.image_classes:
                raise InputError(
                    f"the images of {dataset.name!r} have no classes; give a folder with a "
                    "subfolder of images for each class."
                )
        if unknown := sorted({*val.image_classes} - {*train.image_classes}):
            raise InputError(
                f"{val.name!r} has images of {', '.join(unknown[:5])}, classes that {train.name!r} "
                "does not have; give training images of every class."
            )
        if absent := sorted({*train.image_classes} - {*val.image_classes}):
            logger.warning(
                "%s holds no image of %s; the other classes are scored.", val.name, absent[:5]
            )
        self.numbers = [train.image_classes.index(name) for name in val.image_classes]
        self.num_classes = len(train.image_classes)
        if self.num_classes < 2:
            raise InputError(
                f"{train.name!r} has 1 class, and telling images apart takes 2; add subfolders."
            )

    def observe_train(self, sample: Sample) -> None:
        self.tokens.append(sample.tokens.mean(dim=0, keepdim=True))
        self.labels.append(sample.image.record["image_class"])

    def fit(self) -> None:
        super().fit()
        shares = F.one_hot(self.votes.labels, self.num_classes).double()
        self.linear = fit_linear(torch.cat(self.tokens), shares, self.options.probe_steps)

    def observe_val(self, sample: Sample) -> None:
        feature = sample.tokens.mean(dim=0, keepdim=True)
        weight, bias = self.linear
        scores = {**self.votes(feature), "linear": (feature.double() @ weight + bias)[0]}
        self.votes.count(scores, self.numbers[sample.image.record["image_class"]])


class BoxKnn(_Naming):
    """Accuracy of naming the object in the largest box of an image (arXiv 2306.06203).

    The token nearest to the centre of each of the box's 3 x 3 cells stands for the cell, and the
    neighbours of all nine vote. Images without a box are left out.
    """

    name = "knn_box"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        train, val = task.train, task.val
        if train.box_classes != val.box_classes:
            raise InputError(
                f"{train.name!r} has {len(train.box_classes)} classes of boxes and {val.name!r} "
                f"{len(val.box_classes)}, or other names; use two splits of one data set."
            )
        self.num_classes = len(train.box_classes)
        if self.num_classes < 2:
            raise InputError(
                f"the boxes of {train.name!r} have {self.num_classes} class(es), and telling "
                "objects apart takes 2; use a data set with more."
            )

    def observe_train(self, sample: Sample) -> None:
        if (box := sample.image.largest_box) is not None:
            self.tokens.append(_box_tokens(sample, box.box))
            self.labels.append(box.category)

    def observe_val(self, sample: Sample) -> None:
        if (box := sample.image.largest_box) is not None:
            self.votes.count(self.votes(_box_tokens(sample, box.box)), box.category)


def _box_tokens(sample: Sample, box: tuple[float, float, float, float]) -> Tensor:
    size = sample.image.record["height"], sample.image.record["width"]
    return sample.tokens[cell_tokens(box, size, sample.grid)]


def cell_tokens(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> list[int]:
    """Return the nine tokens at the centres of the 3 x 3 cells of a box (x0, y0, x1, y1)."""
    shares = [(i + 0.5) / _CELLS for i in range(_CELLS)]
    # The token that covers a point is the one whose centre is nearest.
    columns, rows = (
        [
            min(max(int((box[i] + s * (box[i + 2] - box[i])) * count / length), 0), count - 1)
            for s in shares
        ]
        for i, (length, count) in enumerate(zip(size[::-1], grid[::-1], strict=True))
    )
    return [row * grid[1] + column for row in rows for column in columns]
