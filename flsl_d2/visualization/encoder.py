"""One page about an encoder: what its tokens see and how they group, for a few images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from flsl_d2.visualization.clusters import (
    Array,
    Grid,
    as_tokens,
    attention_values,
    central_token,
    cluster_labels,
    cluster_overlay,
    mode_similarity_values,
    pca_rgb,
)
from flsl_d2.visualization.figure_files import new_figure, save_figure, show_image
from flsl_d2.visualization.overlays import enlarge, mark_cell, overlay_heat

_SHORTER_SIDE = 320
_COLOUR_MAP = "turbo"
_PANEL_INCHES = 2.6


def encoder_figure(
    images: Sequence[np.ndarray],
    token_features: Sequence[Array],
    grid: Grid | Sequence[Grid],
    path: str | os.PathLike[str],
    tokens: Sequence[int] | None = None,
    scale: float | None = None,
    num_iterations: int = 3,
    merge_threshold: float = 0.95,
    title: str = "What the encoder's tokens group",
) -> None:
    """Draw a row for every image: image, PCA, attention, similarity with the mode, clusters.

    Args:
        images: (H, W, 3) uint8 RGB each.
        token_features: (N, D) each, row-major over its grid; not normalised.
        grid: rows and columns of the tokens, one for all images or one each.
        path: the PNG to write.
        tokens: for each image the token whose attention and mode are shown; the middle by default.
        scale: of the attention; 0.1 / sqrt(D) by default, the method's value within a view.
        num_iterations: mean-shift steps from the token to its mode.
        merge_threshold: modes with a larger cosine similarity are one cluster.
        title: the page's heading.
    """
    if not images or len(images) != len(token_features):
        raise ValueError(f"{len(images)} images and {len(token_features)} sets of tokens")
    grids = [grid] * len(images) if isinstance(grid[0], int) else list(grid)
    heights = [_PANEL_INCHES * image.shape[0] / image.shape[1] for image in images]
    figure = new_figure(15, 1.2 + sum(heights) + 0.3 * len(heights))
    figure.suptitle(title, fontsize=15)
    axes = figure.subplots(
        len(images), 5, squeeze=False, gridspec_kw={"height_ratios": [h + 0.2 for h in heights]}
    )
    steps = f"{num_iterations} mean-shift step{'s' * (num_iterations != 1)}"
    headings = (
        "image\n(cross: the chosen token)",
        "features' three principal\ncomponents as RGB",
        "attention of the chosen\ntoken (1 = even share)",
        f"cosine similarity to the\ntoken's mode ({steps})",
        "clusters: tokens whose\nmodes meet",
    )
    for column, heading in enumerate(headings):
        axes[0, column].set_title(heading, fontsize=11)
    for row, (image, features, each) in enumerate(zip(images, token_features, grids, strict=True)):
        features = as_tokens(features, each)
        large, _ = enlarge(np.asarray(image), _SHORTER_SIDE)
        token = central_token(each) if tokens is None else tokens[row]
        weights = attention_values(features, each, token, scale)
        nearness = mode_similarity_values(features, each, token, scale, num_iterations)
        labels = cluster_labels(features, each, scale, merge_threshold)
        found = int(labels.max()) + 1

        show_image(axes[row, 0], mark_cell(large, each, token))
        show_image(axes[row, 1], pca_rgb(features, each, large.shape[:2]))
        for column, values, low in ((2, weights, 0.0), (3, nearness, float(nearness.min()))):
            span = Normalize(low, float(values.max()))
            heat = overlay_heat(large, values, span.vmin, span.vmax, _COLOUR_MAP)
            show_image(axes[row, column], mark_cell(heat, each, token))
            beside = axes[row, column].inset_axes((1.02, 0.0, 0.04, 1.0))
            figure.colorbar(ScalarMappable(span, _COLOUR_MAP), cax=beside)
            beside.tick_params(labelsize=8)
        note = f"{found} cluster{'s' * (found != 1)}"
        show_image(axes[row, 4], cluster_overlay(large, labels, each), note)
        axes[row, 0].set_xlabel(f"{each[0]} x {each[1]} tokens", fontsize=9)
    save_figure(figure, path)
