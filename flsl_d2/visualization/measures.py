"""Numbers beside the pictures: how far tokens attend, what place and colour tell about them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from flsl_d2.mean_shift import attention
from flsl_d2.visualization.clusters import Array, Grid, as_tokens

_MOST_HALF_WAVES = 12
_TOKENS_A_FUNCTION = 10


def attended_share(tokens: Array, grid: Grid, scale: float) -> float:
    """Share of the image that a token attends to: exp(entropy of its attention) / N, mean over all.

    1 is even attention to the whole image, 1/N attention to a single token.

    Args:
        tokens: (N, D).
        grid: rows, columns.
        scale: of the attention.
    """
    tokens = as_tokens(tokens, grid)
    weights = attention(tokens[None], tokens[None], scale)[0]
    return float(torch.special.entr(weights).sum(dim=1).exp().mean() / len(tokens))


def position_r2(token_sets: Sequence[Array], grids: Sequence[Grid]) -> float | None:
    """How much of the tokens' variance their position alone predicts, in images not fitted to.

    The position is given as products of cosines over the image's width and height, up to 12
    half-waves in all; see :func:`held_out_r2`.

    Args:
        token_sets: (N, D) of each image.
        grids: rows and columns of each image.

    Returns:
        1 where tokens tell nothing but where they are, about 0 (or a little less) where position
        tells nothing about them; None for a single image, and for tokens that do not vary.
    """
    tokens = [as_tokens(t, grid) for t, grid in zip(token_sets, grids, strict=True)]
    sizes = [len(t) for t in tokens]
    order = _order(grids, sum(sizes) - max(sizes))
    return held_out_r2(tokens, [_position_functions(grid, order) for grid in grids])


def colour_r2(
    token_sets: Sequence[Array], grids: Sequence[Grid], images: Sequence[np.ndarray]
) -> float | None:
    """How much of the tokens' variance the mean colours of their patches alone predict.

    Args:
        token_sets: (N, D) of each image.
        grids: rows and columns of each image.
        images: (H, W, 3) uint8 each.

    Returns:
        As of :func:`position_r2`, from a quadratic function of red, green and blue.
    """
    tokens = [as_tokens(t, grid) for t, grid in zip(token_sets, grids, strict=True)]
    functions = []
    for colours in patch_colours(images, grids):
        with_one = torch.cat([torch.ones(len(colours), 1), colours / 255], dim=1).double()
        first, second = torch.triu_indices(4, 4)
        functions.append(with_one[:, first] * with_one[:, second])
    return held_out_r2(tokens, functions)


def patch_colours(images: Sequence[np.ndarray], grids: Sequence[Grid]) -> list[Tensor]:
    """Mean colour of every patch, (N, 3) float32 in [0, 255] of each image."""
    return [
        torch.from_numpy(
            cv2.resize(image.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)
        ).reshape(-1, 3)
        for image, grid in zip(images, grids, strict=True)
    ]


def held_out_r2(token_sets: Sequence[Tensor], functions: Sequence[Tensor]) -> float | None:
    """Share of the tokens' variance that a linear map of some functions predicts.

    The map is fitted to the tokens of all images but one, and predicts those of that one; every
    image is left out once. The result is
    ``1 - |error|^2 / |deviation from the mean of the fitted tokens|^2``, both summed over images.

    Args:
        token_sets: (N, D) of each image.
        functions: (N, F) of each image; one of them is constant.

    Returns:
        At most 1, and below 0 where the functions predict worse than the mean; None for a single
        image, and for tokens that do not vary.
    """
    if len(token_sets) < 2:
        return None
    tokens = [t.double() for t in token_sets]
    gram = [f.T @ f for f in functions]
    cross = [f.T @ t for f, t in zip(functions, tokens, strict=True)]
    sums = [t.sum(dim=0) for t in tokens]
    all_gram, all_cross, all_sums = sum(gram), sum(cross), sum(sums)
    count = sum(len(t) for t in tokens)
    error = deviation = 0.0
    for i, (f, t) in enumerate(zip(functions, tokens, strict=True)):
        fitted = all_gram - gram[i]
        # Next to nothing, for functions that are alike in the fitted images (one colour, say).
        fitted.diagonal().add_(1e-9 * float(fitted.diagonal().mean()))
        predicted = f @ torch.linalg.solve(fitted, all_cross - cross[i])
        mean = (all_sums - sums[i]) / (count - len(t))
        error += float((t - predicted).square().sum())
        deviation += float((t - mean).square().sum())
    return 1 - error / deviation if deviation > 0 else None


def _order(grids: Sequence[Grid], num_fitted: int) -> int:
    """The most half-waves that grids can show and that the fitted tokens suffice for."""
    side = min(min(grid) for grid in grids)
    fitting = (math.isqrt(8 * (num_fitted // _TOKENS_A_FUNCTION) + 1) - 3) // 2
    return max(min(_MOST_HALF_WAVES, side - 1, fitting), 0)


def _position_functions(grid: Grid, order: int) -> Tensor:
    """cos(pi k y) cos(pi l x) with k + l <= order at the centres of the cells, (N, F)."""
    lines = []
    for cells in grid:
        at = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        lines.append(torch.cos(math.pi * at[:, None] * torch.arange(order + 1)))
    products = torch.einsum("yk,xl->yxkl", *lines)
    used = torch.arange(order + 1)[:, None] + torch.arange(order + 1) <= order
    return products[:, :, used].flatten(0, 1)
