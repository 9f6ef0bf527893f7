"""The centroids of a trained projection head, and which tokens are given to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flsl_d2.mean_shift import mean_shift
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.weights import read_weights
from flsl_d2.weights.reading import split_weights_path

__all__ = ["assign_centroids", "read_head"]


def read_head(path: str) -> FLSLHead | None:
    """The projection head in a pre-training checkpoint of this project or of the published code.

    Args:
        path: as of :func:`flsl_d2.weights.build_encoder`; the teacher's head, or the student's
            where the path asks for that.

    Returns:
        None for a file without such a head, as ``teacher_backbone.pth`` is one.

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
    else:  # the head of a DINO checkpoint, say, which is for the class token
        return None
    bare = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    return _head_of({n.removeprefix(prefix): v for n, v in bare.items() if n.startswith(prefix)})


def _head_of(state: dict[str, Tensor]) -> FLSLHead | None:
    """A head with these weights; None where they are those of another kind of head."""
    first, centroids = state.get("mlp.0.weight"), state.get("last_layer.weight_v")
    if first is None or centroids is None:
        return None
    head = FLSLHead(first.shape[1], len(centroids), len(first), centroids.shape[1])
    own = head.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if shapes != {name: tensor.shape for name, tensor in own.items()}:
        return None
    head.load_state_dict(state)
    return head.eval()


@torch.no_grad()
def assign_centroids(
    head: FLSLHead, token_sets: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The nearest centroid of each token's mode after one step of mean-shift within its image.

    Args:
        head: on the device of the tokens.
        token_sets: (N, D) of each image, with the final LayerNorm applied.
        scale: of the attention.

    Returns:
        For every image the centroids' numbers (N,), and the cosine to them (N,).
    """
    numbers, cosines = [], []
    for tokens in token_sets:
        modes = mean_shift(tokens[None], tokens[None], scale)[0]
        best = head(modes).max(dim=-1)
        numbers.append(best.indices)
        cosines.append(best.values)
    return numbers, cosines
