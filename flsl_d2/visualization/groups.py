"""Groups of the tokens of several images: centroids of a projection head, or k-means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.evaluation.partitions import kmeans
from flsl_d2.mean_shift import mean_shift
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.visualization.maps import Array, Grid
from flsl_d2.visualization.patches import Patch, spread
from flsl_d2.weights import read_weights
from flsl_d2.weights.reading import split_weights_path

__all__ = ["PatchGroup", "assign_centroids", "kmeans_groups", "most_used_groups", "read_head"]

_KMEANS_TOKENS = 4096


@dataclass(frozen=True)
class PatchGroup:
    """Tokens of several images that belong to one centroid.

    Attributes:
        number: index of the centroid.
        count: number of its tokens.
        num_images: number of images with such a token.
        patches: its best tokens, best first.
    """

    number: int
    count: int
    num_images: int
    patches: list[Patch]


def read_head(path: str) -> FLSLHead | None:
    """Read the projection head of a pre-training checkpoint of this project or the published code.

    Args:
        path: see :func:`flsl_d2.weights.build_encoder`; the teacher's head is read, or the
            student's where the path asks for the student.

    Returns:
        None for a file without such a head, for example ``teacher_backbone.pth``.

    Raises:
        InputError: the file cannot be read.
    """
    path, which = split_weights_path(path)
    which = which or "teacher"
    content = read_weights(path)
    if isinstance(content.get("model"), dict):
        tensors, prefix = content["model"], f"{which}.head."
    elif isinstance(content.get(which), dict) and "flsl_loss" in content:
        tensors, prefix = content[which], "head."
    else:  # For example a DINO checkpoint, whose head is made for the class token.
        return None
    bare = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    state = {n.removeprefix(prefix): value for n, value in bare.items() if n.startswith(prefix)}
    return _build_head(state)


def _build_head(state: dict[str, Tensor]) -> FLSLHead | None:
    """Build the head with these weights; None where they belong to another kind of head."""
    first, centroids = state.get("mlp.0.weight"), state.get("last_layer.weight_v")
    if first is None or centroids is None:
        return None
    head = FLSLHead(first.shape[1], len(centroids), len(first), centroids.shape[1])
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        return None
    head.load_state_dict(state)
    return head.eval()


@torch.no_grad()
def assign_centroids(
    head: FLSLHead, token_sets: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Find the nearest centroid of each token's mode after one mean-shift step within its image.

    Args:
        head: on the device of the tokens.
        token_sets: (N, D) of each image, with the final LayerNorm applied.
        scale: scale of the attention.

    Returns:
        For every image the indices of the centroids (N,) and the cosine similarities to them (N,).
    """
    numbers, cosines = [], []
    for tokens in token_sets:
        modes = mean_shift(tokens[None], tokens[None], scale)[0]
        best = head(modes).max(dim=-1)
        numbers.append(best.indices)
        cosines.append(best.values)
    return numbers, cosines


def kmeans_groups(
    token_sets: Sequence[Array], num_groups: int = 24, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Group the L2-normalised tokens of all images by k-means.

    Centres are found on at most 4,096 of the tokens; then every token goes to the nearest.

    Args:
        token_sets: (N, D) of each image.
        num_groups: k; no more than there are tokens.
        seed: seed for the start and for the choice of tokens.

    Returns:
        For every image the indices of the groups (N,) and the cosine similarities to their
        centres (N,).
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


def most_used_groups(
    assigned: Sequence[Array],
    scores: Sequence[Array],
    grids: Sequence[Grid],
    num_groups: int = 12,
    num_patches: int = 8,
    per_image: int = 3,
) -> list[PatchGroup]:
    """Choose the centroids with the most tokens, each with its best patches.

    Args:
        assigned: (N,) index of each token's centroid, for every image.
        scores: (N,) how well each token fits its centroid, for every image.
        grids: rows and columns of each image.
        num_groups: bound of the centroids.
        num_patches: bound of the patches of a centroid.
        per_image: bound of those from one image, so that a group shows whether it is found in many.
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
