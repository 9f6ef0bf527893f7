"""Losses of masked prediction and proxy tasks against slow implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from skimage.color import rgb2lab
from tiny_methods import CLOSE, VALUES, cross_entropy, softmax, step, tiny_config, tiny_method

from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import frozen_encoder
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import write_encoder
from pretrain.methods.beit import PatchTokens
from pretrain.methods.colorization import rgb_to_lab
from pretrain.methods.jigsaw import distant_permutations


def negative_log(logits, label: int) -> float:
    return -math.log(softmax(logits)[label])


def global_of(method, images: torch.Tensor) -> torch.Tensor:
    return method.student.backbone.forward_tokens(images).mean(dim=1)


def test_a_cell_that_does_not_divide_the_patch_is_refused():
    with pytest.raises(InputError, match="cell_size is 3, which does not divide"):
        tiny_method("maskfeat", "model.cell_size=3")


def test_codes_are_the_running_means_of_their_patches():
    torch.manual_seed(0)
    tokeniser = PatchTokens(3, 4)
    batches = [torch.randn(10, 4) for _ in range(3)]
    torch.manual_seed(1)
    chosen = torch.randperm(10)[:3]
    codes = [row.tolist() for row in batches[0][chosen]]
    counts = [0, 0, 0]
    torch.manual_seed(1)
    for batch in batches:
        labels = tokeniser(batch).tolist()
        own = [min(range(3), key=lambda k, p=p: math.dist(p, codes[k])) for p in batch.tolist()]
        assert labels == own
        for k in range(3):
            members = [p for p, label in zip(batch.tolist(), own, strict=True) if label == k]
            total = counts[k] + len(members)
            for d in range(4):
                # The first batch's centres count for nothing, as they are patches of it.
                moved = counts[k] * codes[k][d] + sum(p[d] for p in members)
                codes[k][d] = moved / total if total else codes[k][d]
            counts[k] = total
        torch.testing.assert_close(tokeniser.codes, torch.tensor(codes))
    tokeniser.eval()
    tokeniser(batches[0])
    torch.testing.assert_close(tokeniser.codes, torch.tensor(codes))


@pytest.mark.parametrize("tokenizer", ["", "file", "timm:resnet10t?pretrained=false"])
def test_beit(tokenizer, monkeypatch, tmp_path):
    if tokenizer == "file":
        tokenizer = str(tmp_path / "encoder.pth")
        write_encoder(FLSLViT(patch_size=2, embed_dim=8, depth=1, num_heads=1), tokenizer)
    method = tiny_method("beit", f"model.tokenizer={tokenizer}")
    inputs = step(method, num_global=1)
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    monkeypatch.setattr("pretrain.methods.beit.masks_of_share", lambda *_: mask)
    images = method.normalised(inputs.views[0])
    patches = [
        images[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten()
        for b, y, x in itertools.product(range(3), range(4), range(4))
    ]
    if tokenizer:
        encoder = frozen_encoder(tokenizer)
        side = 4 * encoder.patch_size
        resized = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        patches = [row / row.norm() for row in encoder.forward_tokens(resized).flatten(0, 1)]
        assert not any("tokenizer" in key for key in method.state_dict())
    torch.manual_seed(5)
    codes = [patches[n] for n in torch.randperm(48)[:9].tolist()]
    with torch.no_grad():
        outputs = method.student.head(method.student.masked_tokens(images, mask))
    expected, count = 0.0, int(mask.sum())
    for b, row, column in mask.nonzero().tolist():
        patch = patches[16 * b + 4 * row + column]
        label = min(range(9), key=lambda k, p=patch: float((p - codes[k]).norm()))
        expected += negative_log(outputs[b, 4 * row + column].tolist(), label) / count
    torch.manual_seed(5)
    losses, monitored = method(inputs, VALUES)
    assert losses["loss"].item() == pytest.approx(expected, **CLOSE)
    assert monitored["assigned"].sum() == 48
    with pytest.raises(InputError, match="num_codes is 9, and the first batch"):
        method.check_run(instantiate(tiny_config("beit", "views.global_size=4").views), 1)


def test_segments_are_drawn_evenly():
    """A segment of one token is drawn as often as one of 13; draws are with replacement."""
    method = tiny_method("detcon", "model.num_segments=3000")
    labels = torch.tensor([[7] * 13 + [2] + [5] * 2])
    torch.manual_seed(0)
    drawn = method._draw(labels)
    counts = [int((drawn == label).sum()) for label in (7, 2, 5)]
    # Standard deviation of a count: 26.
    assert sum(counts) == 3000
    assert all(abs(count - 1000) < 130 for count in counts)


def test_rotation():
    method = tiny_method("rotation")
    inputs = step(method, num_global=1)
    images = method.normalised(inputs.views[0])
    expected = 0.0
    with torch.no_grad():
        for image in images:
            for turns in range(4):
                turned = torch.from_numpy(np.rot90(image.numpy(), turns, (1, 2)).copy())
                logits = method.student.head(global_of(method, turned[None]))[0]
                expected += negative_log(logits.tolist(), turns) / 12
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)


def tiles_of(image: torch.Tensor, shifts) -> list[torch.Tensor]:
    """Tiles of 4 pixels in the 3 x 3 cells of 5 pixels of an image of 16."""
    cut = []
    for place, (down, right) in enumerate(shifts):
        top, left = 5 * (place // 3) + down, 5 * (place % 3) + right
        cut.append(image[:, top : top + 4, left : left + 4])
    return cut


def test_jigsaw():
    method = tiny_method("jigsaw")
    inputs = step(method, num_global=1)
    images = method.normalised(inputs.views[0])
    torch.manual_seed(5)
    shifts = torch.randint(2, (3, 9, 2)).tolist()
    drawn = torch.randint(5, (3,)).tolist()
    expected = 0.0
    with torch.no_grad():
        for b in range(3):
            tiles = tiles_of(images[b], shifts[b])
            tiles = [(t - t.mean()) / (t.var() + 1e-6).sqrt() for t in tiles]
            order = method.permutations[drawn[b]].tolist()
            z = torch.cat([global_of(method, tiles[n][None])[0] for n in order])
            expected += negative_log(method.student.head(z).tolist(), drawn[b]) / 3
    torch.manual_seed(5)
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)
    with pytest.raises(InputError, match="less than a patch of 4 pixels; use at least 12"):
        method.check_run(instantiate(tiny_config("jigsaw", "views.global_size=8").views), 4)


def test_permutations_are_far_from_each_other():
    permutations = distant_permutations(9, 20)
    assert (permutations.sort(dim=1).values == torch.arange(9)).all()
    for a, b in itertools.combinations(permutations.tolist(), 2):
        assert sum(x != y for x, y in zip(a, b, strict=True)) >= 6


def test_context():
    method = tiny_method("context")
    inputs = step(method, num_global=1)
    images = method.normalised(inputs.views[0])
    torch.manual_seed(5)
    shifts = torch.randint(2, (3, 9, 2)).tolist()
    drawn = torch.randint(8, (3,)).tolist()
    expected = 0.0
    with torch.no_grad():
        for b in range(3):
            tiles = tiles_of(images[b], shifts[b])
            neighbours = [tile for n, tile in enumerate(tiles) if n != 4]
            pair = [tiles[4], neighbours[drawn[b]]]
            z = torch.cat([global_of(method, tile[None])[0] for tile in pair])
            expected += negative_log(method.student.head(z).tolist(), drawn[b]) / 3
    torch.manual_seed(5)
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)


def test_lab_is_scikit_images():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0], images[0, :, 0, 1] = 0.0, 1.0
    expected = rgb2lab(images.permute(0, 2, 3, 1).numpy())
    ours = rgb_to_lab(images).permute(0, 2, 3, 1).numpy()
    # Constants of the standard are rounded differently.
    assert np.abs(ours - expected).max() < 0.05


def test_colorization():
    method = tiny_method("colorization")
    inputs = step(method, num_global=1)
    lab = rgb2lab(inputs.views[0].permute(0, 2, 3, 1).numpy() / 255)
    grey = torch.from_numpy(lab[..., 0]).float() * 2.55
    with torch.no_grad():
        images = method.normalised(grey[:, None].expand(-1, 3, -1, -1))
        outputs = method.student.head(method.student.backbone.forward_tokens(images)).tolist()
    expected = 0.0
    for b, row, column in itertools.product(range(3), range(4), range(4)):
        patch = lab[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        a, blue = (math.floor(patch[..., k].mean() / 10) + 11 for k in (1, 2))
        expected += negative_log(outputs[b][4 * row + column], a * 22 + blue) / 48
    # The grey image differs by the rounded constants of Lab.
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, rel=1e-3)


def test_cross_entropy_of_the_slow_arithmetic():
    """The helpers of these tests agree with PyTorch."""
    logits, targets = torch.randn(5), torch.rand(5)
    targets /= targets.sum()
    expected = F.cross_entropy(logits[None], targets[None]).item()
    # PyTorch's value is of float32.
    assert cross_entropy(targets.tolist(), softmax(logits)) == pytest.approx(expected, rel=1e-5)
