"""Classifiers of frozen features: nearest neighbours and logistic regression.

Shape suffixes: Q queries, M entries of the bank, D width, K neighbours, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.samples import Options

WEIGHT_DECAY = 1e-3
_MIN_CLASSES_FOR_TOP5 = 5
_MAX_PAIRS = 2**25  # similarities held at once: 128 MiB of float32
_LARGE_BANK = 2**17


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
    queries: Tensor, bank: Tensor, shares: Tensor, num_neighbours: int, temperature: float
) -> Tensor:
    """Average the class shares (M, C) of each query's neighbours by weight: (Q, C).

    The weights exp(cosine / T), scaled to sum to 1, are those of cross-attention.
    """
    k = min(num_neighbours, len(bank))
    indices, weights = nearest(queries, bank, k, temperature)
    return torch.einsum("nk,nkc->nc", weights / weights.sum(dim=1, keepdim=True), shares[indices])


class NeighbourVotes:
    """Votes of the k most similar entries of a bank for their classes, for several k.

    Args:
        bank: (M, D); it is L2-normalised here.
        labels: class of each entry.
        num_classes: C.
        options: values of k, of which those larger than the bank are left out, and T.

    Raises:
        InputError: the bank is too small for every k.
    """

    def __init__(self, bank: Tensor, labels: Tensor, num_classes: int, options: Options) -> None:
        self.bank, self.labels, self.num_classes = F.normalize(bank, dim=1), labels, num_classes
        self.num_images, self.hits = 0, Counter[str]()
        self.temperature = options.temperature
        self.ks = sorted(k for k in options.class_neighbours if k <= len(bank))
        if not self.ks:
            raise InputError(
                f"the bank has {len(bank)} tokens, too few for k = "
                f"{min(options.class_neighbours)}; use more training images."
            )

    def __call__(self, queries: Tensor) -> dict[str, Tensor]:
        """Add the votes for all queries (Q, D): (C,) by ``k10`` and so on."""
        queries = F.normalize(queries, dim=1)
        indices, weights = nearest(queries, self.bank, self.ks[-1], self.temperature)
        labels = self.labels[indices]
        return {
            f"k{k}": weights.new_zeros(self.num_classes).index_add_(
                0, labels[:, :k].flatten(), weights[:, :k].flatten()
            )
            for k in self.ks
        }

    def count(self, scores: Mapping[str, Tensor], truth: int) -> None:
        """Count whether each classifier's scores (C,) of an image have its class on top."""
        self.num_images += 1
        for name, score in scores.items():
            for top, hit in top_hits(score, truth).items():
                self.hits[f"{name}_{top}"] += hit

    def accuracies(self) -> dict[str, float]:
        """Return the share of the counted images, in percent: ``k10_top1`` and so on."""
        return {name: 100 * count / self.num_images for name, count in self.hits.items()}


def top_hits(scores: Tensor, truth: int) -> dict[str, bool]:
    """Say whether the truth is among the best of scores (C,): ``top1``, and ``top5`` if C >= 5.

    The lowest of several classes with equal scores comes first.
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
