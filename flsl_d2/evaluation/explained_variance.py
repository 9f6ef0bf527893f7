"""Share of the tokens' variance that the position or the colour of a patch alone explains.

Linear maps from functions (N, F) of position or colour, the first of which is 1, are fitted to some
images and judged on others by ``R2 = 1 - |error|^2 / |deviation from the mean of the fitted|^2``.
Features that hold little but these can make a self-supervised loss fall with no object learned.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import TokenFeatures
from flsl_d2.evaluation.samples import Measure, Sample, Task

_MAX_HALF_WAVES = 12
_TOKENS_PER_FUNCTION = 10


def position_order(grids: Sequence[tuple[int, int]], num_fitted: int) -> int:
    """Largest number of half-waves, up to 12, with ten fitted tokens or more for each function."""
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


def colour_functions(image: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Products of up to two of red, green and blue of every patch: (N, 10) float64."""
    colours = patch_colours(image, grid) / 255
    with_one = torch.cat([torch.ones(len(colours), 1), colours], dim=1).double()
    first, second = torch.triu_indices(4, 4)
    return with_one[:, first] * with_one[:, second]


def fit_sums(functions: Tensor, tokens: Tensor) -> Tensor:
    """Return all that a least-squares fit to tokens needs, (F, F + D); sums of images add up."""
    return functions.T @ torch.cat([functions, tokens], dim=1)


def solve_fit(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map (F, D) of the least squares, and the mean (D,) of the fitted tokens."""
    gram, cross = sums[:, : len(sums)].clone(), sums[:, len(sums) :]
    mean = cross[0] / gram[0, 0]  # the first function is 1
    # Functions can be equal in the fitted images, for example where these have one colour.
    gram.diagonal().add_(1e-9 * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, cross), mean


def position_r2(features: Sequence[TokenFeatures]) -> float | None:
    """Share of the tokens' variance that their position alone predicts; see `held_out_r2`."""
    grids, sizes = [each.grid for each in features], [len(each.tokens) for each in features]
    order = position_order(grids, sum(sizes) - max(sizes))
    return held_out_r2(features, [position_functions(grid, order) for grid in grids])


def colour_r2(features: Sequence[TokenFeatures]) -> float | None:
    """Share of the variance that the mean colours of patches predict; see `held_out_r2`."""
    return held_out_r2(features, [colour_functions(each.image, each.grid) for each in features])


def held_out_r2(features: Sequence[TokenFeatures], functions: Sequence[Tensor]) -> float | None:
    """Share of the tokens' variance that a linear map of functions (N, F) of each image predicts.

    The map is fitted to all images but one and predicts the one; every image is left out once.
    None for a single image, and for tokens that do not vary.
    """
    if len(features) < 2:
        return None
    tokens = [each.tokens.double() for each in features]
    sums = [fit_sums(*pair) for pair in zip(functions, tokens, strict=True)]
    whole = torch.stack(sums).sum(dim=0)
    error = deviation = 0.0
    for f, t, own in zip(functions, tokens, sums, strict=True):
        weights, mean = solve_fit(whole - own)
        error += float((t - f @ weights).square().sum())
        deviation += float((t - mean).square().sum())
    return 1 - error / deviation if deviation > 0 else None


class ExplainedVariance(Measure):
    """R2 of tokens by the position and by the mean colour of their patches, in percent."""

    name = "explained_variance"
    without_direction = ("position_r2", "colour_r2")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        side = max(task.options.short_side // task.encoder.patch_size, 1)
        self.order = position_order([(side, side)], len(task.train.images) * side**2)
        self.sums: dict[str, Tensor] = {}
        self.errors: dict[str, float] = defaultdict(float)
        self.deviation = self.energy = 0.0

    def _functions(self, sample: Sample) -> dict[str, Tensor]:
        return {
            "position": position_functions(sample.grid, self.order),
            "colour": colour_functions(sample.pixels, sample.grid),
        }

    def observe_train(self, sample: Sample) -> None:
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            self.sums[name] = fit_sums(functions, tokens) + self.sums.get(name, 0.0)

    def fit(self) -> None:
        self.fits = {name: solve_fit(sums) for name, sums in self.sums.items()}

    def observe_val(self, sample: Sample) -> None:
        tokens = sample.tokens.double().cpu()
        for name, functions in self._functions(sample).items():
            weights, mean = self.fits[name]
            self.errors[name] += float((tokens - functions @ weights).square().sum())
        self.deviation += float((tokens - mean).square().sum())  # both fits have the same tokens
        self.energy += float(tokens.square().sum())

    def results(self) -> dict[str, float]:
        if self.deviation <= 1e-12 * self.energy:  # differences of rounding only
            raise InputError(
                "all tokens of the validation images are the same, so there is no variance to "
                "explain; look at the encoder with tools/visualize.py."
            )
        return {f"{k}_r2": 100 * (1 - error / self.deviation) for k, error in self.errors.items()}
