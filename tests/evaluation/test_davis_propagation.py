"""Propagation of labels against loops over tokens, and under changes that must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.propagation import Propagation, propagate, propagate_through


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def soft_labels(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).softmax(-1)


def slow_propagate(
    queries: np.ndarray, sources: np.ndarray, labels: np.ndarray, grid: tuple, setup: Propagation
) -> np.ndarray:
    """Token by token, neighbour by neighbour, in float64; assumes that nothing ties."""
    rows, columns = grid
    result = []
    for y in range(rows):
        for x in range(columns):
            near = []
            for frame in range(len(sources)):
                for v in range(rows):
                    for u in range(columns):
                        if setup.radius and max(abs(v - y), abs(u - x)) > setup.radius:
                            continue
                        place = v * columns + u
                        cosine = float(queries[y * columns + x] @ sources[frame, place])
                        near.append((cosine, frame, place))
            near.sort(reverse=True)
            near = near[: setup.top_k]
            weights = [math.exp(cosine / setup.temperature) for cosine, _, _ in near]
            pairs = zip(weights, near, strict=True)
            result.append(sum(w * labels[f, p] for w, (_, f, p) in pairs) / sum(weights))
    return np.array(result)


@pytest.mark.parametrize("radius", [0, 1, 2, 12])
@pytest.mark.parametrize("top_k", [1, 5, 1000])
@pytest.mark.parametrize("grid", [(5, 7), (6, 3)])
def test_against_loops(radius: int, top_k: int, grid: tuple[int, int]) -> None:
    setup = Propagation(radius=radius, top_k=top_k)
    count = grid[0] * grid[1]
    queries, sources = tokens(count, 8), tokens(3, count, 8, seed=1)
    labels = soft_labels(3, count, 4)
    found = propagate(queries, sources, labels, grid, setup)
    arrays = (each.double().numpy() for each in (queries, sources, labels))
    # The slow version is in float64; weights of float32 have seven digits.
    np.testing.assert_allclose(found, slow_propagate(*arrays, grid, setup), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(*(st.integers(*bounds) for bounds in ((1, 9), (1, 9), (1, 4), (0, 5), (1, 9), (1, 3000))))
def test_memory_changes_nothing(
    rows: int, columns: int, frames: int, radius: int, top_k: int, max_pairs: int
) -> None:
    setup = Propagation(radius=radius, top_k=top_k)
    queries, sources = tokens(rows * columns, 6), tokens(frames, rows * columns, 6, seed=2)
    labels = soft_labels(frames, rows * columns, 3)
    whole = propagate(queries, sources, labels, (rows, columns), setup)
    parts = propagate(queries, sources, labels, (rows, columns), setup, max_pairs)
    # Products of matrices of other sizes are summed in another order.
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.sum(1), torch.ones(rows * columns))


def test_all_that_tie_with_the_last_neighbour_count() -> None:
    same = tokens(1, 8).expand(9, -1)
    labels = F.one_hot(torch.arange(9)).float()[None]
    found = propagate(same, same[None], labels, (3, 3), Propagation(radius=0, top_k=2))
    torch.testing.assert_close(found, torch.full((9, 9), 1 / 9))


def test_a_sharp_temperature_does_not_overflow() -> None:
    sharp = Propagation(temperature=1e-4)
    found = propagate(tokens(4, 8), tokens(1, 4, 8), soft_labels(1, 4, 2), (2, 2), sharp)
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_frames_are_taken_one_at_a_time() -> None:
    taken = []

    def video():
        for index in range(5):
            taken.append(index)
            yield tokens(4, 8, seed=index)

    steps = propagate_through(video(), soft_labels(4, 2), (2, 2), Propagation())
    next(steps)
    assert taken == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("radius", -1),
        ("context", -2),
        ("top_k", 0),
        ("temperature", 0.0),
        ("temperature", math.nan),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        Propagation(**{name: value})
