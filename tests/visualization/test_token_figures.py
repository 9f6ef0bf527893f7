"""Pages of pictures about tokens: they are written, and show what the headings say."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flsl_d2.visualization import DescribedEncoder, describe_encoder
from flsl_d2.visualization.figures import enlarge
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
    plain, scaled = 258, 313  # pixels from one column to the next, without and with a colour scale
    left = 8 + plain
    for step in (plain, scaled, scaled, plain):
        one, other = (page[90:-40, x + 2 : x + 248] for x in (left, left + step))
        assert one.std() > 20
        assert np.abs(one - other).max() == 0
        left += 2 * step
    assert abs(left - page.shape[1]) <= 1  # the page ends where the columns do


def test_some_maps_alone(
    encoder: DescribedEncoder, images: list[np.ndarray], tmp_path: Path
) -> None:
    maps = ("pca", "clusters")
    comparison_figure([encoder], images, POINTS[:2], tmp_path / "a.png", 1.0, maps=maps)
    page = cv2.imread(str(tmp_path / "a.png"))
    assert abs(page.shape[1] - (8 + 3 * 258)) <= 1
    # No map depends on a point, so there is no cross: the first picture is the enlarged image.
    large = enlarge(images[0])[0]
    top = 25 + 22 + 2 * 17
    # Means of blocks, because matplotlib and OpenCV resample noise differently.
    shown, found = (
        cv2.resize(picture, (8, 6), interpolation=cv2.INTER_AREA).astype(int)
        for picture in (large[..., ::-1], page[top : top + 167, 8:258])
    )
    assert np.abs(found - shown).max() < 12


def test_a_head_gives_the_groups(images: list[np.ndarray]) -> None:
    tokens = [torch.randn(r * c, 8) for r, c in GRIDS]
    assigned = [torch.tensor([5] * 20 + [1] * 4), torch.tensor([5] * 24)]
    scores = [torch.rand(24), torch.rand(24)]
    described = describe_encoder("x", tokens, GRIDS, images, (1.0,), (assigned, scores), 64)
    assert [(g.number, g.count) for g in described.groups] == [(5, 44), (1, 4)]
    assert "2 of 64" in described.groups_note
    without = describe_encoder("x", tokens, GRIDS, images, (1.0,))
    assert "k-means" in without.groups_note
