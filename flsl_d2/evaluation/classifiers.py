"""Nearest neighbours and logistic regression of frozen tokens.

Shape suffixes: Q queries, M entries of the bank, D width, K neighbours, C classes.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_DECAY = 1e-3
_MAX_PAIRS = 2**25  # similarities held at once: 128 MiB of float32
_LARGE_BANK = 2**17


def nearest(
    queries: Tensor, bank: Tensor, num_neighbours: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Find the most similar entries of a bank (M, D) for queries (Q, D), all of unit length.

    Returns:
        Indices (Q, K) into the bank by falling similarity, and weights exp(cosine / T), (Q, K).
    """
    if bank.device.type == "cpu" and len(bank) >= _LARGE_BANK and find_spec("faiss"):
        import faiss  # about twice as fast as PyTorch there

        found = faiss.knn(queries.numpy(), bank.numpy(), num_neighbours, faiss.METRIC_INNER_PRODUCT)
        cosine, indices = map(torch.from_numpy, found)
        return indices, (cosine / temperature).exp()
    step = max(_MAX_PAIRS // len(bank), 1)
    parts = [(part @ bank.T).topk(num_neighbours, dim=1) for part in queries.split(step)]
    cosine = torch.cat([part.values for part in parts])
    return torch.cat([part.indices for part in parts]), (cosine / temperature).exp()


def retrieve(
    tokens: Tensor, memory: tuple[Tensor, Tensor], num_neighbours: int, temperature: float
) -> Tensor:
    """Average the class shares of the memory's tokens nearest to each of (Q, D): (Q, C).

    The memory is (M, D) of unit length and shares (M, C). The weights exp(cosine / T), scaled to
    sum to 1, are those of cross-attention.
    """
    bank, shares = memory
    k = min(num_neighbours, len(bank))
    indices, weights = nearest(F.normalize(tokens, dim=1), bank, k, temperature)
    return torch.einsum("nk,nkc->nc", weights / weights.sum(dim=1, keepdim=True), shares[indices])


def fit_linear(tokens: Tensor, shares: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Fit multinomial logistic regression with soft targets, by L-BFGS on all data at once.

    Minimises the mean cross-entropy plus ``WEIGHT_DECAY / 2`` times the squared weights of the
    standardised channels, from weights of 0, so that nothing is drawn at random. Double precision
    keeps rounding, which varies with the number of threads, out of the solver's result.

    Args:
        tokens: (M, D).
        shares: (M, C), rows sum to 1.
        num_steps: bound of the solver's iterations; it may converge earlier.

    Returns:
        Weight (D, C) and bias (C,), float64, to be applied to tokens that are not standardised.
    """
    tokens, shares = tokens.double(), shares.double()
    mean, std = tokens.mean(dim=0), tokens.std(dim=0, unbiased=False)
    gain = torch.where(std > 1e-6 * std.amax().clamp(min=1e-12), 1 / std.clamp(min=1e-12), 0.0)
    standardised = (tokens - mean) * gain
    weight = tokens.new_zeros(tokens.shape[1], shares.shape[1], requires_grad=True)
    bias = tokens.new_zeros(shares.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=num_steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(standardised @ weight + bias, shares)
        loss = loss + WEIGHT_DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    fitted = weight.detach() * gain[:, None]
    return fitted, bias.detach() - mean @ fitted
