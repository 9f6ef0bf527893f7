"""How much of an encoder's tokens do the place and the colour of a patch alone explain?

Both are linear maps from a few functions to the tokens, fitted to some images and judged on others.
Features that say little but where a token is, or what colour it has, can make a self-supervised
loss fall without any object being learned.

Shape suffixes: N tokens of an image, D width, F functions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import LabelledDataset
from flsl_d2.evaluation.samples import Options, Sample
from flsl_d2.modeling import FLSLViT

__all__ = [
    "ExplainedVariance",
    "LinearFit",
    "colour_functions",
    "patch_colours",
    "position_functions",
    "position_order",
]

_MOST_HALF_WAVES = 12
_TOKENS_A_FUNCTION = 10


def position_order(grids: Sequence[tuple[int, int]], num_fitted: int) -> int:
    """The most half-waves that grids can show and that the fitted tokens suffice for, at most 12.

    Args:
        grids: rows and columns of the images.
        num_fitted: tokens that the map is fitted to.
    """
    side = min(min(grid) for grid in grids)
    fitting = (math.isqrt(8 * (num_fitted // _TOKENS_A_FUNCTION) + 1) - 3) // 2
    return max(min(_MOST_HALF_WAVES, side - 1, fitting), 0)


def position_functions(grid: tuple[int, int], order: int) -> Tensor:
    """cos(pi k y) cos(pi l x) with k + l <= order at the centres of the cells, (N, F) float64."""
    lines = []
    for cells in grid:
        at = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        lines.append(torch.cos(math.pi * at[:, None] * torch.arange(order + 1)))
    products = torch.einsum("yk,xl->yxkl", *lines)
    used = torch.arange(order + 1)[:, None] + torch.arange(order + 1) <= order
    return products[:, :, used].flatten(0, 1)


def patch_colours(image: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Mean colour of every patch of an image (H, W, 3) uint8: (N, 3) float32 in [0, 255]."""
    pixels = image.astype(np.float32)
    return torch.from_numpy(
        cv2.resize(pixels, grid[::-1], interpolation=cv2.INTER_AREA).reshape(-1, 3)
    )


def colour_functions(colours: Tensor) -> Tensor:
    """All products of up to two of red, green and blue: (N, 3) in [0, 255] to (N, 10) float64."""
    with_one = torch.cat([torch.ones(len(colours), 1), colours / 255], dim=1).double()
    first, second = torch.triu_indices(4, 4)
    return with_one[:, first] * with_one[:, second]


@dataclass(frozen=True)
class LinearFit:
    """Least squares from functions to tokens, as sums over images that add up and subtract.

    Attributes:
        gram: (F, F) products of the functions with each other.
        cross: (F, D) products of the functions with the tokens.
        sums: (D,) of the tokens.
        count: of the tokens.
    """

    gram: Tensor
    cross: Tensor
    sums: Tensor
    count: int

    @classmethod
    def of(cls, functions: Tensor, tokens: Tensor) -> LinearFit:
        """Of one image: functions (N, F) float64, one of them constant; tokens (N, D) float64."""
        gram, cross = functions.T @ functions, functions.T @ tokens
        return cls(gram, cross, tokens.sum(dim=0), len(tokens))

    def __add__(self, other: LinearFit) -> LinearFit:
        return LinearFit(
            self.gram + other.gram,
            self.cross + other.cross,
            self.sums + other.sums,
            self.count + other.count,
        )

    def __sub__(self, other: LinearFit) -> LinearFit:
        return self + LinearFit(-other.gram, -other.cross, -other.sums, -other.count)

    @property
    def mean(self) -> Tensor:
        """Of the fitted tokens, (D,)."""
        return self.sums / self.count

    def solve(self) -> Tensor:
        """The map (F, D)."""
        gram = self.gram.clone()
        # Next to nothing, for functions that are alike in the fitted images (one colour, say).
        gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
        return torch.linalg.solve(gram, self.cross)


class ExplainedVariance:
    """R2 of tokens by the place and by the mean colour of their patches, in percent.

    Fitted to all tokens of the training images, and judged on the validation images:
    ``1 - |error|^2 / |deviation from the mean of the fitted tokens|^2``. 100 where tokens tell
    nothing else, about 0 (or a little less) where place or colour tell nothing about them. Places
    are products of cosines over the image's width and height, up to 12 half-waves in all.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        train: LabelledDataset,
        val: LabelledDataset,
        options: Options,
        seed: int,
    ) -> None:
        side = max(options.short_side // encoder.patch_size, 1)
        self.order = position_order([(side, side)], len(train.images) * side**2)
        self.fits: dict[str, LinearFit] = {}
        self.maps: dict[str, Tensor] = {}
        self.errors: dict[str, float] = defaultdict(float)
        self.deviation = self.energy = 0.0

    def _functions(self, sample: Sample) -> dict[str, Tensor]:
        return {
            "position": position_functions(sample.grid, self.order),
            "colour": colour_functions(patch_colours(sample.pixels, sample.grid)),
        }

    def observe_train(self, sample: Sample) -> None:
        """Fit to an image."""
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            fit = LinearFit.of(functions, tokens)
            self.fits[name] = self.fits[name] + fit if name in self.fits else fit

    def fit(self) -> None:
        """Solve for the maps."""
        self.maps = {name: fit.solve() for name, fit in self.fits.items()}
        self.mean = self.fits["position"].mean  # the same for all

    def observe_val(self, sample: Sample) -> None:
        """Predict an image's tokens."""
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            error = tokens - functions @ self.maps[name]
            self.errors[name] += float(error.square().sum())
        self.deviation += float((tokens - self.mean).square().sum())
        self.energy += float(tokens.square().sum())

    def results(self) -> dict[str, float]:
        """``position_r2`` and ``colour_r2``, in percent."""
        if self.deviation <= 1e-12 * self.energy:  # rounding
            raise InputError(
                "all tokens of the validation images are the same, so there is no variance to "
                "explain; look at the encoder with tools/visualize.py."
            )
        return {f"{k}_r2": 100 * (1 - error / self.deviation) for k, error in self.errors.items()}
