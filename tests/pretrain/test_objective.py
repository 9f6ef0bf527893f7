"""The objective against its own nested-loop definition, and its properties."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods import flsl_objective as objective
from pretrain.methods.flsl_objective import (
    FLSLLoss,
    intra_view_loss,
    mean_over_ranks,
    query_indexes,
    sinkhorn_shift,
    volume_loss,
)
from pretrain.studies.benchmark.measuring import stored_for_backward


def by_loops(z, m, s_logits, t_logits, tau_s, tau_t):
    """Execute the pseudocode of ``FLSLLoss``."""
    num_queries, num_centroids = s_logits.shape
    intra = inter = volume = 0.0
    mean = [0.0] * num_centroids
    for i in range(num_queries):
        dot = sum(a * b for a, b in zip(z[i].tolist(), m[i].tolist(), strict=True))
        intra += (2 - 2 * dot / (z[i].norm() * m[i].norm()).item()) / num_queries
        p = [math.exp(x / tau_s) for x in s_logits[i].tolist()]
        p = [x / sum(p) for x in p]
        q = [math.exp(x / tau_t) for x in t_logits[i].tolist()]
        q = [x / sum(q) for x in q]
        for k in range(num_centroids):
            inter -= q[k] * math.log(p[k]) / num_queries
            mean[k] += p[k] / num_queries
    for k in range(num_centroids):
        volume += mean[k] * (math.log(mean[k]) + math.log(num_centroids))
    return intra, inter, volume


def test_equals_its_pseudocode():
    z, m = torch.randn(2, 7, 6, dtype=torch.float64)
    s_logits, t_logits = torch.rand(2, 7, 5, dtype=torch.float64) * 2 - 1
    loss = FLSLLoss(5, inter_weight=0.7, volume_weight=3.0, student_temp=0.2)
    losses, _ = loss(z, m, s_logits, t_logits, intra_weight=0.4, teacher_temp=0.05)
    intra, inter, volume = by_loops(z, m, s_logits, t_logits, 0.2, 0.05)
    # The nested loops are in another order, in float32.
    assert losses["loss_intra"].item() == pytest.approx(intra, rel=1e-5)
    assert losses["loss_inter"].item() == pytest.approx(inter, rel=1e-5)
    assert losses["loss_volume"].item() == pytest.approx(volume, rel=1e-5)
    total = 0.4 * intra + 0.7 * inter + 3.0 * volume
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 50), st.integers(0, 10_000))
def test_volume_is_zero_only_where_it_is_uniform(num_centroids, seed):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.full((num_centroids,), 1 / num_centroids)
    # Rounding of float32.
    assert volume_loss(uniform).item() == pytest.approx(0, abs=1e-6)
    other = torch.rand(num_centroids, generator=generator).softmax(0)
    assert volume_loss(other).item() >= -1e-6
    one = torch.zeros(num_centroids)
    one[0] = 1
    assert volume_loss(one).item() == pytest.approx(math.log(num_centroids))


def test_volume_survives_an_empty_centroid():
    mean = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    loss = volume_loss(mean)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(mean.grad).all()


def test_intra_view_loss_has_its_range():
    z = torch.randn(4, 8)
    # Rounding of float32 in cosines.
    assert intra_view_loss(z, 3 * z).item() == pytest.approx(0, abs=1e-6)
    assert intra_view_loss(z, -z).item() == pytest.approx(4, abs=1e-6)


def test_no_gradient_reaches_the_teacher():
    loss = FLSLLoss(5)
    s_logits, t_logits = torch.randn(2, 3, 5).unbind(0)
    t_logits.requires_grad_()
    z = torch.randn(3, 4, requires_grad=True)
    losses, _ = loss(z, z * 1.0, s_logits, t_logits, 0.03, 0.04)
    losses["loss"].backward()
    assert t_logits.grad is None


def test_sinkhorn_equals_scaling_columns_and_rows_in_turn(monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK", 3 * 5)  # a remainder of one query, too
    logits = torch.randn(7, 5)
    shares = torch.full((5,), 0.2)
    assignment = (logits.double() / 0.3).exp()
    assignment /= assignment.sum(dim=1, keepdim=True)
    for num_steps in range(1, 101):
        assignment *= shares / assignment.mean(dim=0)
        assignment /= assignment.sum(dim=1, keepdim=True)
        if num_steps in (1, 3, 100):
            shift = sinkhorn_shift(logits, 0.3, num_steps)
            targets = (logits / 0.3 + shift).softmax(dim=-1)
            # Single precision, over as many steps.
            torch.testing.assert_close(targets.double(), assignment, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets.mean(dim=0), shares, rtol=1e-3, atol=1e-4)
    _, monitored = FLSLLoss(5, sinkhorn_steps=100)(
        torch.randn(7, 4), torch.randn(7, 4), logits, logits, 0.03, 0.3
    )
    # Sinkhorn's iteration ends after 100 rounds.
    torch.testing.assert_close(monitored["mean_assignment"], shares, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("volume_weight", [0.0, 2.0])
def test_recomputed_in_parts_equals_kept_whole(monkeypatch, rows, volume_weight):
    torch.manual_seed(0)
    z, m, *logits = torch.randn(2, 7, 6).unbind() + torch.randn(2, 7, 50).unbind()
    results = []
    for size in (rows * 50, 10**6):
        monkeypatch.setattr(objective, "_CHUNK", size)
        loss = FLSLLoss(50, volume_weight=volume_weight)
        student = logits[0].clone().requires_grad_()
        losses, monitored = loss(z, m, student, logits[1], 0.03, 0.04)
        losses["loss"].backward()
        results.append([student.grad, *losses.values(), *monitored.values()])
    # Parts are summed in another order in float32.
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_recomputing_keeps_logits_once(monkeypatch):
    """Of student and teacher, in the precision in which they came."""
    z, m, logits = torch.randn(9, 6), torch.randn(9, 6), torch.randn(2, 9, 500).bfloat16()
    student = logits[0].requires_grad_()
    kept = {}
    for recompute in (True, False):
        monkeypatch.setattr(objective, "_CHUNK", 4 * 500 if recompute else 10**6)
        loss = FLSLLoss(500)
        step = functools.partial(loss, z, m, student, logits[1], 0.03, 0.04)
        kept[recompute] = stored_for_backward(step, nn.Identity())
    of_logits = 2 * 9 * 500 * 2
    assert of_logits <= kept[True] < 1.5 * of_logits
    assert kept[False] > 2.5 * of_logits


def test_the_mean_over_ranks_is_the_same_to_the_bit_on_each(monkeypatch):
    """What ranks carry from step to step would drift apart otherwise."""
    ranks = torch.randn(2, 1000).softmax(dim=-1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    means = []
    for own, other in ((ranks[0], ranks[1]), (ranks[1], ranks[0])):
        own = own.clone().requires_grad_()
        monkeypatch.setattr(dist, "all_reduce", lambda total, other=other: total.add_(other))
        means.append(mean_over_ranks(own))
        weights = torch.randn(1000)
        (gradient,) = torch.autograd.grad((means[-1] * weights).sum(), own)
        assert torch.equal(gradient, weights)
    assert torch.equal(*means)
    torch.testing.assert_close(means[0], ranks.mean(dim=0))


def test_gather_tokens_keeps_order():
    tokens = torch.arange(2 * 4 * 1.0).view(2, 4, 1)
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert gather_tokens(tokens, query_indexes(mask)).flatten(1).tolist() == [[0, 2], [6, 7]]
