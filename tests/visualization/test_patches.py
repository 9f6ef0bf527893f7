"""Nearest patches and the patches of groups, on tokens whose groups are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.visualization.described import (
    Patch,
    kmeans_groups,
    most_used_groups,
    nearest_patches,
)
from flsl_d2.visualization.token_figures import crop_patch

GRIDS = [(4, 6), (6, 6), (5, 4)]


def two_groups() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tokens of two directions in three images, and the group (0, 1) of each."""
    groups = [(torch.rand(r * c) < 0.3).long() for r, c in GRIDS]
    directions = 7 * torch.eye(2, 16)
    return [directions[g] + 0.1 * torch.randn(len(g), 16) for g in groups], groups


def features(tokens: list[torch.Tensor]) -> list[TokenFeatures]:
    image = np.zeros((1, 1, 3), np.uint8)
    return [TokenFeatures(each, GRIDS[i], image) for i, each in enumerate(tokens)]


def test_nearest_patches_are_of_the_same_group_in_other_images():
    tokens, groups = two_groups()
    found = nearest_patches(features(tokens), 0, 5, count=4)
    assert found
    for patch in found:
        assert patch.image != 0
        assert groups[patch.image][patch.token] == groups[0][5]
        cosine = F.cosine_similarity(tokens[patch.image][patch.token], tokens[0][5], dim=0)
        # Rounding of float32.
        assert patch.score == pytest.approx(float(cosine), abs=1e-5)
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert nearest_patches(features(tokens)[:1], 0, 3) == []


def test_nearest_patches_lie_apart_and_none_better_is_passed_over():
    tokens = [torch.randn(r * c, 8) for r, c in GRIDS]
    found = nearest_patches(features(tokens), 1, 7, count=99)
    everything = sorted(
        (-float(F.cosine_similarity(t[j], tokens[1][7], dim=0)), i, j)
        for i, t in enumerate(tokens)
        if i != 1
        for j in range(len(t))
    )
    kept: list[tuple[int, int]] = []
    for _, i, j in everything:
        place = divmod(j, GRIDS[i][1])
        apart = (
            max(abs(place[0] - k // GRIDS[i][1]), abs(place[1] - k % GRIDS[i][1])) > 2
            for other, k in kept
            if other == i
        )
        if all(apart):
            kept.append((i, j))
    assert [(p.image, p.token) for p in found] == kept


def test_most_used_groups_count_and_show_the_best():
    assigned = [torch.tensor([7] * 20 + [3] * 4), torch.tensor([3] * 36), torch.tensor([9] * 20)]
    scores = [torch.linspace(0, 1, 24), torch.linspace(1, 0, 36), torch.zeros(20)]
    groups = most_used_groups(assigned, scores, GRIDS, num_groups=2, num_patches=3, per_image=2)
    assert [(g.number, g.count, g.num_images) for g in groups] == [(3, 40, 2), (7, 20, 1)]
    # 23 and 36 tie at score 1: the first image comes first; then 3 cells on, at most 2 an image.
    assert [(p.image, p.token) for p in groups[0].patches] == [(0, 23), (1, 0), (1, 3)]
    assert groups[1].patches[0] == Patch(0, 19, pytest.approx(19 / 23))
    sets = [torch.zeros(r * c, dtype=torch.long) for r, c in GRIDS]
    (group,) = most_used_groups(sets, [s.float() for s in sets], GRIDS, num_groups=5)
    assert (group.number, group.count, group.num_images) == (0, 80, 3)


def test_kmeans_finds_groups():
    tokens, groups = two_groups()
    labels, cosines = kmeans_groups(tokens, num_groups=2)
    found, truth = torch.cat(labels), torch.cat(groups)
    assert torch.equal(found, truth) or torch.equal(found, 1 - truth)
    assert [len(part) for part in labels] == [24, 36, 20]
    assert torch.cat(cosines).min() > 0.95
    before = torch.get_rng_state()
    again, _ = kmeans_groups(tokens, num_groups=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(labels, again, strict=True))


def test_kmeans_of_many_tokens_gives_each_to_its_nearest_centre():
    groups = torch.randint(3, (5000,))  # more than the centres are found on
    tokens = 5 * torch.eye(3, 6)[groups] + 0.1 * torch.randn(5000, 6)
    (labels,), (cosines,) = kmeans_groups([tokens], num_groups=3)
    for k in range(3):
        assert len(labels[groups == k].unique()) == 1
    centres = torch.stack([F.normalize(tokens[labels == k].mean(dim=0), dim=0) for k in range(3)])
    expected = F.cosine_similarity(tokens, centres[labels], dim=1)
    # Centres are means of 4,096 of the 5,000 tokens here, and of all there.
    torch.testing.assert_close(cosines, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tokens", [torch.ones(12, 4), torch.zeros(12, 4), torch.randn(3, 4)])
def test_kmeans_of_few_or_equal_tokens(tokens):
    (labels,), _ = kmeans_groups([tokens], num_groups=24)
    assert len(labels) == len(tokens)


@pytest.mark.parametrize("token", [0, 27, 35, 47])
def test_crop_outlines_the_patch(token):
    grid, patch = (6, 8), 16
    image = np.zeros((96, 128, 3), np.uint8)
    row, column = divmod(token, grid[1])
    image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = (0, 200, 0)
    crop = crop_patch(image, grid, token, side=160)
    assert crop.shape == (160, 160, 3)
    green = (crop == (0, 200, 0)).all(axis=2)
    # 160 pixels show 5 patches; of the patch's 32 x 32 pixels the outline leaves the inner part.
    assert 24**2 <= green.sum() <= 32**2
    white = (crop == 255).all(axis=2).nonzero()
    inside = green.nonzero()
    for outline, patch_pixels in zip(white, inside, strict=True):
        assert 0 < patch_pixels.min() - outline.min() <= 4
        assert 0 < outline.max() - patch_pixels.max() <= 4
    assert crop_patch(image, (1, 2), 1).shape == (96, 96, 3), "a grid smaller than the surroundings"
