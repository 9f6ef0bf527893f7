"""Pictures of tokens: what they show is checked on tokens whose groups are known."""

from __future__ import annotations

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.visualization import (
    attention_map,
    cluster_labels,
    cluster_overlay,
    encoder_figure,
    mode_similarity_map,
    pca_rgb,
    token_at,
)
from flsl_d2.visualization.figures import enlarge, mark_cell, overlay_heat, overlay_masks, palette
from flsl_d2.visualization.maps import attention_values, mode_similarity_values

GRID = (6, 8)
WIDTH = 32


@pytest.fixture
def halves():
    """Tokens of two far groups, the left and the right half of the grid, and the group of each."""
    groups = np.tile(np.arange(GRID[1]) >= GRID[1] // 2, GRID[0]).astype(int)
    centres = torch.eye(2, WIDTH) * 40
    return centres[groups] + 0.1 * torch.randn(len(groups), WIDTH), groups.reshape(GRID)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)


def of(tokens: torch.Tensor, image: np.ndarray | None = None) -> TokenFeatures:
    return TokenFeatures(tokens, GRID, np.zeros((6, 8, 3), np.uint8) if image is None else image)


def test_attention_stays_in_the_tokens_group(halves):
    tokens, groups = halves
    values = attention_values(of(tokens), token=0)
    # Rounding of float32 in a softmax.
    np.testing.assert_allclose(values.sum(), len(tokens), rtol=1e-4)
    assert values[groups == 0].min() > 10 * values[groups == 1].max()
    half = tokens.bfloat16().requires_grad_()
    expected = attention_values(of(half.detach().float()), 5)
    np.testing.assert_array_equal(attention_values(of(half), 5), expected)


def test_modes_and_clusters_are_of_the_groups(halves):
    tokens, groups = halves
    values = mode_similarity_values(of(tokens), token=len(tokens) - 1)
    assert values[groups == 1].min() > 0.99
    assert values[groups == 0].max() < 0.2
    labels = cluster_labels(of(tokens))
    assert labels.max() == 1
    assert len({*zip(labels.ravel().tolist(), groups.ravel().tolist(), strict=True)}) == 2


def test_maps_are_pictures_of_the_images_size(halves, image):
    tokens, groups = halves
    pictures = (
        attention_map(of(tokens, image), 3).image,
        mode_similarity_map(of(tokens, image), 3).image,
        pca_rgb(of(tokens, image)),
        cluster_overlay(image, groups),
    )
    for picture in pictures:
        assert picture.shape == image.shape
        assert picture.dtype == np.uint8


def test_pca_tells_groups_apart_and_does_not_flip(halves):
    tokens, groups = halves
    picture = pca_rgb(of(tokens)).astype(int)
    apart = picture[groups == 0][:, 0].mean() - picture[groups == 1][:, 0].mean()
    assert abs(apart) > 150
    turned = (tokens + 5) @ torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    assert np.abs(pca_rgb(of(turned)).astype(int) - picture).max() <= 2


@pytest.mark.parametrize("tokens", [torch.zeros(48, 32), torch.ones(48, 1), torch.randn(48, 2)])
def test_collapsed_or_narrow_features_are_drawn(tokens, image):
    features = of(tokens, image)
    assert np.isfinite(attention_values(features, 0)).all()
    assert pca_rgb(features).shape == image.shape
    assert attention_map(features, 0).image.shape == image.shape
    assert mode_similarity_map(features, 0).image.shape == image.shape


def test_cluster_borders_lie_between_clusters(image):
    groups = np.zeros(GRID, int)
    groups[:, 4:] = 1
    picture = cluster_overlay(np.zeros_like(image), groups)
    white = (picture == 255).all(axis=2)
    assert white[:, 60].all()
    assert white.sum() == image.shape[0]


def test_tokens_that_do_not_fill_the_grid():
    with pytest.raises(ValueError, match="6 x 8"):
        attention_values(of(torch.zeros(47, 8)), 0)
    with pytest.raises(ValueError, match="cell 48"):
        mark_cell(np.zeros((60, 80, 3), np.uint8), GRID, 48)


@pytest.mark.parametrize(
    ("x", "y", "token"), [(0, 0, 0), (119.9, 89.9, 47), (500, -3, 7), (15, 15, 9), (60, 45, 28)]
)
def test_token_at(x, y, token):
    assert token_at(x, y, (90, 120), GRID) == token


def test_cross_is_where_the_token_is():
    marked = mark_cell(
        np.full((90, 120, 3), 128, np.uint8), GRID, token_at(100, 20, (90, 120), GRID)
    )
    rows, columns = (marked != 128).any(axis=2).nonzero()
    assert abs(columns.mean() - 97.5) <= 1
    assert abs(rows.mean() - 22.5) <= 1


def test_heat_is_strongest_where_values_are():
    values = np.zeros((4, 4))
    values[1, 2] = 1
    heat = overlay_heat(np.zeros((40, 40, 3), np.uint8), values, 0, 1, "gray")[..., 0]
    # Within a cell of 10 pixels, whose values are interpolated.
    assert np.unravel_index(heat.argmax(), heat.shape) == pytest.approx((14, 24), abs=2)


def test_masks_keep_their_holes():
    mask = np.zeros((50, 50), bool)
    mask[5:45, 5:45] = True
    mask[15:35, 15:35] = False
    drawn = overlay_masks(np.zeros((100, 100, 3), np.uint8), [mask], palette(1))
    assert drawn[50, 50].sum() == 0
    assert drawn[20, 50].sum() > 0
    assert drawn[4, 4].sum() == 0


def test_only_small_images_are_enlarged():
    assert enlarge(np.zeros((100, 200, 3), np.uint8), 50)[1] == 1
    large, factor = enlarge(np.zeros((100, 200, 3), np.uint8), 384)
    assert (large.shape, factor) == ((384, 768, 3), 3.84)


def test_encoder_figure_of_images_of_several_sizes(halves, image, tmp_path):
    tokens, _ = halves
    upright = np.ascontiguousarray(image.transpose(1, 0, 2))
    path = tmp_path / "new" / "encoder.png"
    features = [of(tokens, image), TokenFeatures(tokens, GRID[::-1], upright)]
    before = plt.get_fignums(), plt.get_backend()
    encoder_figure(features, path, tokens=[0, 47])
    assert (plt.get_fignums(), plt.get_backend()) == before
    page = cv2.imread(str(path))
    assert page.shape[1] == 8 + 5 * 258 + 2 * 55
    assert page.std() > 30
