"""Pages about encoders: what their tokens see and how they group, for a few images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from flsl_d2.visualization.described import DescribedEncoder
from flsl_d2.visualization.figures import Panel, enlarge, mark_cell, picture_table
from flsl_d2.visualization.maps import (
    Array,
    Grid,
    as_tokens,
    attention_map,
    central_token,
    cluster_labels,
    cluster_overlay,
    mode_similarity_map,
    pca_rgb,
    token_at,
)
from flsl_d2.visualization.patches import Patch, crop_patch, nearest_patches

__all__ = [
    "Points",
    "chosen_token",
    "comparison_figure",
    "encoder_figure",
    "groups_figure",
    "modes_figure",
    "nearest_figure",
]

_CROP_INCHES = 1.15

Points = Sequence[tuple[int, float, float]]
"""For each row the index of its image and the chosen point, x and y as shares of the sides."""


def chosen_token(encoder: DescribedEncoder, point: tuple[int, float, float]) -> int:
    """Return the index of the encoder's token that covers a point."""
    image, x, y = point
    return token_at(x, y, (1, 1), encoder.grids[image])


def encoder_figure(
    images: Sequence[np.ndarray],
    token_features: Sequence[Array],
    grid: Grid | Sequence[Grid],
    path: str | os.PathLike[str],
    tokens: Sequence[int] | None = None,
    scale: float | None = None,
    num_iterations: int = 3,
    title: str = "What the encoder's tokens group",
) -> None:
    """Write a row for every image: image, PCA, attention, similarity with the mode, clusters.

    Args:
        images: (H, W, 3) uint8 RGB each.
        token_features: (N, D) each, row-major over its grid; not normalised.
        grid: rows and columns of the tokens, one for all images or one for each.
        path: PNG file to write.
        tokens: for each image the token whose attention and mode are shown; the middle by default.
        scale: scale of the attention; 0.1 / sqrt(D), the method's value within a view, by default.
        num_iterations: mean-shift steps from the token to its mode.
        title: heading of the page.

    Raises:
        ValueError: images and sets of tokens differ in number, or tokens do not fill their grid.
    """
    if not images or len(images) != len(token_features):
        raise ValueError(f"{len(images)} images and {len(token_features)} sets of tokens")
    grids = _one_for_each(grid, len(images))
    rows = []
    for i, (image, each) in enumerate(zip(images, grids, strict=True)):
        features = as_tokens(token_features[i], each)
        token = central_token(each) if tokens is None else tokens[i]
        large = enlarge(np.asarray(image))[0]
        labels = cluster_labels(features, each, scale)
        rows.append(
            [
                Panel(mark_cell(large, each, token), f"{each[0]} x {each[1]} tokens"),
                Panel(pca_rgb(features, each, large.shape[:2])),
                attention_map(large, features, each, token, scale),
                mode_similarity_map(large, features, each, token, scale, num_iterations),
                _cluster_panel(large, labels, each),
            ]
        )
    headings = (
        "image\n(cross: the chosen token)",
        "three principal components\nof the features as RGB",
        "attention of the chosen\ntoken (1: the even share)",
        f"cosine similarity to the token's\nmode ({_steps(num_iterations)})",
        "clusters: tokens whose\nmodes meet",
    )
    picture_table(path, title, rows, headings)


def _one_for_each(grid: Grid | Sequence[Grid], count: int) -> list[Grid]:
    if isinstance(grid[0], int):
        return [(grid[0], int(grid[1]))] * count  # type: ignore[arg-type]
    return list(grid)  # type: ignore[arg-type]


def _cluster_panel(image: np.ndarray, labels: np.ndarray, grid: Grid) -> Panel:
    count = int(labels.max()) + 1
    return Panel(cluster_overlay(image, labels, grid), f"{count} cluster{'s' * (count != 1)}")


MAPS = ("pca", "attention", "mode", "clusters")


def comparison_figure(
    encoders: Sequence[DescribedEncoder],
    images: Sequence[np.ndarray],
    points: Points,
    path: str | os.PathLike[str],
    scale: float,
    num_iterations: int = 3,
    maps: Sequence[str] = MAPS,
) -> None:
    """Write a row for every point, with each kind of map for all encoders side by side.

    Args:
        encoders: with their tokens of the same images.
        images: (H, W, 3) uint8 each.
        points: see :data:`Points`.
        path: PNG file to write.
        scale: scale of attention, mode and clusters, times sqrt(D); one of the encoders'.
        num_iterations: mean-shift steps to the mode.
        maps: kinds of maps, of `MAPS`.
    """
    large = [enlarge(image)[0] for image in images]
    names = {
        "pca": "PCA",
        "attention": "attention",
        "mode": f"mode, {_steps(num_iterations)}",
        "clusters": "clusters",
    }
    crossed = {"attention", "mode"} & set(maps)
    rows = [[Panel(_crossed(large[p[0]], p) if crossed else large[p[0]])] for p in points]
    headings = ["image"]
    for kind in maps:
        for encoder in encoders:
            headings.append(f"{names[kind]}\n{encoder.name}")
            for row, point in zip(rows, points, strict=True):
                image = large[point[0]]
                row.append(_map_panel(kind, encoder, image, point, scale, num_iterations))
    picture_table(path, f"Encoders side by side, scale {scale:g} / sqrt(D)", rows, headings)


def _map_panel(
    kind: str,
    encoder: DescribedEncoder,
    image: np.ndarray,
    point: tuple[int, float, float],
    scale: float,
    num_iterations: int,
) -> Panel:
    tokens, grid = encoder.tokens[point[0]], encoder.grids[point[0]]
    token, kernel = chosen_token(encoder, point), scale / encoder.width**0.5
    draw: dict[str, Callable[[], Panel]] = {
        "pca": lambda: Panel(pca_rgb(tokens, grid, image.shape[:2])),
        "attention": lambda: attention_map(image, tokens, grid, token, kernel),
        "mode": lambda: mode_similarity_map(image, tokens, grid, token, kernel, num_iterations),
        "clusters": lambda: _cluster_panel(image, encoder.labels[scale][point[0]], grid),
    }
    return draw[kind]()


def modes_figure(
    encoder: DescribedEncoder,
    images: Sequence[np.ndarray],
    points: Points,
    path: str | os.PathLike[str],
    scale: float,
    num_iterations: int,
) -> None:
    """Write a row for every point: the similarity with its mode after 1 to n mean-shift steps.

    Args:
        encoder: with its tokens of the images.
        images: (H, W, 3) uint8 each.
        points: see :data:`Points`.
        path: PNG file to write.
        scale: scale of the attention, times sqrt(D).
        num_iterations: n.
    """
    steps = range(1, num_iterations + 1)
    rows = []
    for point in points:
        image, grid = enlarge(images[point[0]])[0], encoder.grids[point[0]]
        cross = Panel(mark_cell(image, grid, chosen_token(encoder, point)))
        rows.append([cross, *(_map_panel("mode", encoder, image, point, scale, n) for n in steps)])
    title = f"Similarity to the mode of the chosen token: {encoder.name}, scale {scale:g} / sqrt(D)"
    picture_table(path, title, rows, ["image", *map(_steps, steps)])


def nearest_figure(
    encoder: DescribedEncoder,
    images: Sequence[np.ndarray],
    points: Points,
    path: str | os.PathLike[str],
    count: int = 10,
) -> None:
    """Write a row for every point: its patch, then the most similar ones of the other images.

    Args:
        encoder: with its tokens of the images.
        images: (H, W, 3) uint8 each.
        points: see :data:`Points`.
        path: PNG file to write.
        count: number of patches in a row.
    """
    rows = []
    for point in points:
        token = chosen_token(encoder, point)
        near = nearest_patches(encoder.tokens, encoder.grids, point[0], token, count)
        chosen = _crop_panel(encoder, images, Patch(point[0], token, 1.0))._replace(note="chosen")
        rows.append([chosen, *(_crop_panel(encoder, images, patch) for patch in near)])
    labels = [f"image {point[0] + 1}" for point in points]
    title = f"Nearest patches in other images (cosine): {encoder.name}"
    picture_table(path, title, rows, labels=labels, width=_CROP_INCHES)


def groups_figure(
    encoder: DescribedEncoder, images: Sequence[np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Write a row for each of the most used centroids with its best patches.

    Args:
        encoder: with its groups.
        images: (H, W, 3) uint8 each.
        path: PNG file to write.
    """
    total = sum(len(tokens) for tokens in encoder.tokens)
    labels = [
        f"{group.number}: {group.count / total:.1%}\nin {group.num_images} of {len(images)}\nimages"
        for group in encoder.groups
    ]
    rows = [
        [_crop_panel(encoder, images, patch) for patch in group.patches] for group in encoder.groups
    ]
    title = f"Most used centroids: {encoder.name}\n{encoder.groups_note}"
    picture_table(path, title, rows, labels=labels, width=_CROP_INCHES)


def _crop_panel(encoder: DescribedEncoder, images: Sequence[np.ndarray], patch: Patch) -> Panel:
    crop = crop_patch(images[patch.image], encoder.grids[patch.image], patch.token)
    return Panel(crop, f"{patch.score:.2f}, image {patch.image + 1}")


def _crossed(image: np.ndarray, point: tuple[int, float, float]) -> np.ndarray:
    pixels = (image.shape[0], image.shape[1])
    return mark_cell(image, pixels, token_at(point[1], point[2], (1, 1), pixels))


def _steps(count: int) -> str:
    return f"{count} mean-shift step{'s' * (count != 1)}"
