"""Pages about encoders: what their tokens see and how they group, for a few images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import cv2
import numpy as np

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.visualization.described import DescribedEncoder, Patch, nearest_patches
from flsl_d2.visualization.figures import Panel, enlarge, mark_cell, picture_table
from flsl_d2.visualization.maps import (
    Grid,
    attention_map,
    cluster_labels,
    cluster_overlay,
    mode_similarity_map,
    pca_rgb,
    token_at,
)

_CROP_INCHES = 1.15
_CONTEXT = 5  # patches that a crop shows across
MAPS = ("pca", "attention", "mode", "clusters")

Point = tuple[int, float, float]
"""The index of an image and a point in it, x and y as shares of its sides."""


def chosen_token(encoder: DescribedEncoder, point: Point) -> int:
    """Return the index of the encoder's token that covers a point."""
    return token_at(point[1], point[2], (1, 1), encoder.features[point[0]].grid)


def encoder_figure(
    features: Sequence[TokenFeatures],
    path: str | os.PathLike[str],
    tokens: Sequence[int] | None = None,
    scale: float | None = None,
    num_iterations: int = 3,
    title: str = "What the encoder's tokens group",
) -> None:
    """Write a row for every image: image, PCA, attention, similarity with the mode, clusters.

    ``tokens`` names for each image the token whose attention and mode are shown, by default that
    in the middle; ``scale`` as in :mod:`flsl_d2.visualization.maps`.
    """
    rows = []
    for i, each in enumerate(features):
        rows_of, columns_of = each.grid
        middle = rows_of // 2 * columns_of + columns_of // 2
        token = middle if tokens is None else tokens[i]
        large = _enlarged(each)
        labels = cluster_labels(large, scale)
        cross = Panel(mark_cell(large.image, each.grid, token), f"{rows_of} x {columns_of} tokens")
        maps = [_map(kind, large, token, scale, num_iterations, labels) for kind in MAPS]
        rows.append([cross, *maps])
    headings = (
        "image\n(cross: the chosen token)",
        "three principal components\nof the features as RGB",
        "attention of the chosen\ntoken (1: the even share)",
        f"cosine similarity to the token's\nmode ({_steps(num_iterations)})",
        "clusters: tokens whose\nmodes meet",
    )
    picture_table(path, title, rows, headings)


def _enlarged(features: TokenFeatures) -> TokenFeatures:
    return features._replace(image=enlarge(features.image)[0])


def _map(
    kind: str,
    features: TokenFeatures,
    token: int,
    scale: float | None,
    num_iterations: int,
    labels: np.ndarray,
) -> Panel:
    """Draw one of `MAPS`."""
    if kind == "pca":
        return Panel(pca_rgb(features))
    if kind == "attention":
        return attention_map(features, token, scale)
    if kind == "mode":
        return mode_similarity_map(features, token, scale, num_iterations)
    count = int(labels.max()) + 1
    note = f"{count} cluster{'s' * (count != 1)}"
    return Panel(cluster_overlay(features.image, labels), note)


def comparison_figure(
    encoders: Sequence[DescribedEncoder],
    points: Sequence[Point],
    path: str | os.PathLike[str],
    scale: float,
    num_iterations: int = 3,
    maps: Sequence[str] = MAPS,
) -> None:
    """Write a row for every point, with each kind of map for all encoders side by side.

    The encoders have tokens of the same images; ``scale`` is one of theirs, times sqrt(D).
    """
    names = {"pca": "PCA", "mode": f"mode, {_steps(num_iterations)}"}
    headings = [
        "image",
        *(f"{names.get(kind, kind)}\n{each.name}" for kind in maps for each in encoders),
    ]
    rows = []
    for point in points:
        large = [_enlarged(encoder.features[point[0]]) for encoder in encoders]
        image = large[0].image
        if {"attention", "mode"} & set(maps):  # the others do not depend on the point
            pixels = (image.shape[0], image.shape[1])
            image = mark_cell(image, pixels, token_at(point[1], point[2], (1, 1), pixels))
        row = [Panel(image)]
        for kind in maps:
            for encoder, features in zip(encoders, large, strict=True):
                token, kernel = chosen_token(encoder, point), scale / encoder.width**0.5
                labels = encoder.labels[scale][point[0]]
                row.append(_map(kind, features, token, kernel, num_iterations, labels))
        rows.append(row)
    picture_table(path, f"Encoders side by side, scale {scale:g} / sqrt(D)", rows, headings)


def modes_figure(
    encoder: DescribedEncoder,
    points: Sequence[Point],
    path: str | os.PathLike[str],
    scale: float,
    num_iterations: int,
) -> None:
    """Write a row for every point: the similarity with its mode after 1 to n mean-shift steps."""
    steps, kernel = range(1, num_iterations + 1), scale / encoder.width**0.5
    rows = []
    for point in points:
        features, token = _enlarged(encoder.features[point[0]]), chosen_token(encoder, point)
        maps = [mode_similarity_map(features, token, kernel, n) for n in steps]
        rows.append([Panel(mark_cell(features.image, features.grid, token)), *maps])
    title = f"Similarity to the mode of the chosen token: {encoder.name}, scale {scale:g} / sqrt(D)"
    picture_table(path, title, rows, ["image", *map(_steps, steps)])


def nearest_figure(
    encoder: DescribedEncoder,
    points: Sequence[Point],
    path: str | os.PathLike[str],
    count: int = 10,
) -> None:
    """Write a row for every point: its patch, then the most similar ones of the other images."""
    rows = []
    for point in points:
        token = chosen_token(encoder, point)
        near = nearest_patches(encoder.features, point[0], token, count)
        chosen = _crop_panel(encoder, Patch(point[0], token, 1.0))._replace(note="chosen")
        rows.append([chosen, *(_crop_panel(encoder, patch) for patch in near)])
    labels = [f"image {point[0] + 1}" for point in points]
    title = f"Nearest patches in other images (cosine): {encoder.name}"
    picture_table(path, title, rows, labels=labels, width=_CROP_INCHES)


def groups_figure(encoder: DescribedEncoder, path: str | os.PathLike[str]) -> None:
    """Write a row for each of the most used centroids with its best patches."""
    total = sum(len(each.tokens) for each in encoder.features)
    labels = [
        f"{group.number}: {group.count / total:.1%}\n"
        f"in {group.num_images} of {len(encoder.features)}\nimages"
        for group in encoder.groups
    ]
    rows = [[_crop_panel(encoder, patch) for patch in group.patches] for group in encoder.groups]
    title = f"Most used centroids: {encoder.name}\n{encoder.groups_note}"
    picture_table(path, title, rows, labels=labels, width=_CROP_INCHES)


def crop_patch(image: np.ndarray, grid: Grid, token: int, side: int = 96) -> np.ndarray:
    """Cut out a token's patch, outlined, with two patches around it: (side, side, 3) uint8.

    At the image's edge the patch is not in the middle.
    """
    height, width = image.shape[:2]
    cell = (width / grid[1], height / grid[0])
    extent = [min(_CONTEXT * c, size) for c, size in zip(cell, (width, height), strict=True)]
    row, column = divmod(token, grid[1])
    left, top = (
        min(max((index + 0.5) * c - e / 2, 0), size - e)
        for index, c, e, size in zip((column, row), cell, extent, (width, height), strict=True)
    )
    # The point (x, y) of the crop shows the point (left, top) + (x, y) / factor of the image.
    factor = (side / extent[0], side / extent[1])
    matrix = np.array([[factor[0], 0, -left * factor[0]], [0, factor[1], -top * factor[1]]])
    matrix[:, 2] += (np.array(factor) - 1) / 2  # pixels have their centres at half-integers
    crop = cv2.warpAffine(
        image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    first = [round((column * cell[0] - left) * factor[0]), round((row * cell[1] - top) * factor[1])]
    ends = ((column + 1) * cell[0] - left) * factor[0], ((row + 1) * cell[1] - top) * factor[1]
    last = [min(round(end), side) - 1 for end in ends]
    cv2.rectangle(crop, first, last, (0, 0, 0), 3)
    cv2.rectangle(crop, first, last, (255, 255, 255), 1)
    return crop


def _crop_panel(encoder: DescribedEncoder, patch: Patch) -> Panel:
    features = encoder.features[patch.image]
    crop = crop_patch(features.image, features.grid, patch.token)
    return Panel(crop, f"{patch.score:.2f}, image {patch.image + 1}")


def _steps(count: int) -> str:
    return f"{count} mean-shift step{'s' * (count != 1)}"
