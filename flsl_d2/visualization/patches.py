"""Patches that belong together: the nearest to a token, and those of the most used groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.evaluation.partitions import kmeans
from flsl_d2.visualization.clusters import Array, Grid, as_tokens

# Patches this near in one image show the same thing twice.
_APART = 2
_CONTEXT = 5
_KMEANS_TOKENS = 4096


class Patch(NamedTuple):
    """A token of one of several images, and how well it fits."""

    image: int
    token: int
    score: float


class PatchGroup(NamedTuple):
    """Tokens of several images that were given to one centroid.

    Attributes:
        number: of the centroid.
        count: tokens of it.
        num_images: images with a token of it.
        patches: its best tokens, best first.
    """

    number: int
    count: int
    num_images: int
    patches: list[Patch]


def nearest_patches(
    token_sets: Sequence[Array], grids: Sequence[Grid], image: int, token: int, count: int = 10
) -> list[Patch]:
    """The most similar tokens (cosine) in all other images, no two of them side by side.

    Args:
        token_sets: (N, D) of each image.
        grids: rows and columns of each image.
        image, token: the token that is looked for.
        count: of patches at most.
    """
    sets = [as_tokens(t, grid) for t, grid in zip(token_sets, grids, strict=True)]
    query = F.normalize(sets[image][token], dim=0)
    found = []
    for i, tokens in enumerate(sets):
        if i != image:
            cosine = F.normalize(tokens, dim=1) @ query
            found += [Patch(i, j, score) for j, score in enumerate(cosine.tolist())]
    found.sort(key=lambda patch: -patch.score)
    return spread(found, grids, count)


def spread(
    patches: Iterable[Patch], grids: Sequence[Grid], count: int, per_image: int | None = None
) -> list[Patch]:
    """The first `count` patches of which none lies within 2 cells of an earlier one.

    Args:
        patches: best first.
        grids: rows and columns of each image.
        count: how many at most.
        per_image: how many of one image at most; None for no bound.
    """
    taken: list[Patch] = []
    for patch in patches:
        if len(taken) == count:
            break
        columns = grids[patch.image][1]
        row, column = divmod(patch.token, columns)
        others = [divmod(other.token, columns) for other in taken if other.image == patch.image]
        near = any(max(abs(row - r), abs(column - c)) <= _APART for r, c in others)
        if not near and (per_image is None or len(others) < per_image):
            taken.append(patch)
    return taken


def most_used_groups(
    assigned: Sequence[Array],
    scores: Sequence[Array],
    grids: Sequence[Grid],
    num_groups: int = 12,
    num_patches: int = 8,
    per_image: int = 3,
) -> list[PatchGroup]:
    """The centroids with the most tokens, each with its best patches.

    Args:
        assigned: (N,) number of each token's centroid, for every image.
        scores: (N,) how well each token fits its centroid.
        grids: rows and columns of each image.
        num_groups: how many centroids at most.
        num_patches: of a centroid at most.
        per_image: patches of one image at most, so that a group shows whether it is found in many.
    """
    sizes = [rows * columns for rows, columns in grids]
    number = torch.cat([torch.as_tensor(a).cpu().long().reshape(-1) for a in assigned])
    score = torch.cat([torch.as_tensor(s).cpu().float().reshape(-1) for s in scores])
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    token = torch.cat([torch.arange(size) for size in sizes])
    counts = number.bincount()
    groups = []
    for k in counts.argsort(descending=True, stable=True)[:num_groups].tolist():
        members = (number == k).nonzero()[:, 0]
        if not len(members):
            break
        members = members[score[members].argsort(descending=True, stable=True)]
        columns = (image[members].tolist(), token[members].tolist(), score[members].tolist())
        best = spread(map(Patch, *columns), grids, num_patches, per_image)
        groups.append(PatchGroup(k, len(members), len(set(columns[0])), best))
    return groups


def kmeans_groups(
    token_sets: Sequence[Array], num_groups: int = 24, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """k-means over the L2-normalised tokens of all images.

    Centres are found on at most 4,096 of the tokens; then every token goes to the nearest.

    Args:
        token_sets: (N, D) of each image.
        num_groups: k; no more than there are tokens.
        seed: of the start, and of the choice of tokens.

    Returns:
        For every image the number of each token's group (N,), and its cosine to the group's centre.
    """
    sizes = [len(tokens) for tokens in token_sets]
    tokens = torch.cat([torch.as_tensor(tokens).detach().cpu().float() for tokens in token_sets])
    unit = F.normalize(tokens, dim=1)
    order = np.random.default_rng(seed).permutation(len(unit))
    sample = unit[torch.from_numpy(order[:_KMEANS_TOKENS])]
    labels = kmeans(sample, num_groups, seed, num_restarts=1)
    sums = torch.zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, sample)
    centres = F.normalize(sums[labels.unique()], dim=1)
    cosine, labels = (unit @ centres.T).max(dim=1)
    return list(labels.split(sizes)), list(cosine.split(sizes))


def crop_patch(image: np.ndarray, grid: Grid, token: int, side: int = 96) -> np.ndarray:
    """A token's patch, outlined, with two patches of its surroundings on each side.

    Args:
        image: (H, W, 3) uint8.
        grid: rows, columns.
        token: row-major index.
        side: of the result in pixels.

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
