"""Description of one encoder: what its pictures need, computed once for a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.explained_variance import colour_r2, position_r2
from flsl_d2.visualization.groups import PatchGroup, kmeans_groups, most_used_groups
from flsl_d2.visualization.maps import Array, Grid, as_tokens, attended_share, cluster_labels

__all__ = ["CLUSTER_SCALES", "DescribedEncoder", "describe_encoder"]

# Times 1 / sqrt(D), as in the schedules of pre-training; 0.1 is the method's own within a view.
CLUSTER_SCALES = (0.1, 0.3, 1.0, 2.0)
_KMEANS_GROUPS = 24


@dataclass(frozen=True)
class DescribedEncoder:
    """Tokens of some images by one encoder, and what they group.

    Attributes:
        name: name of the encoder on pages.
        tokens: (N, D) float32 of each image.
        grids: rows and columns of each image.
        labels: for every scale (times sqrt(D)) the clusters of each image, (rows, columns).
        attended: for every scale the share of the image that a token attends to, mean over images.
        groups: the most used centroids, or the largest groups of k-means.
        groups_note: sentence that says which of both they are.
        position_r2: see :func:`flsl_d2.evaluation.explained_variance.position_r2`.
        colour_r2: see :func:`flsl_d2.evaluation.explained_variance.colour_r2`.
    """

    name: str
    tokens: list[Tensor]
    grids: list[Grid]
    labels: dict[float, list[np.ndarray]]
    attended: dict[float, float]
    groups: list[PatchGroup]
    groups_note: str
    position_r2: float | None
    colour_r2: float | None

    @property
    def width(self) -> int:
        """Width D of the tokens."""
        return self.tokens[0].shape[1]


def describe_encoder(
    name: str,
    token_sets: Sequence[Array],
    grids: Sequence[Grid],
    images: Sequence[np.ndarray],
    scales: Sequence[float] = CLUSTER_SCALES,
    assigned: tuple[Sequence[Array], Sequence[Array]] | None = None,
    num_centroids: int = 0,
) -> DescribedEncoder:
    """Cluster every image at every scale, and group the tokens of all images.

    Args:
        name: name of the encoder.
        token_sets: (N, D) of each image, not normalised.
        grids: rows and columns of each image.
        images: (H, W, 3) uint8 RGB each.
        scales: scales of attention and clusters, times sqrt(D).
        assigned: for every image the index of each token's centroid (N,) and how well the token
            fits it (N,), from a projection head; None groups the tokens by k-means.
        num_centroids: number of centroids of that head.

    Raises:
        InputError: a token is not finite, or too large for float16, in which pages hold tokens.
    """
    tokens = [as_tokens(t, grid) for t, grid in zip(token_sets, grids, strict=True)]
    largest = max(float(t.abs().max().nan_to_num(torch.inf)) for t in tokens)
    if largest > torch.finfo(torch.float16).max:
        raise InputError(
            f"the tokens of {name!r} reach {largest:g}, and at most 65504 can be shown; check the "
            "weights."
        )
    root = tokens[0].shape[1] ** 0.5
    pairs = list(zip(tokens, grids, strict=True))
    labels = {s: [cluster_labels(t, grid, s / root) for t, grid in pairs] for s in scales}
    attended = {
        s: float(np.mean([attended_share(t, grid, s / root) for t, grid in pairs])) for s in scales
    }
    if assigned is None:
        assigned = kmeans_groups(tokens, _KMEANS_GROUPS)
        note = f"k-means over all tokens, k = {_KMEANS_GROUPS}: this file has no projection head"
    else:
        used = len(torch.cat([torch.as_tensor(a).reshape(-1) for a in assigned[0]]).unique())
        note = f"centroids of the projection head; {used} of {num_centroids} are used by a token"
    groups = most_used_groups(*assigned, grids)
    return DescribedEncoder(
        name,
        tokens,
        list(grids),
        labels,
        attended,
        groups,
        note,
        position_r2(tokens, grids),
        colour_r2(tokens, grids, images),
    )
