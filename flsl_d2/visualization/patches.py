"""Patches of images that look alike to an encoder, and crops that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch.nn.functional as F

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.visualization.maps import Grid

_MIN_DISTANCE = 3  # cells; nearer patches of one image show the same thing twice
_CONTEXT = 5  # patches that a crop shows across


class Patch(NamedTuple):
    """A token of one of several images, and how well it fits."""

    image: int
    token: int
    score: float


def nearest_patches(
    features: Sequence[TokenFeatures], image: int, token: int, count: int = 10
) -> list[Patch]:
    """Find the most similar tokens (cosine) in all other images, none of them side by side."""
    query = F.normalize(features[image].tokens[token], dim=0)
    found: list[Patch] = []
    for i, each in enumerate(features):
        if i != image:
            cosine = F.normalize(each.tokens, dim=1) @ query
            found += [Patch(i, j, score) for j, score in enumerate(cosine.tolist())]
    found.sort(key=lambda patch: -patch.score)
    return spread(found, [each.grid for each in features], count)


def spread(
    patches: Iterable[Patch], grids: Sequence[Grid], count: int, per_image: int | None = None
) -> list[Patch]:
    """Take patches in order, except those within 2 cells of one that was taken before.

    At most ``count`` are taken, and at most ``per_image`` of one image; None for no bound.
    """
    taken: list[Patch] = []
    for patch in patches:
        if len(taken) == count:
            break
        columns = grids[patch.image][1]
        row, column = divmod(patch.token, columns)
        same_image = [divmod(other.token, columns) for other in taken if other.image == patch.image]
        near = any(max(abs(row - r), abs(column - c)) < _MIN_DISTANCE for r, c in same_image)
        if not near and (per_image is None or len(same_image) < per_image):
            taken.append(patch)
    return taken


def crop_patch(image: np.ndarray, grid: Grid, token: int, side: int = 96) -> np.ndarray:
    """Cut out a token's patch, outlined, with two patches of its surroundings on each side.

    Returns:
        (side, side, 3) uint8; at the image's edge the patch is not in the middle.
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
    corners = [
        (
            round((((column + d) * cell[0]) - left) * factor[0]),
            round((((row + d) * cell[1]) - top) * factor[1]),
        )
        for d in (0, 1)
    ]
    last = (min(corners[1][0], side) - 1, min(corners[1][1], side) - 1)
    cv2.rectangle(crop, corners[0], last, (0, 0, 0), 3)
    cv2.rectangle(crop, corners[0], last, (255, 255, 255), 1)
    return crop
