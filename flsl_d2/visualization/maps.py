"""Maps of the tokens of one image: attention, modes, principal components and clusters.

A ``scale`` is that of attention and mean-shift, by default 0.1 / sqrt(D), the method's own within a
view (arXiv 2306.06203, Sec. 5). Tokens are not normalised, and named by row-major indexes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.mean_shift import attention, cluster, mean_shift
from flsl_d2.visualization.figures import Panel, mark_cell, overlay_heat, palette

Grid = tuple[int, int]

_WIDE_BORDERS_FROM = 300  # pixels of the shorter side
_CLUSTER_OPACITY = 0.5
_LEAST_RANGE = 0.05  # of cosines: smaller differences get no full contrast


def token_at(x: float, y: float, size: tuple[float, float], grid: Grid) -> int:
    """Return the token that covers a point, x from the left and y from the top of a (H, W)."""
    row = min(max(int(y * grid[0] / size[0]), 0), grid[0] - 1)
    column = min(max(int(x * grid[1] / size[1]), 0), grid[1] - 1)
    return row * grid[1] + column


def attention_values(features: TokenFeatures, token: int, scale: float | None = None) -> np.ndarray:
    """Attention of one token to all, (rows, columns), in multiples of the even share 1/N."""
    tokens = features.on_cpu().tokens
    weights = attention(tokens[None, token : token + 1], tokens[None], _scale(scale, tokens))[0, 0]
    return (weights * len(tokens)).reshape(features.grid).numpy()


def mode_similarity_values(
    features: TokenFeatures, token: int, scale: float | None = None, num_iterations: int = 3
) -> np.ndarray:
    """Cosine similarity of all tokens with the mode of one token, (rows, columns) in [-1, 1].

    The mode is where ``num_iterations`` mean-shift steps take the token.
    """
    tokens = features.on_cpu().tokens
    query = tokens[None, token : token + 1]
    mode = mean_shift(query, tokens[None], _scale(scale, tokens), num_iterations)[0]
    return F.cosine_similarity(tokens, mode, dim=-1).reshape(features.grid).numpy()


def _scale(scale: float | None, tokens: Tensor) -> float:
    return 0.1 / tokens.shape[1] ** 0.5 if scale is None else scale


def attention_map(features: TokenFeatures, token: int, scale: float | None = None) -> Panel:
    """Show :func:`attention_values` over the image, with a cross at the token."""
    return _heat_panel(features.image, attention_values(features, token, scale), 0.0, token)


def mode_similarity_map(
    features: TokenFeatures, token: int, scale: float | None = None, num_iterations: int = 3
) -> Panel:
    """Show :func:`mode_similarity_values` over the image, with a cross at the token."""
    values = mode_similarity_values(features, token, scale, num_iterations)
    low = min(float(values.min()), float(values.max()) - _LEAST_RANGE)
    return _heat_panel(features.image, values, low, token)


def _heat_panel(image: np.ndarray, values: np.ndarray, low: float, token: int) -> Panel:
    high = float(values.max())
    heat = overlay_heat(image, values, low, high)
    return Panel(mark_cell(heat, (values.shape[0], values.shape[1]), token), span=(low, high))


def pca_colours(token_sets: Sequence[Tensor]) -> list[np.ndarray]:
    """First three principal components as red, green and blue, (N, 3) uint8 of each set (N, D).

    The components are those of all sets together, so that a colour means the same in every image.
    Each covers its 2nd to 98th percentile, and its sign makes its extreme bright.
    """
    tokens = torch.cat(list(token_sets))
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
    sizes = [len(each) for each in token_sets]
    return [part.numpy() for part in (colours * 255).to(torch.uint8).split(sizes)]


def pca_rgb(features: TokenFeatures) -> np.ndarray:
    """Picture of :func:`pca_colours` of one image: (H, W, 3) uint8, a flat colour for each cell."""
    (colours,) = pca_colours([features.on_cpu().tokens])
    return _enlarged_cells(colours.reshape(*features.grid, 3), features.image.shape[:2])


def cluster_labels(
    features: TokenFeatures, scale: float | None = None, merge_threshold: float = 0.95
) -> np.ndarray:
    """Mean-shift clusters of one image, (rows, columns) int64; 0 is the largest.

    Modes whose cosine similarity exceeds ``merge_threshold`` are one cluster.
    """
    tokens = features.on_cpu().tokens
    labels, _ = cluster(tokens, _scale(scale, tokens), merge_threshold=merge_threshold)
    return labels.reshape(features.grid).numpy()


def cluster_overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Colour every cluster, (rows, columns) from 0 on, and draw white borders between them."""
    height, width = image.shape[:2]
    full = _enlarged_cells(labels, (height, width))
    colours = palette(int(full.max()) + 1)[full]
    out = ((1 - _CLUSTER_OPACITY) * image + _CLUSTER_OPACITY * colours).astype(np.uint8)
    border = np.zeros((height, width), bool)
    border[1:] |= full[1:] != full[:-1]
    border[:, 1:] |= full[:, 1:] != full[:, :-1]
    if min(height, width) > _WIDE_BORDERS_FROM:
        border[:-1] |= border[1:]
        border[:, :-1] |= border[:, 1:]
    out[border] = 255
    return out


def _enlarged_cells(cells: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(rows, columns, ...) to (H, W, ...): each pixel has the value of its cell."""
    rows, columns = (np.arange(s) * n // s for s, n in zip(size, cells.shape[:2], strict=True))
    return cells[rows][:, columns]


def attended_share(tokens: Tensor, scale: float) -> float:
    """Share of the image that a token attends to: exp(entropy of its attention) / N, mean over all.

    1 is even attention to the whole image, 1/N attention to a single token.
    """
    weights = attention(tokens[None], tokens[None], scale)[0]
    return float(torch.special.entr(weights).sum(dim=1).exp().mean() / len(tokens))
