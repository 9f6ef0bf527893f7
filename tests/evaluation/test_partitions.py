"""Adjusted Rand index, boundary F-score and label enlargement against slow and known answers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.evaluation.partitions import (
    adjusted_rand_index,
    boundaries,
    boundary_f_score,
    enlarge_labels,
)

LABELS = st.integers(0, 4)


def slow_rand_index(first: list[int], second: list[int]) -> float:
    """From every pair by itself (Hubert and Arabie's four kinds of pairs)."""
    both = neither = only_first = only_second = 0
    for i, j in combinations(range(len(first)), 2):
        same = first[i] == first[j], second[i] == second[j]
        both += same == (True, True)
        neither += same == (False, False)
        only_first += same == (True, False)
        only_second += same == (False, True)
    if not only_first and not only_second:
        return 1.0
    product = (both + only_first) * (only_first + neither)
    product += (both + only_second) * (only_second + neither)
    return 2 * (both * neither - only_first * only_second) / product


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(LABELS, LABELS), min_size=2, max_size=25))
def test_rand_index_equals_counting_pairs(pairs: list[tuple[int, int]]) -> None:
    first, second = (list(part) for part in zip(*pairs, strict=True))
    found = adjusted_rand_index(np.array(first), np.array(second))
    # The same integers, divided in another order.
    assert found == pytest.approx(slow_rand_index(first, second), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(LABELS, LABELS), min_size=2, max_size=40),
    st.permutations([7, 3, 800, 0, 55]),
)
def test_rand_index_ignores_names_and_order(pairs, names) -> None:
    first, second = (np.array(part) for part in zip(*pairs, strict=True))
    score = adjusted_rand_index(first, second)
    # The same integers, divided in another order.
    assert adjusted_rand_index(second, first) == pytest.approx(score, abs=1e-12)
    assert adjusted_rand_index(np.array(names)[first], second) == pytest.approx(score, abs=1e-12)
    assert adjusted_rand_index(first, first) == 1


def test_rand_index_known_answers() -> None:
    halves = np.repeat([0, 1], 50)
    assert adjusted_rand_index(halves, np.zeros(100)) == 0
    assert adjusted_rand_index(halves, np.arange(100)) == 0
    assert adjusted_rand_index(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1])) == pytest.approx(
        4 / 7
    )
    generator = np.random.default_rng(0)
    large = generator.integers(0, 3, (2, 2000, 2000))  # pairs of pairs beyond 64-bit integers
    assert abs(adjusted_rand_index(*large)) < 1e-4


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
