"""Attention as mean-shift clustering, the idea that FLSL stands on.

One step of mean-shift with the kernel ``exp(scale * q.k)`` moves a query to the kernel-weighted
mean of the tokens around it. That is a softmax attention whose keys are its values, so the weights
of a transformer's attention say to which cluster a token belongs (FLSL, arXiv 2306.06203, Sec. 3).

Shape suffixes: B images, Q queries, N tokens, D width, C clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError


def attention(queries: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Weights of one mean-shift step, ``softmax_j(scale * q_i . k_j)``.

    Args:
        queries: (B, Q, D).
        tokens: (B, N, D).
        scale: inverse temperature, multiplies the dot product. The method's values are
            ``0.1 / sqrt(D)`` within a view and ``0.2 / sqrt(D)`` towards the teacher's view.

    Returns:
        (B, Q, N), rows sum to 1.
    """
    return (scale * queries @ tokens.transpose(-2, -1)).softmax(dim=-1)


def sharpened_prior(attention_bqn: Tensor, sharpness: float = 1e4) -> Tensor:
    """Nearly binary attention of an earlier stage, ``sigmoid(sharpness * (A - mean_j A))``.

    A token either belongs to the query's cluster, with an equal share, or does not.

    Args:
        attention_bqn: (B, Q, N), rows sum to 1.
        sharpness: slope of the sigmoid.

    Returns:
        (B, Q, N), rows sum to 1.
    """
    above_mean = attention_bqn - attention_bqn.mean(dim=-1, keepdim=True)
    prior = torch.sigmoid(sharpness * above_mean)
    return prior / prior.sum(dim=-1, keepdim=True)


def mix_attention(own: Tensor, prior: Tensor, weight: float) -> Tensor:
    """``weight * own + (1 - weight) * prior``, rows renormalised to sum to 1.

    Args:
        own: (B, Q, N) attention of the current features.
        prior: (B, Q, N) attention of an earlier stage (:func:`sharpened_prior`).
        weight: share of ``own``, in [0, 1].
    """
    mixed = weight * own + (1.0 - weight) * prior
    return mixed / mixed.sum(dim=-1, keepdim=True)


def mean_shift(queries: Tensor, tokens: Tensor, scale: float, num_iterations: int = 1) -> Tensor:
    """Modes of the queries: ``m_i = sum_j softmax_j(scale * q_i . k_j) k_j``, repeated.

    Args:
        queries: (B, Q, D).
        tokens: (B, N, D), the fixed sample that the modes move over.
        scale: inverse temperature of the kernel, see :func:`attention`.
        num_iterations: 1 is the method's own step; more approach the modes of the density.

    Returns:
        (B, Q, D).

    Each step is PyTorch's fused attention with one head (keys serve as values), which never stores
    the (Q, N) weights.
    """
    if num_iterations < 1:
        raise InputError(f"num_iterations is {num_iterations}; mean-shift needs at least 1.")
    modes, tokens = queries[:, None], tokens[:, None]  # without an axis of heads it is not fused
    for _ in range(num_iterations):
        modes = F.scaled_dot_product_attention(modes, tokens, tokens, scale=scale)
    return modes[:, 0]


@torch.no_grad()
def cluster(
    tokens: Tensor,
    scale: float,
    num_iterations: int = 20,
    merge_threshold: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Clusters of one image: mean-shift from every token, then modes that met are merged.

    Args:
        tokens: (N, D) tokens of one image.
        scale: inverse temperature of the kernel; larger values give more, smaller clusters.
        num_iterations: mean-shift steps.
        merge_threshold: modes whose cosine similarity exceeds this belong together; chains of
            such pairs form one cluster.

    Returns:
        labels (N,) int64, numbered from 0 by falling size of the cluster, and modes (C, D).
    """
    if tokens.ndim != 2:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}; cluster() takes one (N, D).")
    modes = mean_shift(tokens[None], tokens[None], scale, num_iterations)[0]
    unit = F.normalize(modes, dim=-1)
    linked = unit @ unit.T > merge_threshold
    linked.fill_diagonal_(True)
    component = _connected_components(linked)
    _, component, sizes = component.unique(return_inverse=True, return_counts=True)
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(
        len(sizes), device=sizes.device
    )
    labels = rank[component]
    members = F.one_hot(labels, len(sizes)).to(modes.dtype)
    return labels, (members.T @ modes) / members.sum(dim=0)[:, None]


def _connected_components(linked: Tensor) -> Tensor:
    """Smallest index reachable from each node of the (N, N) boolean adjacency ``linked``."""
    count = len(linked)
    component = torch.arange(count, device=linked.device)
    while True:
        smallest = torch.where(linked, component[None, :], count).amin(dim=1)
        smallest = smallest[smallest]  # pointer jumping: chains shorten by half each round
        if torch.equal(smallest, component):
            return component
        component = smallest
