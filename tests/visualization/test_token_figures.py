"""Pages of pictures about tokens: they are written, and show what the headings say."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.visualization import describe_encoder
from flsl_d2.visualization.described import assign_centroids
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
def features():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (r * 16, c * 16, 3)).astype(np.uint8) for r, c in GRIDS]
    return [
        TokenFeatures(torch.randn(g[0] * g[1], 8), g, i) for g, i in zip(GRIDS, images, strict=True)
    ]


@pytest.fixture(scope="module")
def encoder(features):
    return describe_encoder("x", features, (1.0,))


def test_points_are_shares_of_the_image(encoder):
    assert [chosen_token(encoder, point) for point in POINTS] == [2 * 6 + 3, 5 * 4, 3]


def test_all_pages(encoder, tmp_path):
    modes_figure(encoder, POINTS, tmp_path / "modes.png", 1.0, 2)
    nearest_figure(encoder, POINTS, tmp_path / "nearest.png", 3)
    groups_figure(encoder, tmp_path / "groups.png")
    comparison_figure([encoder, encoder], POINTS[:1], tmp_path / "both.png", 1.0, 2)
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


def test_some_maps_alone(encoder, tmp_path):
    maps = ("pca", "clusters")
    comparison_figure([encoder], POINTS[:2], tmp_path / "a.png", 1.0, maps=maps)
    page = cv2.imread(str(tmp_path / "a.png"))
    assert abs(page.shape[1] - (8 + 3 * 258)) <= 1
    # No map depends on a point, so there is no cross: the first picture is the enlarged image.
    large = enlarge(encoder.features[0].image)[0]
    top = 25 + 22 + 2 * 17
    # Means of blocks, because matplotlib and OpenCV resample noise differently.
    shown, found = (
        cv2.resize(picture, (8, 6), interpolation=cv2.INTER_AREA).astype(int)
        for picture in (large[..., ::-1], page[top : top + 167, 8:258])
    )
    assert np.abs(found - shown).max() < 12


def test_a_head_gives_the_groups(features):
    torch.manual_seed(0)
    head = FLSLHead(8, 64, 16, 12).eval()
    torch.nn.init.normal_(head.mlp[2].bias)
    described = describe_encoder("x", features, (1.0,), head, 2.0)
    numbers, _ = assign_centroids(head, [each.tokens for each in features], 2.0 / 8**0.5)
    counts = torch.cat(numbers).bincount(minlength=64)
    assert max(g.count for g in described.groups) == counts.max()
    assert all(g.count == counts[g.number] for g in described.groups)
    assert f"{int((counts > 0).sum())} of 64" in described.groups_note
    assert "k-means" in describe_encoder("x", features, (1.0,)).groups_note
