"""J, F and their statistics: known answers, and slow implementations of the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from flsl_d2.evaluation.davis.run import boundary_accuracy, region_similarity, statistics


def square(top: int, left: int, side: int = 20) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    rows, columns = mask.shape
    found = []
    for y in range(rows):
        for x in range(columns):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [(min(v, rows - 1), min(u, columns - 1)) for v, u in others]
            if any(mask[v, u] != mask[y, x] for v, u in inside):
                found.append((y, x))
    return np.array(found)


def slow_f(mask: np.ndarray, truth: np.ndarray) -> float:
    """By the distance of every boundary pixel to every other; no dilation."""
    tolerance = math.ceil(0.008 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    found, true = slow_boundary(mask), slow_boundary(truth)
    if not len(found) or not len(true):
        return float(len(found) == len(true))

    def share(of: np.ndarray, near: np.ndarray) -> float:
        hits = [((near - p) ** 2).sum(1).min() <= tolerance**2 for p in of]
        return sum(hits) / len(hits)

    precision, recall = share(found, true), share(true, found)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def random_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles, noise, near copies, empty and full masks, on grids of many shapes."""
    shape = tuple(rng.integers(3, 90, 2).tolist())
    masks = np.zeros((2, *shape), bool)
    for mask in masks:
        for _ in range(int(rng.integers(0, 4))):
            (y0, y1), (x0, x1) = (np.sort(rng.integers(0, side + 1, 2)) for side in shape)
            mask[y0:y1, x0:x1] ^= True
    moved = np.roll(masks[1], rng.integers(-4, 5, 2), (0, 1))
    noisy = masks[1] ^ (rng.random(shape) < 0.02)
    noise = rng.random(shape) < rng.random()
    return (masks[0], moved, noisy, noise)[rng.integers(4)], masks[1]


def test_random_masks_against_the_slow_definitions() -> None:
    scores = []
    for seed in range(60):
        mask, truth = random_pair(np.random.default_rng(seed))
        if (mask | truth).any():
            known = jaccard_score(truth.ravel(), mask.ravel())
            assert region_similarity(mask, truth) == pytest.approx(known, abs=1e-12)
        scores.append(boundary_accuracy(mask, truth))
        # The same counts, divided in another order.
        assert scores[-1] == pytest.approx(slow_f(mask, truth), abs=1e-12)
    assert sum(0.05 < score < 0.95 for score in scores) >= 18  # they are not all easy


def test_identical_disjoint_and_empty_masks() -> None:
    one, far, empty, full = square(10, 10), square(60, 60), square(0, 0, 0), square(0, 0, 100)
    for same in (one, empty, full):
        assert region_similarity(same, same) == boundary_accuracy(same, same) == 1.0
    for a, b in ((one, far), (one, empty), (empty, one)):
        assert region_similarity(a, b) == boundary_accuracy(a, b) == 0.0
    # A mask that fills the image has no boundary, so it agrees with an empty one in F alone.
    assert region_similarity(full, empty) == 0.0
    assert boundary_accuracy(full, empty) == 1.0


def test_the_tolerance_on_480p_is_8_pixels() -> None:
    top = np.zeros((480, 854), bool)
    top[:200] = True
    for shift, expected in ((8, 1.0), (9, 0.0)):
        moved = np.zeros_like(top)
        moved[: 200 + shift] = True
        assert boundary_accuracy(moved, top) == expected


def test_mean_recall_and_decay() -> None:
    # A value of one half is not recalled.
    assert statistics(np.array([0.5, 0.51, 0.0, 1.0]))[:2].tolist() == [0.5025, 0.5]
    for values, decay in (([0.7] * 10, 0), (np.linspace(1, 0, 101), 0.75)):
        assert statistics(np.array(values))[2] == pytest.approx(decay)


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        # Ends at 1 + (count - 1) * quarter, halves upwards; the ends belong to both quarters.
        *((1, (1, 1), (1, 1)), (2, (1, 1), (2, 2)), (3, (1, 2), (3, 3)), (5, (1, 2), (4, 5))),
        *((7, (1, 3), (6, 7)), (8, (1, 3), (6, 8)), (67, (1, 18), (51, 67))),
        (400, (1, 101), (300, 400)),
    ],
)
def test_which_frames_the_quarters_hold(count: int, first: tuple, last: tuple) -> None:
    values = np.random.default_rng(count).random(count)
    expected = values[first[0] - 1 : first[1]].mean() - values[last[0] - 1 : last[1]].mean()
    assert statistics(values)[2] == pytest.approx(expected)
