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
    attention_map,
    attention_values,
    central_token,
    cluster_labels,
    cluster_overlay,
    mode_similarity_map,
    mode_similarity_values,
    pca_rgb,
    token_at,
)
from flsl_d2.visualization.described import DescribedEncoder
from flsl_d2.visualization.figures import (
    Sheet,
    enlarge,
    mark_cell,
    new_figure,
    overlay_heat,
    save_figure,
    show_image,
)
from flsl_d2.visualization.patches import Patch, crop_patch, nearest_patches

_SHORTER_SIDE = 320
_PANEL_INCHES = 2.3
_CROP_INCHES = 1.15
_GAP_INCHES = 0.08
_TOP_INCHES = 0.85

Points = Sequence[tuple[int, float, float]]
"""Of each row its image and the chosen point, x and y as shares of width and height."""


def chosen_token(encoder: DescribedEncoder, point: tuple[int, float, float]) -> int:
    """The encoder's token that covers a point."""
    image, x, y = point
    return token_at(x, y, (1, 1), encoder.grids[image])


def modes_figure(
    encoder: DescribedEncoder,
    images: Sequence[np.ndarray],
    points: Points,
    path: str | os.PathLike[str],
    scale: float,
    num_iterations: int,
) -> None:
    """Write a row a point: the similarity map of its mode after 1 to n mean-shift iterations.

    Args:
        encoder: with its tokens of the images.
        images: (H, W, 3) uint8 each.
        points: see :data:`Points`.
        path: the PNG to write.
        scale: of the attention, times sqrt(D).
        num_iterations: n.
    """
    columns: list[tuple[str, list[np.ndarray]]] = [("image", [])]
    columns += [(_steps(n), []) for n in range(1, num_iterations + 1)]
    for point in points:
        image, grid = enlarge(images[point[0]], _SHORTER_SIDE)[0], encoder.grids[point[0]]
        tokens, token = encoder.tokens[point[0]], chosen_token(encoder, point)
        columns[0][1].append(mark_cell(image, grid, token))
        for n in range(1, num_iterations + 1):
            picture = mode_similarity_map(image, tokens, grid, token, scale / encoder.width**0.5, n)
            columns[n][1].append(picture)
    title = f"Similarity to the mode of the chosen token: {encoder.name}, scale {scale:g} / sqrt(D)"
    _table_of_pictures(title, columns, path)


def nearest_figure(
    encoder: DescribedEncoder,
    images: Sequence[np.ndarray],
    points: Points,
    path: str | os.PathLike[str],
    count: int = 10,
) -> None:
    """Write a row a point: its patch, then the most similar ones of the other images.

    Args:
        encoder: with its tokens of the images.
        images: (H, W, 3) uint8 each.
        points: see :data:`Points`.
        path: the PNG to write.
        count: of patches in a row.
    """
    rows = []
    for point in points:
        token = chosen_token(encoder, point)
        near = nearest_patches(encoder.tokens, encoder.grids, point[0], token, count)
        rows.append((f"image {point[0] + 1}", [Patch(point[0], token, 1.0), *near]))
    title = f"Nearest patches in other images (cosine): {encoder.name}"
    _table_of_patches(title, rows, encoder, images, path, first="chosen")


def groups_figure(
    encoder: DescribedEncoder, images: Sequence[np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Write a row for each of the most used centroids with its best patches.

    Args:
        encoder: with its groups.
        images: (H, W, 3) uint8 each.
        path: the PNG to write.
    """
    total = sum(len(tokens) for tokens in encoder.tokens)
    rows = [
        (
            f"{group.number}: {group.count / total:.1%}\n"
            f"in {group.num_images} of {len(images)}\nimages",
            group.patches,
        )
        for group in encoder.groups
    ]
    title = f"Most used centroids: {encoder.name}\n{encoder.groups_note}"
    _table_of_patches(title, rows, encoder, images, path)


def comparison_figure(
    encoders: Sequence[DescribedEncoder],
    images: Sequence[np.ndarray],
    points: Points,
    path: str | os.PathLike[str],
    scale: float,
    num_iterations: int,
) -> None:
    """Write a row a point with each kind of map for all encoders side by side.

    Args:
        encoders: with their tokens of the same images.
        images: (H, W, 3) uint8 each.
        points: see :data:`Points`.
        path: the PNG to write.
        scale: of attention, mode and clusters, times sqrt(D); one of the encoders' scales.
        num_iterations: mean-shift steps to the mode.
    """
    large = [enlarge(image, _SHORTER_SIDE)[0] for image in images]
    columns = [("image", [_crossed(large[p[0]], p) for p in points])]
    kinds = ("PCA", "attention", f"mode, {_steps(num_iterations)}", "clusters")
    for kind, heading in enumerate(kinds):
        for encoder in encoders:
            root = encoder.width**0.5
            pictures = []
            for point in points:
                i, token = point[0], chosen_token(encoder, point)
                tokens, grid, image = encoder.tokens[i], encoder.grids[i], large[point[0]]
                if kind == 0:
                    pictures.append(pca_rgb(tokens, grid, image.shape[:2]))
                elif kind == 1:
                    pictures.append(attention_map(image, tokens, grid, token, scale / root))
                elif kind == 2:
                    pictures.append(
                        mode_similarity_map(
                            image, tokens, grid, token, scale / root, num_iterations
                        )
                    )
                else:
                    pictures.append(cluster_overlay(image, encoder.labels[scale][i], grid))
            columns.append((f"{heading}\n{encoder.name}", pictures))
    _table_of_pictures(f"Encoders side by side, scale {scale:g} / sqrt(D)", columns, path)


def _steps(count: int) -> str:
    return f"{count} iteration{'s' * (count != 1)}"


def _crossed(image: np.ndarray, point: tuple[int, float, float]) -> np.ndarray:
    grid = image.shape[:2]
    return mark_cell(image, grid, token_at(point[1], point[2], (1, 1), grid))


def _table_of_pictures(
    title: str, columns: list[tuple[str, list[np.ndarray]]], path: str | os.PathLike[str]
) -> None:
    heights = [_PANEL_INCHES * p.shape[0] / p.shape[1] for p in columns[0][1]]
    step = _PANEL_INCHES + _GAP_INCHES
    sheet = Sheet(
        len(columns) * step + _GAP_INCHES, _TOP_INCHES + sum(heights) + 0.2 * len(heights), title
    )
    for column, (heading, pictures) in enumerate(columns):
        x, y = _GAP_INCHES + column * step, _TOP_INCHES
        sheet.write(heading, x + _PANEL_INCHES / 2, y - 0.06, 10, va="bottom")
        for picture, height in zip(pictures, heights, strict=True):
            sheet.show(picture, x, y, _PANEL_INCHES, height)
            y += height + 0.15
    sheet.save(path)


def _table_of_patches(
    title: str,
    rows: list[tuple[str, list[Patch]]],
    encoder: DescribedEncoder,
    images: Sequence[np.ndarray],
    path: str | os.PathLike[str],
    first: str = "",
) -> None:
    # Wide enough for the title, however few the patches are.
    most = max(7, *(len(patches) for _, patches in rows))
    side, left, below = _CROP_INCHES, 1.1, 0.33
    step = side + _GAP_INCHES
    sheet = Sheet(left + most * step, _TOP_INCHES + len(rows) * (side + below), title)
    for row, (label, patches) in enumerate(rows):
        y = _TOP_INCHES + row * (side + below)
        sheet.write(label, left - 0.1, y + side / 2, 8, ha="right", va="center")
        for place, patch in enumerate(patches):
            x = left + place * step
            crop = crop_patch(images[patch.image], encoder.grids[patch.image], patch.token)
            note = f"{patch.score:.2f}, image {patch.image + 1}"
            sheet.show(crop, x, y, side, side)
            note = first if first and place == 0 else note
            sheet.write(note, x + side / 2, y + side + 0.05, 7, va="top")
    sheet.save(path)


_COLOUR_MAP = "turbo"
_PAGE_PANEL_INCHES = 2.6


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
    heights = [_PAGE_PANEL_INCHES * image.shape[0] / image.shape[1] for image in images]
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
