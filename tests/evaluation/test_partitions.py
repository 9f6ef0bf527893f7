"""Clusters, boundary F-score and label enlargement against slow and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.evaluation.partitions import (
    boundaries,
    boundary_f_score,
    enlarge_labels,
    kmeans,
)


def test_k_means() -> None:
    groups = torch.arange(5).repeat_interleave(20)[torch.randperm(100)]
    points = 10 * torch.eye(5, 8)[groups] + 0.1 * torch.randn(100, 8)
    for seed in range(3):
        labels = kmeans(points, 5, [seed, 1])
        assert torch.equal(labels, kmeans(points, 5, [seed, 1]))
        assert len(torch.stack([groups, labels]).unique(dim=1)[0]) == 5
    assert kmeans(torch.ones(4, 3), 2, 0).tolist() == [0, 0, 0, 0]
    assert len(kmeans(torch.eye(3), 9, 0).unique()) == 3


def test_boundary_is_between_labels_and_not_at_ignored_pixels() -> None:
    labels = np.array([[0, 0, 5], [0, 0, 5], [1, 1, -1]])
    expected = np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=bool)
    assert (boundaries(labels) == expected).all()


def vertical(column: int, size: tuple[int, int] = (30, 40)) -> np.ndarray:
    labels = np.zeros(size, dtype=int)
    labels[:, column:] = 1
    return labels


@pytest.mark.parametrize(("shift", "score"), [(0, 1), (1, 1), (2, 0), (-2, 0)])
def test_boundary_f_within_tolerance(shift: int, score: float) -> None:
    """The diagonal is 50 pixels: 0.0075 of it rounds up to 1."""
    assert boundary_f_score(vertical(20), vertical(20 + shift)) == score


def test_boundary_f_by_hand() -> None:
    """Two lines are found where one is true: precision 1/2, recall 1."""
    both = vertical(20)
    both[:, 30:] = 2
    assert boundary_f_score(vertical(20), both) == pytest.approx(2 / 3)
    assert boundary_f_score(both, vertical(20)) == pytest.approx(2 / 3)


def test_boundary_f_without_boundaries() -> None:
    flat = np.zeros((30, 40), dtype=int)
    assert boundary_f_score(flat, flat) == 1
    assert boundary_f_score(vertical(20), flat) == 0
    assert boundary_f_score(flat, vertical(20)) == 0


def test_boundary_f_leaves_out_ignored_pixels() -> None:
    both = vertical(20)
    both[:, 30:] = 2
    truth = vertical(20)
    truth[:, 26:] = -1
    assert boundary_f_score(truth, both) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(6, 40))
def test_enlarged_labels_are_the_largest_of_bilinear_shares(
    seed: int, rows: int, columns: int, height: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, (rows, columns))
    size = height, 23
    shares = F.one_hot(torch.from_numpy(labels), 5).permute(2, 0, 1)[None].double()
    full = F.interpolate(shares, size=size, mode="bilinear", align_corners=False)[0]
    found = enlarge_labels(labels, size)
    share_of_found = full.gather(0, torch.from_numpy(found)[None])[0]
    # Weights in float64.
    assert torch.allclose(share_of_found, full.amax(dim=0), atol=1e-9)
