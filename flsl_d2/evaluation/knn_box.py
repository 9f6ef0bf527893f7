"""Box-aligned k-NN: does a token inside an object know what the object is?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import LabelledDataset
from flsl_d2.evaluation.samples import Options, Sample
from flsl_d2.modeling import FLSLViT

__all__ = [
    "BoxKnn",
    "cell_tokens",
    "nearest",
]

_ENTRIES_AT_ONCE = 2**25  # of the similarity matrix: 128 MiB


def nearest(
    queries: Tensor, bank: Tensor, num_neighbours: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The most similar entries of a bank and the weights of their votes.

    Args:
        queries: (Q, D), L2-normalised.
        bank: (M, D), L2-normalised.
        num_neighbours: k; at most M.
        temperature: T.

    Returns:
        Indices (Q, k) into the bank by falling similarity, and weights exp(cosine / T), (Q, k).
    """
    step = max(_ENTRIES_AT_ONCE // len(bank), 1)
    parts = [(part @ bank.T).topk(num_neighbours, dim=1) for part in queries.split(step)]
    cosine = torch.cat([part.values for part in parts])
    return torch.cat([part.indices for part in parts]), (cosine / temperature).exp()


_CELLS = 3  # a side


class BoxKnn:
    """Accuracy of naming the object in the largest box of an image.

    The box is cut 3 x 3, and the token nearest to each cell's centre stands for the cell (FLSL,
    arXiv 2306.06203, on ImageNet). The nine tokens of every training image are the bank, with the
    class of their box. Each of the nine of a validation image has its k most similar bank tokens
    (cosine) vote with weights exp(cosine / T), and the class with the most votes of all nine is
    the answer. Images without a box are left out.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        train: LabelledDataset,
        val: LabelledDataset,
        options: Options,
        seed: int,
    ) -> None:
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
        if not options.box_neighbours or min(options.box_neighbours) < 1:
            raise InputError(
                f"box_neighbours is {list(options.box_neighbours)}; give values of k from 1 up."
            )
        self.options, self.num_classes = options, len(train.box_classes)
        self.tokens: list[Tensor] = []
        self.labels: list[int] = []
        self.right: dict[str, int] = {}
        self.seen = 0

    def observe_train(self, sample: Sample) -> None:
        """Put the nine tokens of the image into the bank."""
        if sample.image.largest_box is not None:
            self.tokens.append(self._box_tokens(sample))
            self.labels.append(sample.image.largest_box.category)

    def fit(self) -> None:
        """Normalise the bank, and drop the values of k that are larger than it."""
        if not self.tokens:
            raise InputError("no training image has a box; use a data set with boxes.")
        self.bank = torch.cat(self.tokens)
        labels = torch.tensor(self.labels, device=self.bank.device)
        self.bank_labels = labels.repeat_interleave(_CELLS**2)
        self.ks = sorted(k for k in self.options.box_neighbours if k <= len(self.bank))
        if not self.ks:
            raise InputError(
                f"the bank has {len(self.bank)} tokens, too few for k = "
                f"{min(self.options.box_neighbours)}; use more training images."
            )

    def observe_val(self, sample: Sample) -> None:
        """Classify the largest box of an image."""
        if sample.image.largest_box is None:
            return
        self.seen += 1
        indices, weights = nearest(
            self._box_tokens(sample), self.bank, self.ks[-1], self.options.temperature
        )
        labels = self.bank_labels[indices]
        for k in self.ks:
            votes = weights.new_zeros(self.num_classes)
            votes.index_add_(0, labels[:, :k].flatten(), weights[:, :k].flatten())
            ranking = votes.argsort(descending=True, stable=True).tolist()
            self._count(f"k{k}_top1", sample, ranking[:1])
            if self.num_classes >= 5:
                self._count(f"k{k}_top5", sample, ranking[:5])

    def results(self) -> dict[str, float]:
        """``k10_top1`` and so on, and ``top5`` from five classes up, in percent; those k that the
        bank is large enough for."""
        if not self.seen:
            raise InputError("no validation image has a box; use a data set with boxes.")
        return {name: 100 * count / self.seen for name, count in self.right.items()}

    def _count(self, name: str, sample: Sample, answers: Sequence[int]) -> None:
        hit = sample.image.largest_box.category in answers
        self.right[name] = self.right.get(name, 0) + hit

    def _box_tokens(self, sample: Sample) -> Tensor:
        size = sample.image.record["height"], sample.image.record["width"]
        return F.normalize(
            sample.tokens[cell_tokens(sample.image.largest_box.box, size, sample.grid)], dim=1
        )


def cell_tokens(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> list[int]:
    """The tokens nearest to the centres of a box's 3 x 3 cells, row by row.

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
