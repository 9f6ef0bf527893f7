"""The FLSL objective (arXiv 2306.06203), in functions of tensors.

Shape suffixes: B images, N tokens, D width, Q queries (of all student views together), K centroids.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Number of probabilities, queries times centroids, that are computed at a time (16 MiB).
_CHUNK = 2**22


def query_indexes(mask: Tensor) -> Tensor:
    """Indexes of the queries among the tokens.

    Selecting by a mask would make the GPU wait, because the size of the result depends on values;
    so the indexes are computed on the CPU, where the mask comes from.

    The mask (B, N) is True at a query; every image has the same number Q of them. The indexes
    (B, Q) are ascending.
    """
    return mask.nonzero()[:, 1].view(len(mask), -1)


def intra_view_loss(queries: Tensor, modes: Tensor) -> Tensor:
    """Distance of tokens to their modes (Eq. 8): ``mean_i (2 - 2 cos(z_i, m_i))``.

    The gradient flows through both.

    Both are (Q, D); the modes are those of the queries in the same view.
    """
    return 2 - 2 * F.cosine_similarity(queries.float(), modes.float(), dim=-1, eps=1e-12).mean()


def inter_view_loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    """k-means across views (Eq. 11): cross-entropy ``mean_i -sum_k p+_ik log p_ik``.

    Args:
        log_probs: (Q, K) log-probabilities of the student's modes over the centroids.
        targets: (Q, K) probabilities of the teacher's modes, without gradient.
    """
    return -(targets * log_probs).sum(dim=-1).mean()


def volume_loss(mean_probs: Tensor) -> Tensor:
    """Divergence from uniform that keeps clusters filled: ``sum_k p_k (log p_k + log K)``.

    Args:
        mean_probs: (K,) mean assignment over all queries of all ranks.
    """
    # p log p is 0 at p = 0, but its logarithm is not finite there and would make it NaN.
    log_mean = mean_probs.clamp_min(torch.finfo(mean_probs.dtype).tiny).log()
    return (mean_probs * (log_mean + math.log(len(mean_probs)))).sum()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, differentiable, and equal to the bit on each.

    The gradient reaches the values of each rank undivided, because DistributedDataParallel averages
    the parameters' gradients over ranks and so supplies the ``1 / world_size`` of the mean.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size() + (values - values.detach())  # adds 0, and a gradient


@torch.no_grad()
def sinkhorn_shift(logits: Tensor, temperature: float, num_steps: int) -> Tensor:
    """Shift b of the teacher's logits under which the mean assignment approaches uniform.

    Sinkhorn-Knopp as in SwAV (arXiv 2006.09882) scales the columns of the assignment to their
    share and the rows to 1 in turn. The rows come last, so the result is a softmax of shifted
    logits, ``p+_ik = softmax_k(logits_ik / temperature + b_k)``, and a step of it is
    ``b_k -= log K + log mean_i p+_ik``, the mean over the queries of all ranks.

    Args:
        logits: (Q, K).
        temperature: tau_t.
        num_steps: number of steps; three are usual.

    Returns:
        b (K,).
    """
    count = logits.shape[1]
    shift = logits.new_zeros(count, dtype=torch.float32)
    rows = max(_CHUNK // logits.shape[1], 1)
    for _ in range(num_steps):
        parts = [
            (part.float() / temperature + shift).softmax(dim=-1).sum(dim=0)
            for part in logits.split(rows)
        ]
        mean = mean_over_ranks(torch.stack(parts).sum(dim=0) / len(logits))
        shift = shift - math.log(count) - mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    return shift


class FLSLLoss(nn.Module):
    """``v * intra-view + eta * inter-view + gamma * volume``.

    As nested loops, over the queries of all student views (m_i the mode of query z_i in its own
    view, m+_i in the teacher's view; g_s, g_t the heads)::

        for i in range(Q):
            intra += (2 - 2 * cos(z[i], m[i])) / Q
            for k in range(K):
                p[i, k] = exp(g_s(m[i])[k] / tau_s) / sum_l exp(g_s(m[i])[l] / tau_s)
                p_plus[i, k] = exp(g_t(m_plus[i])[k] / tau_t) / sum_l exp(g_t(m_plus[i])[l] / tau_t)
                inter -= p_plus[i, k] * log(p[i, k]) / Q
                mean[k] += p[i, k] / Q          # mean over ranks, too
        for k in range(K):
            volume += mean[k] * (log(mean[k]) + log(K))

    Logits of more than 16 MiB are worked off a part of the queries at a time, and their softmaxes
    are computed again in the backward pass, so that nothing else of their size is kept.

    Args:
        num_centroids: K.
        inter_weight: eta.
        volume_weight: gamma; 0 leaves the volume term out.
        student_temp: tau_s.
        sinkhorn_steps: number of steps of :func:`sinkhorn_shift` that even out the mean of the
            targets, usually with ``volume_weight`` 0; 0 leaves the targets as they are.
    """

    def __init__(
        self,
        num_centroids: int = 4096,
        inter_weight: float = 1.0,
        volume_weight: float = 5.0,
        student_temp: float = 0.1,
        sinkhorn_steps: int = 0,
    ) -> None:
        super().__init__()
        self.inter_weight, self.volume_weight = inter_weight, volume_weight
        self.student_temp, self.sinkhorn_steps = student_temp, sinkhorn_steps
        self.num_centroids = num_centroids

    def forward(
        self,
        queries: Tensor,
        modes: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        intra_weight: float,
        teacher_temp: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the three terms and their weighted sum.

        Args:
            queries: (Q, D) student tokens.
            modes: (Q, D) their modes within the view.
            student_logits: (Q, K) ``g_s(m)``.
            teacher_logits: (Q, K) ``g_t(m+)``, without gradient.
            intra_weight: v, scheduled.
            teacher_temp: tau_t, scheduled.

        Returns:
            ``{"loss_intra", "loss_inter", "loss_volume"}``, each *unweighted*, and the weighted
            sum as ``"loss"``; for monitoring ``"assigned"`` (K,), the number of queries that the
            teacher assigns to each centroid, and ``"mean_assignment"`` (K,), its mean
            probabilities.
        """
        teacher_logits = teacher_logits.detach()
        if self.sinkhorn_steps:
            shift = sinkhorn_shift(teacher_logits, teacher_temp, self.sinkhorn_steps)
            teacher_logits = teacher_logits.float() + teacher_temp * shift
        intra = intra_view_loss(queries, modes)
        inter, mean_probs, mean_targets = self._compare(
            student_logits, teacher_logits, teacher_temp
        )
        volume = intra.new_zeros(())
        if self.volume_weight:
            volume = volume_loss(mean_over_ranks(mean_probs))
        total = intra_weight * intra + self.inter_weight * inter + self.volume_weight * volume
        losses = {
            "loss": total,
            "loss_intra": intra,
            "loss_inter": inter,
            "loss_volume": volume,
        }
        monitored = {
            "assigned": _counts(teacher_logits.argmax(dim=-1), self.num_centroids),
            "mean_assignment": mean_targets,
        }
        return losses, monitored

    def _compare(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
    ) -> tuple[Tensor, ...]:
        """Compute the cross-entropy, and the mean probabilities (K,) of student and teacher."""

        def compare_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            targets = (teacher.float() / teacher_temp).softmax(dim=-1)
            log_probs = (student.float() / self.student_temp).log_softmax(dim=-1)
            inter = inter_view_loss(log_probs, targets)
            return inter, log_probs.exp().mean(dim=0), targets.mean(dim=0)

        count, width = student_logits.shape
        rows = max(_CHUNK // width, 1)
        if count <= rows:
            return compare_rows(student_logits, teacher_logits)
        parts = []
        for part in zip(student_logits.split(rows), teacher_logits.split(rows), strict=True):
            means = checkpoint(compare_rows, *part, use_reentrant=False, preserve_rng_state=False)
            parts.append([mean * (len(part[0]) / count) for mean in means])
        return tuple(torch.stack(means).sum(dim=0) for means in zip(*parts, strict=True))


def _counts(labels: Tensor, num_labels: int) -> Tensor:
    """Count each label, without ``bincount``, which makes a GPU wait for the largest label."""
    counts = labels.new_zeros(num_labels)
    return counts.index_add_(0, labels, torch.ones_like(labels))
