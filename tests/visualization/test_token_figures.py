"""Pages of pictures about tokens: they are written, and show what the headings say."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flsl_d2.visualization import DescribedEncoder, describe_encoder
from flsl_d2.visualization.token_figures import (
    chosen_token,
    comparison_figure,
    groups_figure,
    modes_figure,
    nearest_figure,
)

GRIDS = [(4, 6), (6, 4)]
POINTS = [(0, 0.5, 0.5), (1, 0.1, 0.9), (1, 0.9, 0.1)]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (r * 16, c * 16, 3)).astype(np.uint8) for r, c in GRIDS]


@pytest.fixture(scope="module")
def encoder(images: list[np.ndarray]) -> DescribedEncoder:
    torch.manual_seed(0)
    tokens = [torch.randn(r * c, 8) for r, c in GRIDS]
    return describe_encoder("x", tokens, GRIDS, images, (1.0,))


def test_points_are_shares_of_the_image(encoder: DescribedEncoder) -> None:
    assert [chosen_token(encoder, point) for point in POINTS] == [2 * 6 + 3, 5 * 4, 3]


def test_all_pages(encoder: DescribedEncoder, images: list[np.ndarray], tmp_path: Path) -> None:
    modes_figure(encoder, images, POINTS, tmp_path / "modes.png", 1.0, 2)
    nearest_figure(encoder, images, POINTS, tmp_path / "nearest.png", 3)
    groups_figure(encoder, images, tmp_path / "groups.png")
    comparison_figure([encoder, encoder], images, POINTS[:1], tmp_path / "both.png", 1.0, 2)
    for name in ("modes", "nearest", "groups", "both"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).std() > 20, name
    # The two encoders are one: the columns of each kind are alike, but for the place.
    page = cv2.imread(str(tmp_path / "both.png")).astype(int)
    for kind in range(4):
        left, right = (8 + 238 * (1 + 2 * kind + i) for i in (0, 1))
        one, other = page[90:-20, left + 2 : left + 228], page[90:-20, right + 2 : right + 228]
        assert one.std() > 20
        assert np.abs(one - other).max() == 0


def test_a_head_gives_the_groups(images: list[np.ndarray]) -> None:
    tokens = [torch.randn(r * c, 8) for r, c in GRIDS]
    assigned = [torch.tensor([5] * 20 + [1] * 4), torch.tensor([5] * 24)]
    scores = [torch.rand(24), torch.rand(24)]
    described = describe_encoder("x", tokens, GRIDS, images, (1.0,), (assigned, scores), 64)
    assert [(g.number, g.count) for g in described.groups] == [(5, 44), (1, 4)]
    assert "2 of 64" in described.groups_note
    without = describe_encoder("x", tokens, GRIDS, images, (1.0,))
    assert "k-means" in without.groups_note
