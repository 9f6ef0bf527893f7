"""Places of queries in the teacher's view, and what features that are a map of places can earn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.vit import gather_tokens
from pretrain import views as views_module
from pretrain.augmentation import Augmentation
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss
from pretrain.methods.places import (
    VarianceBound,
    token_centres,
    tokens_at,
)
from pretrain.schedules import Schedules
from pretrain.step_inputs import collate
from pretrain.views import DEVICE_WORK, NestedViews

NO_AUGMENTATION = Augmentation((), (1.0, 1.0, 1.0, 0.0), False, 0.0, False)
SIZES = {"patch_size": 8, "global_size": 64, "local_size": 32}


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6), st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), st.booleans()
)
def test_places_equal_a_loop(side, box, mirrored):
    top, left, height, width = box
    if mirrored:
        left, width = left + width, -width
    xy = token_centres(side * side, torch.tensor([[top, left, height, width]]))
    for row, column in itertools.product(range(side), range(side)):
        across = (column + 0.5) / side
        across = 1 - across if mirrored else across
        x, y = box[1] + across * box[3], box[0] + (row + 0.5) / side * box[2]
        # Products of numbers up to 1 in single precision.
        assert xy[0, row * side + column].tolist() == pytest.approx([x, y], abs=1e-6)


def test_tokens_at_the_centres_are_the_tokens_and_between_them_their_mix():
    tokens = torch.randn(2, 16, 5)
    centres = (torch.arange(4) + 0.5) / 4
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).view(1, 16, 2)
    torch.testing.assert_close(tokens_at(tokens, grid.expand(2, -1, -1)), tokens)
    between = tokens_at(tokens, torch.tensor([[[0.25, 0.125]]]).expand(2, -1, -1))
    torch.testing.assert_close(between[:, 0], (tokens[:, 0] + tokens[:, 1]) / 2)
    outside = tokens_at(tokens, torch.tensor([[[-3.0, 0.125]]]).expand(2, -1, -1))
    torch.testing.assert_close(outside[:, 0], tokens[:, 0])


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("on_device", DEVICE_WORK)
def test_a_query_and_its_place_show_the_same(monkeypatch, on_device, flip):
    """The colours of the image are its coordinates, so patches tell where they come from."""
    monkeypatch.setattr(views_module, "draw_augmentation", lambda *_: NO_AUGMENTATION)
    rows, columns = np.mgrid[0:160, 0:200]
    image = np.stack([rows, columns, np.full_like(rows, 90)], axis=2).astype(np.uint8)
    views = NestedViews(**SIZES, flip=flip, on_device=on_device)
    samples = [(views(image, np.random.default_rng(seed)), []) for seed in range(8)]
    inputs = collate(samples).to_device(torch.device("cpu"))
    teacher, *students = [F.avg_pool2d(view.float(), 8).flatten(2).mT for view in inputs.views]
    for patches, indexes, places in zip(students, inputs.queries, inputs.regions, strict=True):
        xy = gather_tokens(token_centres(patches.shape[1], places), indexes)
        seen = patches.gather(1, indexes[..., None].expand(-1, -1, 3))
        # Colours rise linearly, so interpolation between centres is exact up to rounding of two
        # resamplings (a level each); places beyond the outermost centres are left out.
        inner = ((xy > 1 / 16) & (xy < 15 / 16)).all(dim=-1)
        assert inner.float().mean() > 0.5
        assert (seen - tokens_at(teacher, xy))[inner].abs().max() < 2.5
    assert {bool(region[3] < 0) for sample, _ in samples for region in sample.regions} == {
        0.0: {False},
        0.5: {False, True},
        1.0: {True},
    }[flip]


class Recorder(nn.Module):
    """Stands for the loss and keeps the teacher's logits."""

    def __init__(self, num_centroids: int) -> None:
        super().__init__()
        self.num_centroids = num_centroids

    def forward(self, queries, modes, student_logits, teacher_logits, **_):
        self.targets = (teacher_logits / 0.04).softmax(dim=-1)
        return {"loss": modes.sum()}, {}


def earned_by_a_map_of_places(flip: float = 0.0, **switches) -> float:
    """Information in nats that a token's place in its own view has about the target.

    The encoder's features depend on positions alone: all patches are equal and its blocks change
    nothing. The best student with such features predicts the mean target of each place, and gains
    the mutual information of target and place over one that predicts the mean target.
    """
    torch.manual_seed(0)
    encoder = FLSLViT(img_size=64, patch_size=8, embed_dim=48, depth=1, num_heads=2)
    with torch.no_grad():
        block = encoder.blocks[0]
        for layer in (encoder.patch_embed.proj, block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        encoder.patch_embed.proj.bias.normal_(std=0.1)
    head = FLSLHead(48, num_centroids=64, hidden_dim=64, bottleneck_dim=16)
    for layer in head.mlp[::2]:
        nn.init.xavier_normal_(layer.weight, gain=2.0)
    model = FLSL(encoder, head, FLSLLoss(64), **switches)
    model.loss = Recorder(64)
    views = NestedViews(**SIZES, num_local=0, global_window=1, flip=flip, on_device="crops")
    image = np.zeros((80, 80, 3), np.uint8)
    samples = [(views(image, np.random.default_rng(seed)), []) for seed in range(256)]
    # Sharp kernels, so that a mode stays near its token.
    values = Schedules(256, 1, 1, self_scale=(4.0, 4.0), cross_scale=(4.0, 4.0))(0)
    with torch.no_grad():
        model(collate(samples).to_device(torch.device("cpu")), values)
    targets = model.loss.targets.view(256, 64, -1).double()  # (B, places, K)
    entropy = torch.special.entr(targets.mean(dim=(0, 1))).sum()
    left = torch.special.entr(targets.mean(dim=0)).sum(dim=-1).mean()
    return float(entropy - left)


def test_a_map_of_places_earns_the_published_objective_and_less_or_nothing_with_the_remedies():
    published = earned_by_a_map_of_places()
    assert published > 0.5
    # With a partner by similarity the own place decides the target, whatever the crops and flips.
    assert earned_by_a_map_of_places(flip=0.5) == pytest.approx(published, rel=0.01)
    by_place = earned_by_a_map_of_places(partner="place")
    assert by_place < 0.9 * published
    assert earned_by_a_map_of_places(partner="place", flip=0.5) < 0.8 * by_place
    # Features that hold nothing but places have no variance within a place, so nothing is left.
    assert earned_by_a_map_of_places(partner="place", position_share=0.01) < 0.1 * published


def test_positions_are_dropped_in_the_stated_share_of_steps_and_from_the_seed():
    def encoded_with_positions(drop: float, seed: int, mode: bool = True) -> bool:
        torch.manual_seed(0)
        encoder = FLSLViT(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
        model = FLSL(encoder, FLSLHead(8, 4, 8, 4), FLSLLoss(4), position_drop=drop).train(mode)
        images = torch.zeros(1, 3, 16, 16)
        torch.manual_seed(seed)
        ((tokens,), _) = model._student_tokens([[(images,)]])
        return bool((tokens - tokens[:, :1]).abs().max() > 1e-6)

    kept = [encoded_with_positions(0.3, seed) for seed in range(100)]
    # Binomial with 100 draws: a standard deviation of 4.6 %; four of them on each side.
    assert 0.51 < np.mean(kept) < 0.89
    assert kept == [encoded_with_positions(0.3, seed) for seed in range(100)]
    assert encoded_with_positions(0.0, 0)
    assert not encoded_with_positions(1.0, 0)
    assert encoded_with_positions(1.0, 0, mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partner": "plcae"}, "'plcae'"),
        ({"position_drop": 1.5}, "position_drop is 1.5"),
        ({"position_share": 0.05}, "position_share is 0.05, .* model.partner 'similarity'"),
        ({"image_share": 0.05}, "image_share 0.05 and model.partner 'similarity'"),
        ({"position_share": 0.0, "partner": "place"}, "position_share is 0.0"),
        ({"token_share": 1.5}, "token_share is 1.5"),
        ({"token_share": 0.5, "pack_views": False}, "only packed views"),
        ({"prediction_blocks": 1, "partner": "place"}, "token_share 1.0, and only dropped tokens"),
        ({"prediction_blocks": 1, "token_share": 0.5}, "partner 'similarity' and .* only dropped"),
    ],
)
def test_switches_out_of_range_are_refused(arguments, message):
    encoder = FLSLViT(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(InputError, match=message):
        FLSL(encoder, FLSLHead(8, 4, 8, 4), FLSLLoss(4), **arguments)
    with pytest.raises(InputError, match=r"flip is -0\.5"):
        NestedViews(flip=-0.5)


def test_a_place_is_the_teachers_own_token_there():
    """The logits that a query is compared with, by hand."""
    torch.manual_seed(0)
    encoder = FLSLViT(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    model = FLSL(encoder, FLSLHead(8, 4, 8, 4), FLSLLoss(4), partner="place").eval()
    model.loss = Recorder(4)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    views = NestedViews(8, 32, 16, num_local=1, local_window=1)(image, np.random.default_rng(1))
    inputs = collate([(views, [])]).to_device(torch.device("cpu"))
    values = Schedules(1, 1, 1, cross_scale=(0.9, 0.9))(0)
    with torch.no_grad():
        model(inputs, values)
        keys = model.teacher.backbone.forward_tokens(model.normalised(inputs.views[0]))[0]
        modes = [(0.9 / math.sqrt(8) * keys @ key).softmax(dim=0) @ keys for key in keys]
        logits = [model.teacher.head(mode) for mode in modes]
    expected = []
    sides = [4, 2]
    for side, region, queries in zip(sides, views.regions, views.queries, strict=True):
        top, left, height, width = region.tolist()
        for index in queries.tolist():
            x = (left + (index % side + 0.5) / side * width) * 4 - 0.5
            y = (top + (index // side + 0.5) / side * height) * 4 - 0.5
            x, y = min(max(x, 0), 3), min(max(y, 0), 3)
            mixed = torch.zeros(4)
            for r, c in itertools.product(range(4), range(4)):
                mixed += max(0, 1 - abs(x - c)) * max(0, 1 - abs(y - r)) * logits[4 * r + c]
            expected.append((mixed / 0.04).softmax(dim=-1))
    # A temperature of 0.04 multiplies rounding of single precision by 25.
    torch.testing.assert_close(model.loss.targets, torch.stack(expected), rtol=1e-3, atol=1e-4)


def explained_share(logits: np.ndarray) -> float:
    """Share of the variance of logits (G, M, K) between the means of the G groups, by loops."""
    groups, members, _ = logits.shape
    means = [sum(logits[g, m] for m in range(members)) / members for g in range(groups)]
    mean = sum(means) / groups
    between = sum(((each - mean) ** 2).sum() for each in means) / groups
    within = sum(
        ((logits[g, m] - means[g]) ** 2).sum() for g in range(groups) for m in range(members)
    ) / (groups * members)
    return between / (between + within)


@pytest.mark.parametrize("which", ["position_share", "image_share"])
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 0.9), st.floats(0.0, 5.0))
def test_a_group_explains_at_most_its_share_of_the_targets_variance(which, seed, share, strength):
    torch.manual_seed(seed)
    groups, axis = (9, 0) if which == "position_share" else (8, 1)  # the axis of the members
    offsets = strength * torch.randn(groups, 5)
    logits = torch.randn(8, 9, 5) + offsets.unsqueeze(axis)
    bounded = VarianceBound(9, 5, **{which: share})(logits)  # a first step averages itself alone
    before, after = (
        explained_share(each.movedim(axis, 1).double().numpy()) for each in (logits, bounded)
    )
    # Sums of 360 numbers in single precision.
    assert after == pytest.approx(min(before, share), abs=1e-4)
    if before < share:
        torch.testing.assert_close(bounded, logits)
    # What tells the members of a group apart stays; logits of up to 20 are rounded by 1e-6 each.
    torch.testing.assert_close(
        bounded - bounded.mean(dim=axis, keepdim=True),
        logits - logits.mean(dim=axis, keepdim=True),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_bound_averages_over_steps_and_is_kept_in_checkpoints():
    torch.manual_seed(0)
    bound, expected = VarianceBound(4, 3, 0.05, momentum=0.5), torch.zeros(4, 3)
    for step in range(1, 4):
        logits = torch.randn(6, 4, 3)
        bound(logits)
        expected = expected / 2 + logits.mean(dim=0) / 2
        torch.testing.assert_close(bound.means / bound.weight, expected / (1 - 0.5**step))
    copy = VarianceBound(4, 3, 0.05)
    copy.load_state_dict(bound.state_dict())
    assert torch.equal(copy.eval()(logits), bound.eval()(logits))
    with pytest.raises(InputError, match="9 tokens and the table of positions 4"):
        bound(torch.zeros(1, 9, 3))
    bound.set_num_tokens(9)
    assert bound(torch.zeros(1, 9, 3)).shape == (1, 9, 3)


def test_dropped_tokens_are_not_encoded_and_the_kept_ones_are_the_queries():
    torch.manual_seed(0)
    encoder = FLSLViT(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2).eval()
    model = FLSL(encoder, FLSLHead(8, 4, 8, 4), FLSLLoss(4), partner="place", token_share=0.4)
    image = torch.randn(3, 3, 32, 32)
    local = torch.randn(3, 3, 16, 16)
    tokens, ((kept, dropped), nothing) = model.eval()._student_tokens([[(image,)], [(local,)]])
    assert nothing is None
    assert torch.equal(
        torch.cat([kept, dropped], 1).sort(dim=1).values, torch.arange(16).repeat(3, 1)
    )
    assert tokens[0].shape == (3, 6, 8)
    assert tokens[1].shape == (3, 4, 8)
    assert all(len(set(indexes)) == 6 for indexes in kept.tolist())
    assert len({tuple(indexes) for indexes in kept.tolist()}) == 3
    for b, indexes in enumerate(kept):
        part = encoder.embed(image[b : b + 1]).flatten(1, 2)[:, indexes]
        alone = encoder.final_norm(encoder.blocks[0](part[:, None]))[0, 0]
        torch.testing.assert_close(tokens[0][b], alone)


def test_dropped_tokens_are_predicted_from_the_kept_ones_by_their_places():
    torch.manual_seed(0)
    encoder = FLSLViT(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    switches = {"partner": "place", "token_share": 0.4, "prediction_blocks": 2}
    model = FLSL(encoder, FLSLHead(8, 4, 8, 4), FLSLLoss(4), **switches).eval()
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    kept, dropped = order[:, :6], order[:, 6:]
    tokens = torch.randn(3, 6, 8)
    predicted = model.decoder.predict_masked(tokens, model.mask_token, kept, dropped)
    for b in range(3):
        grid = model.mask_token.repeat(16, 1)
        for token, place in zip(tokens[b], kept[b].tolist(), strict=True):
            grid[place] = model.decoder.embed(token)
        decoded = model.decoder((grid + model.decoder.positions(16, grid.device)[0])[None])[0]
        for own, place in zip(predicted[b], dropped[b].tolist(), strict=True):
            # The order of the tokens changes the order of sums in single precision.
            torch.testing.assert_close(own, decoded[place], rtol=1e-4, atol=1e-5)


def test_a_predicted_token_is_compared_with_the_target_of_its_place():
    torch.manual_seed(0)
    encoder = FLSLViT(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2)
    model = FLSL(encoder, FLSLHead(8, 4, 8, 4), FLSLLoss(4), partner="place", token_share=0.4)
    predicting = FLSL(
        encoder,
        FLSLHead(8, 4, 8, 4),
        FLSLLoss(4),
        partner="place",
        token_share=0.4,
        prediction_blocks=1,
    )
    predicting.load_state_dict(model.state_dict(), strict=False)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    views = NestedViews(8, 32, 16, num_local=1, local_window=1)(image, np.random.default_rng(1))
    inputs = collate([(views, [])]).to_device(torch.device("cpu"))
    values = Schedules(1, 1, 1)(0)
    recorded = []
    for each in (model, predicting):
        each.loss = Recorder(4)
        torch.manual_seed(1)  # the same tokens are dropped
        losses, _ = each.eval()(inputs, values)
        recorded.append(each.loss.targets)
        gradients = torch.autograd.grad(losses["loss"], each.student.backbone.patch_embed.proj.bias)
        assert gradients[0].abs().sum() > 0
    alone, both = recorded
    # 6 of the 16 tokens of the global view are encoded, and 10 predicted behind them.
    assert len(both) == len(alone) + 10
    torch.testing.assert_close(both[:6], alone[:6])
    torch.testing.assert_close(both[16:], alone[6:])
    torch.manual_seed(1)
    _, (split, _) = predicting._student_tokens(
        [[(inputs.views[1].float(),)], [(inputs.views[2].float(),)]]
    )
    with torch.no_grad():
        tokens = predicting.teacher.backbone.forward_tokens(predicting.normalised(inputs.views[0]))
        logits = predicting._place_logits(tokens, values.cross_scale / math.sqrt(8))
    xy = gather_tokens(token_centres(16, inputs.regions[0]), split[1])
    expected = (tokens_at(logits, xy)[0] / values.teacher_temp).softmax(dim=-1)
    # A temperature of 0.04 multiplies rounding of single precision by 25.
    torch.testing.assert_close(both[6:16], expected, rtol=1e-3, atol=1e-4)
