"""How much place and colour explain, on tokens of which it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_rectangles import dataset

from flsl_d2.errors import InputError
from flsl_d2.evaluation import TokenFeatures
from flsl_d2.evaluation.explained_variance import (
    ExplainedVariance,
    colour_r2,
    patch_colours,
    position_r2,
)
from flsl_d2.evaluation.samples import Options, Sample, Task
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.positions import sincos_positions
from flsl_d2.visualization.maps import attended_share

GRID = (20, 20)
GRIDS = [(8, 12), (12, 8), (9, 9), (8, 8)]
PATCH = 8


def explained(tokens_of, num_images: int = 12) -> dict[str, float]:
    """Scores of ``tokens_of(colours, y, x)``, of the mean colour and the place of each patch."""
    generator = np.random.default_rng(0)
    data = dataset()._replace(images=[None] * num_images)
    encoder = FLSLViT(img_size=64, patch_size=PATCH, embed_dim=32, depth=1, num_heads=2)
    measure = ExplainedVariance(Task(encoder, data, data, Options(short_side=8 * PATCH)))
    samples = []
    for index in range(2 * num_images):
        rows, columns = grid = GRIDS[index % len(GRIDS)]
        colours = generator.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        pixels = colours.repeat(PATCH, axis=0).repeat(PATCH, axis=1)
        y, x = ((torch.arange(cells) + 0.5) / cells for cells in grid)
        y, x = torch.meshgrid(y, x, indexing="ij")
        tokens = tokens_of(torch.from_numpy(colours).float() / 255, y[..., None], x[..., None])
        samples.append(Sample(index, tokens.flatten(0, 1), grid, pixels, None, None))
    for sample in samples[:num_images]:
        measure.observe_train(sample)
    measure.fit()
    for sample in samples[num_images:]:
        measure.observe_val(sample)
    return measure.results()


def test_places_colours_and_noise() -> None:
    scores = explained(lambda c, y, x: torch.cat([(3 * y).cos(), (6 * x).sin()], -1))
    assert scores["position_r2"] > 99
    assert abs(scores["colour_r2"]) < 5
    scores = explained(lambda c, y, x: torch.cat([c**2, c[..., :1] * c[..., 1:2] - 3], -1))
    assert scores["colour_r2"] > 99.9
    assert scores["position_r2"] < 5
    torch.manual_seed(0)
    scores = explained(lambda c, y, x: torch.randn(*c.shape[:2], 8))
    assert all(-15 < value < 2 for value in scores.values())


def test_half_of_each() -> None:
    # Place and colour of variance 1.
    scores = explained(
        lambda c, y, x: (torch.pi * y).cos() * 2**0.5 + (c[..., :1] - 0.5) * 12**0.5, 40
    )
    # Sampling: 40 images of about 80 tokens give the share to a few per cent.
    assert scores["position_r2"] == pytest.approx(50, abs=5)
    assert scores["colour_r2"] == pytest.approx(50, abs=5)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_tokens_that_are_all_the_same(value: float) -> None:
    with pytest.raises(InputError, match="no variance"):
        explained(lambda c, y, x: torch.full((*c.shape[:2], 4), value))


def features(token_sets, grids, images=None) -> list[TokenFeatures]:
    images = images or [None] * len(grids)
    return [TokenFeatures(*each) for each in zip(token_sets, grids, images, strict=True)]


def test_position_r2_as_by_fitting_each_left_out_image() -> None:
    torch.manual_seed(3)
    grids = [(6, 9), (7, 6), (8, 8)]
    sets = [torch.randn(rows * columns, 5) for rows, columns in grids]
    sets[0][:, 0] += torch.linspace(-5, 5, 54)
    order = 2  # (2 + 1)(2 + 2) / 2 = 6 functions for at least 10 times as many tokens
    assert len(sets[0]) + len(sets[1]) == 96

    def functions(rows: int, columns: int) -> np.ndarray:
        return np.array(
            [
                [
                    np.cos(np.pi * k * (r + 0.5) / rows) * np.cos(np.pi * m * (c + 0.5) / columns)
                    for k in range(order + 1)
                    for m in range(order + 1 - k)
                ]
                for r in range(rows)
                for c in range(columns)
            ]
        )

    error = deviation = 0.0
    for i in range(3):
        others = [j for j in range(3) if j != i]
        fitted = np.concatenate([functions(*grids[j]) for j in others])
        tokens = np.concatenate([sets[j].numpy() for j in others]).astype(float)
        weights, *_ = np.linalg.lstsq(fitted, tokens, rcond=None)
        own = sets[i].numpy().astype(float)
        error += ((own - functions(*grids[i]) @ weights) ** 2).sum()
        deviation += ((own - tokens.mean(axis=0)) ** 2).sum()
    # The solver adds 1e-9 to the diagonal.
    assert position_r2(features(sets, grids)) == pytest.approx(1 - error / deviation, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=4),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_any_grids_give_a_number(grids: list[tuple[int, int]], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sets = [torch.randn(r * c, width, generator=generator) for r, c in grids]
    value = position_r2(features(sets, grids))
    assert value <= 1
    assert np.isfinite(value)
    shifted = [3.0 * tokens + 5.0 for tokens in sets]
    # A large offset costs digits of float32.
    assert position_r2(features(shifted, grids)) == pytest.approx(value, abs=1e-3)


def test_r2_of_one_image_or_constant_tokens_is_none() -> None:
    assert position_r2(features([torch.randn(400, 4)], [GRID])) is None
    assert position_r2(features([torch.ones(400, 4)] * 2, [GRID] * 2)) is None


def test_colour_explains_colours_and_not_positions() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (80, 80, 3)).astype(np.uint8) for _ in range(3)]
    colours = [patch_colours(image, GRID) for image in images]
    expected = images[0].reshape(20, 4, 20, 4, 3).mean(axis=(1, 3)).reshape(-1, 3)
    # OpenCV sums in float32, up to 255.
    np.testing.assert_allclose(colours[0], expected, atol=1e-3)
    mixed = [c @ torch.randn(3, 16, generator=torch.Generator().manual_seed(1)) for c in colours]
    assert colour_r2(features(mixed, [GRID] * 3, images)) > 0.999
    assert position_r2(features(mixed, [GRID] * 3)) < 0.02
    table = sincos_positions(64, 20)[0]
    assert colour_r2(features([table] * 3, [GRID] * 3, images)) < 0.02


def test_attended_share() -> None:
    far = 50 * torch.eye(16)
    assert attended_share(far, scale=1.0) == pytest.approx(1 / 16)
    assert attended_share(far, scale=1e-9) == pytest.approx(1.0)
    halves = 50 * torch.eye(2).repeat_interleave(8, dim=0)
    assert attended_share(halves, scale=1.0) == pytest.approx(0.5)
