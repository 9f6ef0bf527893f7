"""The votes of nearest neighbours, weighted as in DINO's k-NN classifier (arXiv 2104.14294)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest"]

_ENTRIES_AT_ONCE = 2**25  # of the similarity matrix: 128 MiB


def nearest(
    queries: Tensor, bank: Tensor, num_neighbours: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The most similar entries of a bank and the weights of their votes.

    Args:
        queries: (Q, D), L2-normalised.
        bank: (M, D), L2-normalised.
        num_neighbours: k; at most M.
        temperature: T.

    Returns:
        Indices (Q, k) into the bank by falling similarity, and weights exp(cosine / T), (Q, k).
    """
    step = max(_ENTRIES_AT_ONCE // len(bank), 1)
    parts = [(part @ bank.T).topk(num_neighbours, dim=1) for part in queries.split(step)]
    cosine = torch.cat([part.values for part in parts])
    return torch.cat([part.indices for part in parts]), (cosine / temperature).exp()
