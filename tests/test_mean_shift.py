"""Mean-shift: its equation, its fixed points, and clusters with known answers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.errors import InputError
from flsl_d2.mean_shift import attention, cluster, mean_shift, mix_attention, sharpened_prior


def test_one_step_is_the_weighted_mean():
    queries, tokens = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 7, 5).double()
    modes = mean_shift(queries, tokens, scale=0.7)
    for b in range(2):
        for i in range(3):
            weights = torch.stack([(0.7 * queries[b, i] @ k).exp() for k in tokens[b]])
            expected = sum(w * k for w, k in zip(weights, tokens[b], strict=True)) / weights.sum()
            torch.testing.assert_close(modes[b, i], expected)
    assert torch.allclose(attention(queries, tokens, 0.7) @ tokens, modes)


def test_iterations_are_repeated_steps():
    queries, tokens = torch.randn(1, 3, 5), torch.randn(1, 7, 5)
    twice = mean_shift(mean_shift(queries, tokens, 2.0), tokens, 2.0)
    torch.testing.assert_close(mean_shift(queries, tokens, 2.0, num_iterations=2), twice)
    with pytest.raises(InputError, match="num_iterations is 0"):
        mean_shift(queries, tokens, 1.0, num_iterations=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.floats(0.01, 3.0))
def test_modes_stay_in_the_convex_hull(seed, scale):
    tokens = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(seed))
    modes = mean_shift(tokens, tokens, scale, num_iterations=3)
    assert (modes <= tokens.amax(1, keepdim=True) + 1e-5).all()
    assert (modes >= tokens.amin(1, keepdim=True) - 1e-5).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(0, 9999))
def test_well_separated_clusters_are_found(count, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:count] * 4
    truth = torch.randint(count, (60,), generator=generator)
    tokens = centres[truth] + 0.1 * torch.randn(60, 16, generator=generator)
    labels, modes = cluster(tokens, scale=1.0)
    present = truth.unique()
    assert len(modes) == len(present)
    for label in present:
        assert len(labels[truth == label].unique()) == 1
    sizes = labels.bincount()
    assert (sizes[:-1] >= sizes[1:]).all()


def test_chains_of_linked_modes_are_one_cluster():
    """Neighbours along an arc are similar, its ends are not: still one component."""
    angle = torch.linspace(0, 2.5, 50)
    tokens = torch.stack([angle.cos(), angle.sin()], dim=1) * 30
    labels, _ = cluster(tokens, scale=5.0, num_iterations=1, merge_threshold=0.99)
    assert labels.max() == 0


def test_prior_is_nearly_binary_and_mixture_interpolates():
    own = torch.rand(1, 2, 6).softmax(-1)
    prior = sharpened_prior(own, 1e6)
    assert torch.allclose(prior.sum(-1), torch.ones(1, 2))
    above = own > own.mean(-1, keepdim=True)
    assert (prior[~above] < 1e-6).all()
    torch.testing.assert_close(mix_attention(own, prior, 1.0), own)
    torch.testing.assert_close(mix_attention(own, prior, 0.0), prior)


def test_cluster_wants_one_image():
    with pytest.raises(InputError, match=r"\(2, 3, 4\)"):
        cluster(torch.zeros(2, 3, 4), 1.0)
