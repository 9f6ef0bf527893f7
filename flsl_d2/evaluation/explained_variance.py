"""How much of an encoder's tokens do the place and the colour of a patch alone explain?

Both are linear maps from a few functions to the tokens, fitted to some images and judged on others.
Features that say little but where a token is, or what colour it has, can make a self-supervised
loss fall without any object being learned.

Shape suffixes: N tokens of an image, D width, F functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

Grid = tuple[int, int]

_MOST_HALF_WAVES = 12
_TOKENS_A_FUNCTION = 10


def position_order(grids: Sequence[Grid], num_fitted: int) -> int:
    """The most half-waves that grids can show and that the fitted tokens suffice for, at most 12.

    Args:
        grids: rows and columns of the images.
        num_fitted: tokens that the map is fitted to.
    """
    side = min(min(grid) for grid in grids)
    fitting = (math.isqrt(8 * (num_fitted // _TOKENS_A_FUNCTION) + 1) - 3) // 2
    return max(min(_MOST_HALF_WAVES, side - 1, fitting), 0)


def position_functions(grid: Grid, order: int) -> Tensor:
    """cos(pi k y) cos(pi l x) with k + l <= order at the centres of the cells, (N, F) float64."""
    lines = []
    for cells in grid:
        at = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        lines.append(torch.cos(math.pi * at[:, None] * torch.arange(order + 1)))
    products = torch.einsum("yk,xl->yxkl", *lines)
    used = torch.arange(order + 1)[:, None] + torch.arange(order + 1) <= order
    return products[:, :, used].flatten(0, 1)


def patch_colours(image: np.ndarray, grid: Grid) -> Tensor:
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


class LinearFit:
    """Least squares from functions to tokens, from sums over images that can be taken out again."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.sums: Tensor | float = 0.0
        self.count = 0

    def add(self, functions: Tensor, tokens: Tensor, sign: int = 1) -> None:
        """Fit to an image as well; with ``sign=-1`` no longer.

        Args:
            functions: (N, F) float64, one of them constant.
            tokens: (N, D) float64.
            sign: 1 or -1.
        """
        self.gram = self.gram + sign * functions.T @ functions
        self.cross = self.cross + sign * functions.T @ tokens
        self.sums = self.sums + sign * tokens.sum(dim=0)
        self.count += sign * len(tokens)

    def solve(self) -> tuple[Tensor, Tensor]:
        """The map (F, D), and the mean of the fitted tokens (D,)."""
        gram = self.gram.clone()
        # Next to nothing, for functions that are alike in the fitted images (one colour, say).
        gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
        return torch.linalg.solve(gram, self.cross), self.sums / self.count


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
        self.fits = {"position": LinearFit(), "colour": LinearFit()}
        self.maps: dict[str, tuple[Tensor, Tensor]] = {}
        self.errors = dict.fromkeys(self.fits, 0.0)
        self.deviation = self.energy = 0.0

    def _functions(self, sample: Sample) -> dict[str, Tensor]:
        return {
            "position": position_functions(sample.grid, self.order),
            "colour": colour_functions(patch_colours(sample.pixels, sample.grid)),
        }

    def observe_train(self, sample: Sample) -> None:
        """Fit to an image."""
        for name, functions in self._functions(sample).items():
            self.fits[name].add(functions, sample.tokens.double().cpu())

    def fit(self) -> None:
        """Solve for the maps."""
        self.maps = {name: fit.solve() for name, fit in self.fits.items()}

    def observe_val(self, sample: Sample) -> None:
        """Predict an image's tokens."""
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            weights, mean = self.maps[name]
            self.errors[name] += float((tokens - functions @ weights).square().sum())
        self.deviation += float((tokens - mean).square().sum())
        self.energy += float(tokens.square().sum())

    def results(self) -> dict[str, float]:
        """``position_r2`` and ``colour_r2``, in percent."""
        if self.deviation <= 1e-12 * self.energy:  # rounding
            raise InputError(
                "all tokens of the validation images are the same, so there is no variance to "
                "explain; look at the encoder with tools/visualize.py."
            )
        return {f"{k}_r2": 100 * (1 - error / self.deviation) for k, error in self.errors.items()}
