"""What pictures of one encoder need, computed once for a set of images; and similar patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation import TokenFeatures
from flsl_d2.evaluation.explained_variance import colour_r2, position_r2
from flsl_d2.evaluation.partitions import kmeans
from flsl_d2.mean_shift import mean_shift
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.visualization.maps import Grid, attended_share, cluster_labels
from flsl_d2.weights import read_weights
from flsl_d2.weights.reading import split_weights_path

# Times 1 / sqrt(D), as in the schedules of pre-training; 0.1 is the method's own within a view.
CLUSTER_SCALES = (0.1, 0.3, 1.0, 2.0)
_KMEANS_GROUPS, _KMEANS_TOKENS = 24, 4096
_MIN_DISTANCE = 3  # cells; nearer patches of one image show the same thing twice


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


@dataclass(frozen=True)
class PatchGroup:
    """Tokens of one centroid: its index, their number, that of their images, the best tokens."""

    number: int
    count: int
    num_images: int
    patches: list[Patch]


@dataclass(frozen=True)
class DescribedEncoder:
    """Tokens of some images by one encoder, and what they group.

    Attributes:
        features: tokens of each image, float32 on the CPU.
        labels: for every scale (times sqrt(D)) the clusters of each image, (rows, columns).
        attended: for every scale the share of the image that a token attends to, mean over images.
        groups: the most used centroids, or the largest groups of k-means; ``groups_note`` says
            which of both.
    """

    name: str
    features: list[TokenFeatures]
    labels: dict[float, list[np.ndarray]]
    attended: dict[float, float]
    groups: list[PatchGroup]
    groups_note: str
    position_r2: float | None
    colour_r2: float | None

    @property
    def width(self) -> int:
        """Width D of the tokens."""
        return self.features[0].tokens.shape[1]


def describe_encoder(
    name: str,
    features: Sequence[TokenFeatures],
    scales: Sequence[float] = CLUSTER_SCALES,
    head: FLSLHead | None = None,
    head_scale: float = 1.0,
) -> DescribedEncoder:
    """Cluster every image at every scale, and group the tokens of all images.

    Args:
        features: tokens of each image, not normalised.
        scales: scales of attention and clusters, times sqrt(D).
        head: projection head whose centroids group the tokens; None groups them by k-means.
        head_scale: scale of the mean-shift step before the head, times sqrt(D).

    Raises:
        InputError: a token is not finite, or too large for float16, in which pages hold tokens.
    """
    features = [each.on_cpu() for each in features]
    tokens, grids = [each.tokens for each in features], [each.grid for each in features]
    largest = max(float(t.abs().max().nan_to_num(torch.inf)) for t in tokens)
    if largest > torch.finfo(torch.float16).max:
        raise InputError(
            f"the tokens of {name!r} reach {largest:g}, and at most 65504 can be shown; check the "
            "weights."
        )
    root = tokens[0].shape[1] ** 0.5
    if head is None:
        assigned = kmeans_groups(tokens, _KMEANS_GROUPS)
        note = f"k-means over all tokens, k = {_KMEANS_GROUPS}: these weights have no head"
    else:
        assigned = assign_centroids(head, tokens, head_scale / root)
        used, total = len(torch.cat(assigned[0]).unique()), len(head.last_layer.weight_v)
        note = f"centroids of the projection head; {used} of {total} are used by a token"
    return DescribedEncoder(
        name,
        features,
        {s: [cluster_labels(each, s / root) for each in features] for s in scales},
        {s: float(np.mean([attended_share(t, s / root) for t in tokens])) for s in scales},
        most_used_groups(*assigned, grids),
        note,
        position_r2(features),
        colour_r2(features),
    )


def read_head(path: str) -> FLSLHead | None:
    """Read the projection head of a pre-training checkpoint of this project or the published code.

    The teacher's is read, or the student's where the path asks for it. None is returned for a file
    without such a head, for example ``teacher_backbone.pth``.

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
    first, centroids = state.get("mlp.0.weight"), state.get("last_layer.weight_v")
    if first is None or centroids is None:
        return None
    head = FLSLHead(first.shape[1], len(centroids), len(first), centroids.shape[1])
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        return None  # a head of another kind
    head.load_state_dict(state)
    return head.eval()


@torch.no_grad()
def assign_centroids(
    head: FLSLHead, token_sets: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Find the nearest centroid of each token's mode after one mean-shift step within its image.

    Tokens are (N, D), with the final LayerNorm applied. For every image the indices of the
    centroids (N,) and the cosine similarities to them (N,) are returned.
    """
    best = [head(mean_shift(t[None], t[None], scale)[0]).max(dim=-1) for t in token_sets]
    return [each.indices for each in best], [each.values for each in best]


def kmeans_groups(
    token_sets: Sequence[Tensor], num_groups: int = _KMEANS_GROUPS, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Group the L2-normalised tokens of all images by k-means; see :func:`assign_centroids`.

    Centres are found on at most 4,096 of the tokens; then every token goes to the nearest.
    """
    sizes = [len(tokens) for tokens in token_sets]
    unit = F.normalize(torch.cat(list(token_sets)), dim=1)
    order = np.random.default_rng(seed).permutation(len(unit))
    sample = unit[torch.from_numpy(order[:_KMEANS_TOKENS])]
    labels = kmeans(sample, num_groups, seed, num_restarts=1)
    sums = torch.zeros(int(labels.max()) + 1, unit.shape[1]).index_add_(0, labels, sample)
    centres = F.normalize(sums[labels.unique()], dim=1)
    cosine, labels = (unit @ centres.T).max(dim=1)
    return list(labels.split(sizes)), list(cosine.split(sizes))


def most_used_groups(
    assigned: Sequence[Tensor],
    scores: Sequence[Tensor],
    grids: Sequence[Grid],
    num_groups: int = 12,
    num_patches: int = 8,
    per_image: int = 3,
) -> list[PatchGroup]:
    """Choose the centroids with the most tokens, each with its best patches.

    At most ``per_image`` are of one image, so that a group shows whether it is found in many.
    """
    number, score = torch.cat(list(assigned)), torch.cat(list(scores))
    image = torch.cat([torch.full((r * c,), i) for i, (r, c) in enumerate(grids)])
    token = torch.cat([torch.arange(r * c) for r, c in grids])
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
