"""Box-aligned k-NN: whether a token inside an object knows the class of the object."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.classifiers import NeighbourVotes
from flsl_d2.evaluation.labelled_images import LabelledBox
from flsl_d2.evaluation.samples import Sample, Task

_CELLS = 3  # cells of a box along each side


class BoxKnn:
    """Accuracy of naming the object in the largest box of an image.

    The box is cut 3 x 3, and the token nearest to each cell's centre stands for the cell (FLSL,
    arXiv 2306.06203, on ImageNet). The nine tokens of every training image are the bank, with the
    class of their box. The k most similar bank tokens (cosine) of each of the nine tokens of a
    validation image vote with weights exp(cosine / T), and the class with the most votes of all
    nine is the answer. Images without a box are left out.

    Raises:
        InputError: the data sets have different classes of boxes, or fewer than two.
    """

    name = "knn_box"
    without_direction: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        train, val = task.train, task.val
        if train.box_classes != val.box_classes:
            raise InputError(
                f"{train.name!r} has {len(train.box_classes)} classes of boxes and {val.name!r} "
                f"{len(val.box_classes)}, or other names; use two splits of one data set."
            )
        if len(train.box_classes) < 2:
            raise InputError(
                f"the boxes of {train.name!r} have {len(train.box_classes)} class(es), and telling "
                "objects apart takes 2; use a data set with more."
            )
        self.options, self.num_classes = task.options, len(train.box_classes)
        self.tokens: list[Tensor] = []
        self.labels: list[int] = []

    def observe_train(self, sample: Sample) -> None:
        """Put the nine tokens of the image into the bank."""
        box = sample.image.largest_box
        if box is not None:
            self.tokens.append(_box_tokens(sample, box))
            self.labels.append(box.category)

    def fit(self) -> None:
        """Join the bank, and drop the values of k that are larger than the bank."""
        if not self.tokens:
            raise InputError("no training image has a box; use a data set with boxes.")
        bank = torch.cat(self.tokens)
        labels = torch.tensor(self.labels, device=bank.device).repeat_interleave(_CELLS**2)
        self.votes = NeighbourVotes(bank, labels, self.num_classes, self.options)

    def observe_val(self, sample: Sample) -> None:
        """Classify the largest box of an image."""
        box = sample.image.largest_box
        if box is not None:
            self.votes.count(self.votes(_box_tokens(sample, box)), box.category)

    def results(self) -> dict[str, float]:
        """Return ``k10_top1`` and so on, and ``top5`` from five classes up, in percent."""
        if not self.votes.num_images:
            raise InputError("no validation image has a box; use a data set with boxes.")
        return self.votes.accuracies()


def _box_tokens(sample: Sample, box: LabelledBox) -> Tensor:
    size = sample.image.record["height"], sample.image.record["width"]
    return sample.tokens[cell_tokens(box.box, size, sample.grid)]


def cell_tokens(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> list[int]:
    """Return the tokens nearest to the centres of a box's 3 x 3 cells: nine row-major indices.

    Args:
        box: x0, y0, x1, y1 in pixels of the image.
        size: height and width of the image in pixels.
        grid: rows and columns of tokens.
    """
    x0, y0, x1, y1 = box
    shares = [(i + 0.5) / _CELLS for i in range(_CELLS)]
    points = [(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for y in shares for x in shares]
    return [token_at(point, size, grid) for point in points]


def token_at(point: tuple[float, float], size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return the row-major index of the token that covers a point (x, y) of an image (H, W)."""
    # The token that covers a point is the one whose centre is nearest.
    row, column = (
        min(max(int(place * count / length), 0), count - 1)
        for place, count, length in zip(point[::-1], grid, size, strict=True)
    )
    return row * grid[1] + column
