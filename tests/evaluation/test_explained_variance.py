"""How much place and colour explain, on tokens of which it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from labelled_rectangles import dataset

from flsl_d2.errors import InputError
from flsl_d2.evaluation.explained_variance import ExplainedVariance, fit_sums, solve_fit
from flsl_d2.evaluation.samples import Options, Sample, Task
from flsl_d2.modeling import FLSLViT

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


def test_places() -> None:
    scores = explained(lambda c, y, x: torch.cat([(3 * y).cos(), (6 * x).sin()], -1))
    assert scores["position_r2"] > 99
    assert abs(scores["colour_r2"]) < 5


def test_colours() -> None:
    scores = explained(lambda c, y, x: torch.cat([c**2, c[..., :1] * c[..., 1:2] - 3], -1))
    assert scores["colour_r2"] > 99.9
    assert scores["position_r2"] < 5


def test_noise() -> None:
    torch.manual_seed(0)
    scores = explained(lambda c, y, x: torch.randn(*c.shape[:2], 8))
    assert all(-15 < value < 2 for value in scores.values())


def test_half_of_each() -> None:
    torch.manual_seed(0)

    def tokens(c, y, x):
        place = (torch.pi * y).cos() * 2**0.5  # variance 1
        colour = (c[..., :1] - 0.5) * 12**0.5
        return place + colour

    scores = explained(tokens, 40)
    # Sampling: 40 images of about 80 tokens give the share to a few per cent.
    assert scores["position_r2"] == pytest.approx(50, abs=5)
    assert scores["colour_r2"] == pytest.approx(50, abs=5)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_tokens_that_are_all_the_same(value: float) -> None:
    with pytest.raises(InputError, match="no variance"):
        explained(lambda c, y, x: torch.full((*c.shape[:2], 4), value))


def test_a_fit_without_an_image_is_the_fit_of_the_others() -> None:
    torch.manual_seed(0)
    images = [(torch.randn(20, 3).double(), torch.randn(20, 5).double()) for _ in range(3)]
    for functions, _ in images:
        functions[:, 0] = 1
    first, *rest = [fit_sums(*image) for image in images]
    others = rest[0] + rest[1]
    weights, mean = solve_fit(first + others - first)
    torch.testing.assert_close((weights, mean), solve_fit(others))
    functions, tokens = (torch.cat(parts) for parts in zip(*images[1:], strict=True))
    expected = torch.linalg.lstsq(functions, tokens).solution
    # The ridge of 1e-9 of the mean of the diagonal.
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, tokens.mean(dim=0))
