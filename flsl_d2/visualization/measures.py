"""Numbers beside the pictures: how far tokens attend, what place and colour tell about them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flsl_d2.evaluation.explained_variance import (
    LinearFit,
    colour_functions,
    patch_colours,
    position_functions,
    position_order,
)
from flsl_d2.mean_shift import attention
from flsl_d2.visualization.clusters import Array, Grid, as_tokens


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
    order = position_order(grids, sum(sizes) - max(sizes))
    return held_out_r2(tokens, [position_functions(grid, order) for grid in grids])


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
    colours = [patch_colours(image, grid) for image, grid in zip(images, grids, strict=True)]
    return held_out_r2(tokens, [colour_functions(of_image) for of_image in colours])


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
    fits = [LinearFit.of(f, t) for f, t in zip(functions, tokens, strict=True)]
    whole = functools.reduce(operator.add, fits)
    error = deviation = 0.0
    for f, t, own in zip(functions, tokens, fits, strict=True):
        others = whole - own
        error += float((t - f @ others.solve()).square().sum())
        deviation += float((t - others.mean).square().sum())
    return 1 - error / deviation if deviation > 0 else None
