"""Share of the tokens' variance that the position or the colour of a patch alone explains.

Linear maps from a few functions of position or colour to the tokens are fitted to some images and
judged on others by ``R2 = 1 - |error|^2 / |deviation from the mean of the fitted tokens|^2``.
Features that hold little but position or colour can make a self-supervised loss fall although no
object is learned.

Shape suffixes: N tokens of an image, D width, F functions.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.samples import Sample, Task

__all__ = [
    "ExplainedVariance",
    "LinearFit",
    "colour_functions",
    "colour_r2",
    "held_out_r2",
    "patch_colours",
    "position_functions",
    "position_order",
    "position_r2",
]

_MAX_HALF_WAVES = 12
_TOKENS_PER_FUNCTION = 10


def position_order(grids: Sequence[tuple[int, int]], num_fitted: int) -> int:
    """Largest number of half-waves, up to 12, that the grids and the fitted tokens allow.

    Args:
        grids: rows and columns of the images.
        num_fitted: number of tokens that the map is fitted to; ten for each function at least.
    """
    side = min(min(grid) for grid in grids)
    fitting = (math.isqrt(8 * (num_fitted // _TOKENS_PER_FUNCTION) + 1) - 3) // 2
    return max(min(_MAX_HALF_WAVES, side - 1, fitting), 0)


def position_functions(grid: tuple[int, int], order: int) -> Tensor:
    """cos(pi k y) cos(pi l x) with k + l <= order at the centres of the cells, (N, F) float64."""
    waves = []
    for cells in grid:
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        waves.append(torch.cos(math.pi * centres[:, None] * torch.arange(order + 1)))
    products = torch.einsum("yk,xl->yxkl", *waves)
    used = torch.arange(order + 1)[:, None] + torch.arange(order + 1) <= order
    return products[:, :, used].flatten(0, 1)


def patch_colours(image: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Mean colour of every patch of an image (H, W, 3) uint8: (N, 3) float32 in [0, 255]."""
    pixels = image.astype(np.float32)
    return torch.from_numpy(
        cv2.resize(pixels, grid[::-1], interpolation=cv2.INTER_AREA).reshape(-1, 3)
    )


def colour_functions(colours: Tensor) -> Tensor:
    """Products of up to two of red, green and blue: (N, 3) in [0, 255] to (N, 10) float64."""
    with_one = torch.cat([torch.ones(len(colours), 1), colours / 255], dim=1).double()
    first, second = torch.triu_indices(4, 4)
    return with_one[:, first] * with_one[:, second]


@dataclass(frozen=True)
class LinearFit:
    """Sums of a least-squares fit from functions to tokens; fits of images add and subtract.

    Attributes:
        gram: (F, F) products of the functions with each other.
        cross: (F, D) products of the functions with the tokens.
        sums: (D,) sum of the tokens.
        count: number of the tokens.
    """

    gram: Tensor
    cross: Tensor
    sums: Tensor
    count: int

    @classmethod
    def of(cls, functions: Tensor, tokens: Tensor) -> LinearFit:
        """Make the fit of one image.

        Args:
            functions: (N, F) float64, one of them constant.
            tokens: (N, D) float64.
        """
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
        """Mean of the fitted tokens, (D,)."""
        return self.sums / self.count

    def solve(self) -> Tensor:
        """Return the map (F, D) of the least squares."""
        gram = self.gram.clone()
        # Functions can be equal in the fitted images, for example where these have one colour.
        gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
        return torch.linalg.solve(gram, self.cross)


def position_r2(token_sets: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> float | None:
    """Share of the tokens' variance that their position alone predicts, in images not fitted to.

    Args:
        token_sets: (N, D) of each image.
        grids: rows and columns of each image.

    Returns:
        See :func:`held_out_r2`.
    """
    sizes = [len(tokens) for tokens in token_sets]
    order = position_order(grids, sum(sizes) - max(sizes))
    return held_out_r2(token_sets, [position_functions(grid, order) for grid in grids])


def colour_r2(
    token_sets: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    images: Sequence[np.ndarray],
) -> float | None:
    """Share of the tokens' variance that the mean colours of their patches alone predict.

    Args:
        token_sets: (N, D) of each image.
        grids: rows and columns of each image.
        images: (H, W, 3) uint8 each.

    Returns:
        See :func:`held_out_r2`.
    """
    colours = [patch_colours(image, grid) for image, grid in zip(images, grids, strict=True)]
    return held_out_r2(token_sets, [colour_functions(each) for each in colours])


def held_out_r2(token_sets: Sequence[Tensor], functions: Sequence[Tensor]) -> float | None:
    """Share of the tokens' variance that a linear map of some functions predicts.

    The map is fitted to the tokens of all images but one and predicts those of the one; every
    image is left out once. Errors and deviations are summed over the images.

    Args:
        token_sets: (N, D) of each image.
        functions: (N, F) float64 of each image; one of them is constant.

    Returns:
        1 where the functions predict everything, about 0 (or a little less) where they predict
        nothing; None for a single image, and for tokens that do not vary.
    """
    if len(token_sets) < 2:
        return None
    tokens = [each.double() for each in token_sets]
    fits = [LinearFit.of(f, t) for f, t in zip(functions, tokens, strict=True)]
    whole = functools.reduce(operator.add, fits)
    error = deviation = 0.0
    for f, t, own in zip(functions, tokens, fits, strict=True):
        others = whole - own
        error += float((t - f @ others.solve()).square().sum())
        deviation += float((t - others.mean).square().sum())
    return 1 - error / deviation if deviation > 0 else None


class ExplainedVariance:
    """R2 of tokens by the position and by the mean colour of their patches, in percent.

    The maps are fitted to all tokens of the training images and judged on the validation images.
    100 where tokens hold nothing else, about 0 (or a little less) where position or colour predict
    nothing. Positions are products of cosines over the image's width and height, up to 12
    half-waves in all.
    """

    name = "explained_variance"
    without_direction: ClassVar[tuple[str, ...]] = ("position_r2", "colour_r2")

    def __init__(self, task: Task) -> None:
        side = max(task.options.short_side // task.encoder.patch_size, 1)
        self.order = position_order([(side, side)], len(task.train.images) * side**2)
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
        """Add an image to the sums that the maps are fitted to."""
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            fit = LinearFit.of(functions, tokens)
            self.fits[name] = self.fits[name] + fit if name in self.fits else fit

    def fit(self) -> None:
        """Solve for the maps."""
        self.maps = {name: fit.solve() for name, fit in self.fits.items()}
        self.mean = self.fits["position"].mean  # both fits have the same tokens

    def observe_val(self, sample: Sample) -> None:
        """Predict an image's tokens."""
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            error = tokens - functions @ self.maps[name]
            self.errors[name] += float(error.square().sum())
        self.deviation += float((tokens - self.mean).square().sum())
        self.energy += float(tokens.square().sum())

    def results(self) -> dict[str, float]:
        """Return ``position_r2`` and ``colour_r2``, in percent."""
        if self.deviation <= 1e-12 * self.energy:  # differences of rounding only
            raise InputError(
                "all tokens of the validation images are the same, so there is no variance to "
                "explain; look at the encoder with tools/visualize.py."
            )
        return {f"{k}_r2": 100 * (1 - error / self.deviation) for k, error in self.errors.items()}
