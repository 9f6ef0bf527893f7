"""Classifiers of frozen features: nearest neighbours and logistic regression.

Shape suffixes: Q queries, M entries of the bank, D width, K neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError

WEIGHT_DECAY = 1e-3
_MIN_CLASSES_FOR_TOP5 = 5
_MAX_PAIRS = 2**25  # similarities held at once: 128 MiB of float32


def nearest(
    queries: Tensor, bank: Tensor, num_neighbours: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Find the most similar entries of a bank and the weights of their votes.

    Args:
        queries: (Q, D), L2-normalised.
        bank: (M, D), L2-normalised.
        num_neighbours: K; at most M.

    Returns:
        Indices (Q, K) into the bank by falling similarity, and weights exp(cosine / T), (Q, K).
    """
    step = max(_MAX_PAIRS // len(bank), 1)
    parts = [(part @ bank.T).topk(num_neighbours, dim=1) for part in queries.split(step)]
    cosine = torch.cat([part.values for part in parts])
    return torch.cat([part.indices for part in parts]), (cosine / temperature).exp()


def usable_neighbours(values: Sequence[int], bank_size: int) -> list[int]:
    """Sort the values of k and drop those that are larger than the bank.

    Raises:
        InputError: no value is left.
    """
    usable = sorted(k for k in values if k <= bank_size)
    if not usable:
        raise InputError(
            f"the bank has {bank_size} tokens, too few for k = {min(values)}; use more training "
            "images."
        )
    return usable


def class_votes(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Add the weights of all neighbours by class.

    Args:
        labels: (Q, K) class of each neighbour.
        weights: (Q, K) weight of its vote.

    Returns:
        (C,) votes of all queries together.
    """
    votes = weights.new_zeros(num_classes)
    return votes.index_add_(0, labels.flatten(), weights.flatten())


def top_hits(scores: Tensor, truth: int) -> dict[str, bool]:
    """Compare the true class with the best-scored classes.

    Args:
        scores: (C,); the lowest of several classes with equal scores comes first.

    Returns:
        ``top1``, and with five classes or more ``top5``: whether the truth is among the best.
    """
    ranking = scores.argsort(descending=True, stable=True).tolist()
    hits = {"top1": truth == ranking[0]}
    if len(ranking) >= _MIN_CLASSES_FOR_TOP5:
        hits["top5"] = truth in ranking[:5]
    return hits


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
