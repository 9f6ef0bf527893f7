"""Numbers beside the pictures: how far tokens attend, what place and colour tell about them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.evaluation.explained_variance import (
    LinearFit,
    colour_functions,
    patch_colours,
    position_functions,
    position_order,
)
from flsl_d2.mean_shift import attention, cluster, mean_shift
from flsl_d2.visualization.figures import mark_cell, overlay_heat, palette

Array = np.ndarray | torch.Tensor
Grid = tuple[int, int]


def as_tokens(tokens: Array, grid: Grid) -> torch.Tensor:
    """Tokens as float32 on the CPU, without gradient.

    Raises:
        ValueError: the tokens do not fill the grid.
    """
    tokens = torch.as_tensor(tokens).detach().cpu().float()
    if tokens.ndim != 2 or len(tokens) != grid[0] * grid[1]:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not fill a grid of {grid[0]} x {grid[1]}: "
            "expected (N, D) with N = rows * columns"
        )
    return tokens


def self_attention_scale(width: int) -> float:
    """The scale of attention within a view, 0.1 / sqrt(D) (arXiv 2306.06203, Sec. 5)."""
    return 0.1 / width**0.5


def central_token(grid: Grid) -> int:
    """Row-major index of the grid's middle cell."""
    return grid[0] // 2 * grid[1] + grid[1] // 2


def token_at(x: float, y: float, size: tuple[int, int], grid: Grid) -> int:
    """Row-major index of the token that covers a point.

    Args:
        x, y: in pixels.
        size: height and width of the image.
        grid: rows and columns of the tokens.
    """
    row = min(max(int(y * grid[0] / size[0]), 0), grid[0] - 1)
    column = min(max(int(x * grid[1] / size[1]), 0), grid[1] - 1)
    return row * grid[1] + column


def attention_values(
    tokens: Array, grid: Grid, token: int, scale: float | None = None
) -> np.ndarray:
    """Attention of one token to all, (rows, columns), in multiples of the even share 1/N."""
    tokens = as_tokens(tokens, grid)
    scale = self_attention_scale(tokens.shape[1]) if scale is None else scale
    weights = attention(tokens[None, token : token + 1], tokens[None], scale)[0, 0]
    return (weights * len(tokens)).reshape(grid).numpy()


def mode_similarity_values(
    tokens: Array, grid: Grid, token: int, scale: float | None = None, num_iterations: int = 3
) -> np.ndarray:
    """Cosine similarity of all tokens with one token's mode, (rows, columns) in [-1, 1].

    The mode is where the token arrives after `num_iterations` of mean-shift among all tokens.
    """
    tokens = as_tokens(tokens, grid)
    scale = self_attention_scale(tokens.shape[1]) if scale is None else scale
    mode = mean_shift(tokens[None, token : token + 1], tokens[None], scale, num_iterations)[0]
    return F.cosine_similarity(tokens, mode, dim=-1).reshape(grid).numpy()


def attention_map(
    image: np.ndarray, tokens: Array, grid: Grid, token: int, scale: float | None = None
) -> np.ndarray:
    """Where one token (its cross) looks: attention over the image, from none to the largest."""
    values = attention_values(tokens, grid, token, scale)
    return mark_cell(overlay_heat(image, values, 0.0, float(values.max())), grid, token)


def mode_similarity_map(
    image: np.ndarray,
    tokens: Array,
    grid: Grid,
    token: int,
    scale: float | None = None,
    num_iterations: int = 3,
) -> np.ndarray:
    """How near every token is to the mode of one (its cross), from the least to the most near."""
    values = mode_similarity_values(tokens, grid, token, scale, num_iterations)
    heat = overlay_heat(image, values, float(values.min()), float(values.max()))
    return mark_cell(heat, grid, token)


def pca_colours(token_sets: Sequence[Array]) -> list[np.ndarray]:
    """The first three principal components as red, green and blue, (N, 3) uint8 of each set.

    Args:
        token_sets: (N, D) each. The components are those of all sets together, so that a colour
            means the same in every image; give one set for the components of one image.

    Each component covers its 2nd to 98th percentile; its sign makes its extreme bright.
    """
    sizes = [len(tokens) for tokens in token_sets]
    tokens = torch.cat([torch.as_tensor(tokens).detach().cpu().float() for tokens in token_sets])
    centred = tokens - tokens.mean(dim=0)
    rank = min(3, *centred.shape)
    basis, strength, _ = torch.linalg.svd(centred, full_matrices=False)
    components = basis[:, :rank] * strength[:rank]
    # A singular vector's sign is arbitrary; fixing it keeps colours from flipping between runs.
    extreme = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = torch.where(extreme < 0, -components, components)
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = F.pad(colours, (0, 3 - rank), value=0.5)
    return [part.numpy() for part in (colours * 255).to(torch.uint8).split(sizes)]


def pca_rgb(tokens: Array, grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """The first three principal components of one image's tokens as red, green and blue.

    Args:
        tokens: (N, D).
        grid: rows, columns.
        size: height and width of the result. Each cell is one flat colour: what is seen at the
            borders is the encoder's resolution.

    See :func:`pca_colours` for the range and the sign of the components.
    """
    (colours,) = pca_colours([as_tokens(tokens, grid)])
    rows = np.arange(size[0]) * grid[0] // size[0]
    columns = np.arange(size[1]) * grid[1] // size[1]
    return colours.reshape(*grid, 3)[rows][:, columns]


def cluster_labels(
    tokens: Array, grid: Grid, scale: float | None = None, merge_threshold: float = 0.95
) -> np.ndarray:
    """Mean-shift clusters of one image, (rows, columns) int64, 0 being the largest."""
    tokens = as_tokens(tokens, grid)
    scale = self_attention_scale(tokens.shape[1]) if scale is None else scale
    labels, _ = cluster(tokens, scale, merge_threshold=merge_threshold)
    return labels.reshape(grid).numpy()


def cluster_overlay(
    image: np.ndarray, labels: Array, grid: Grid, opacity: float = 0.5
) -> np.ndarray:
    """Colour every cluster and draw the borders between them.

    Args:
        image: (H, W, 3) uint8.
        labels: (N,) or (rows, columns) cluster numbers from 0 on.
        grid: rows, columns.
        opacity: of the colours.
    """
    labels = np.asarray(torch.as_tensor(labels).cpu()).reshape(grid)
    height, width = image.shape[:2]
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    full = labels[rows][:, columns]
    colours = palette(int(labels.max()) + 1)[full]
    out = ((1 - opacity) * image + opacity * colours).astype(np.uint8)
    border = np.zeros((height, width), bool)
    border[1:] |= full[1:] != full[:-1]
    border[:, 1:] |= full[:, 1:] != full[:, :-1]
    if min(height, width) > 300:
        border[:-1] |= border[1:]
        border[:, :-1] |= border[:, 1:]
    out[border] = 255
    return out


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
