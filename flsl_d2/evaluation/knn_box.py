"""Box-aligned k-NN: whether a token inside an object knows the class of the object."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.classifiers import NeighbourVotes, top_hits
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
        self.hits: Counter[str] = Counter()
        self.num_images = 0

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
        if box is None:
            return
        self.num_images += 1
        for name, votes in self.votes(_box_tokens(sample, box)).items():
            for top, hit in top_hits(votes, box.category).items():
                self.hits[f"{name}_{top}"] += hit

    def results(self) -> dict[str, float]:
        """Return ``k10_top1`` and so on, and ``top5`` from five classes up, in percent."""
        if not self.num_images:
            raise InputError("no validation image has a box; use a data set with boxes.")
        return {name: 100 * count / self.num_images for name, count in self.hits.items()}


def _box_tokens(sample: Sample, box: LabelledBox) -> Tensor:
    size = sample.image.record["height"], sample.image.record["width"]
    return F.normalize(sample.tokens[cell_tokens(box.box, size, sample.grid)], dim=1)


def cell_tokens(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> list[int]:
    """Return the tokens nearest to the centres of a box's 3 x 3 cells, row by row.

    Args:
        box: x0, y0, x1, y1 in pixels of the image.
        size: height and width of the image in pixels.
        grid: rows and columns of tokens.

    Returns:
        Nine row-major indices; a box smaller than a few patches has some of them more than once.
    """
    x0, y0, x1, y1 = box
    shares = [(i + 0.5) / _CELLS for i in range(_CELLS)]
    # The token that covers a point is the one whose centre is nearest.
    rows = [_cell(y0 + share * (y1 - y0), size[0], grid[0]) for share in shares]
    columns = [_cell(x0 + share * (x1 - x0), size[1], grid[1]) for share in shares]
    return [row * grid[1] + column for row in rows for column in columns]


def _cell(place: float, length: int, count: int) -> int:
    return min(max(int(place * count / length), 0), count - 1)
