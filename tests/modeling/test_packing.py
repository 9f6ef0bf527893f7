"""One pass over images of several sizes equals a pass for each size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.blocks import StochasticDepth, draw_kept_images


def encoder(**options) -> FLSLViT:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, **options}
    return FLSLViT(num_heads=2, **options)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4
    ),
    st.sampled_from([None, 0, 1, 3]),
    st.sampled_from([0, 2]),
)
def test_equals_size_by_size(shapes, num_blocks, num_prefix_tokens):
    vit = encoder(num_prefix_tokens=num_prefix_tokens).eval()
    batches = [torch.randn(b, 3, 8 * h, 8 * w) for b, h, w in shapes]
    packed = vit.forward_packed(batches, num_blocks)
    for ours, images in zip(packed, batches, strict=True):
        torch.testing.assert_close(ours, vit.forward_tokens(images, num_blocks))


@pytest.mark.parametrize("use_act_checkpoint", [False, True])
@pytest.mark.parametrize("layer_scale_init", [None, 0.1])
def test_gradients_equal(use_act_checkpoint, layer_scale_init):
    vit = encoder(use_act_checkpoint=use_act_checkpoint, layer_scale_init=layer_scale_init)
    batches = [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    gradients = []
    for tokens in (vit.forward_packed(batches), [vit.forward_tokens(x) for x in batches]):
        vit.zero_grad()
        sum(t.square().sum() for t in tokens).backward()
        gradients.append({n: p.grad.clone() for n, p in vit.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        # Gradients are summed over other groups of tokens in float32.
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_stochastic_depth_drops_whole_images_as_often_as_stated():
    # 0 in the first block, 0.5 in the second.
    vit = encoder(depth=2, drop_path_rate=0.5).train()
    with torch.no_grad():
        for block in vit.blocks:
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    images = torch.randn(1, 3, 16, 16).expand(400, -1, -1, -1)
    (one, two) = vit.forward_packed([images, torch.randn(200, 3, 32, 32)], 2)
    before = vit.forward_tokens(images[:1], 1)
    dropped = torch.isclose(one, before).flatten(1).all(1)
    assert 0.4 < dropped.float().mean() < 0.6
    assert two.shape == (200, 16, 24)
    kept = one[~dropped] - before
    torch.testing.assert_close(kept, kept[:1].expand_as(kept))


def computing_all(self, branch, tokens, shapes, kept=None):
    """Stochastic depth by its definition: a factor for the branch of each image."""
    if not (self.training and self.probability):
        return tokens + branch(tokens, shapes)
    factors = torch.zeros(len(tokens)).index_put((kept.rows,), kept.factors)
    out = branch(tokens, shapes)
    return tokens + out * factors.view(-1, *[1] * (out.dim() - 1))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_act_checkpoint": True}])
@pytest.mark.parametrize("rate", [0.7, 0.97])  # the higher rate now and then leaves nothing
def test_skipping_what_is_dropped_changes_no_result(monkeypatch, options, rate, packed):
    vit = encoder(depth=3, drop_path_rate=rate, **options).double().train()
    batches = [torch.randn(2, 3, 32, 32).double(), torch.randn(3, 3, 16, 16).double()]
    results = []
    for skip in (True, False):
        if not skip:
            monkeypatch.setattr(StochasticDepth, "forward", computing_all)
        values = []
        for seed in range(8):  # with images of one size dropped, of both, of none
            torch.manual_seed(seed)
            vit.zero_grad()
            tokens = vit.forward_packed(batches) if packed else [vit.forward_tokens(batches[0])]
            sum(t.square().sum() for t in tokens).backward()
            values += [t.detach() for t in tokens]
            values += [p.grad.clone() for p in vit.parameters() if p.requires_grad]
        results.append(values)
    # Tokens of float32, in products of matrices of other sizes.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"window_size": 2, "depth": 8}, {"use_rel_pos": True}])
def test_what_cannot_be_packed_is_refused(options):
    with pytest.raises(InputError, match="can be packed only"):
        encoder(**options).forward_packed([torch.zeros(1, 3, 32, 32)])


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_each_image_keeps_its_branch_as_often_as_stated(count, rate):
    draws = 3000
    kept = draw_kept_images([rate] * draws, count, None, torch.device("cpu"))
    assert {len(each.rows) for each in kept} == {math.ceil(count * (1 - rate) - 1e-6)}
    total = torch.zeros(count)
    for each in kept:
        assert len(set(each.rows.tolist())) == len(each.rows)
        total.index_add_(0, each.rows, each.factors)
    # The mean of the factors is 1; its deviation is that of a binomial share, six times here.
    deviation = (rate / (1 - rate) / draws) ** 0.5
    torch.testing.assert_close(total / draws, torch.ones(count), rtol=0, atol=6 * deviation)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
)
def test_rows_are_whole_images(counts, rate):
    shapes, total = tuple(counts), sum(count * length for count, length in counts)
    every = torch.arange(total)
    owners = torch.arange(sum(count for count, _ in counts)).repeat_interleave(
        torch.tensor([length for count, length in counts for _ in range(count)])
    )
    for kept in draw_kept_images([rate, rate / 2], 0, shapes, torch.device("cpu")):
        chosen = owners[kept.rows]
        assert torch.equal(kept.rows.sort()[0], every[torch.isin(owners, chosen)])
        lengths = [length for count, length in kept.shapes for _ in range(count)]
        runs, sizes = chosen.unique_consecutive(return_counts=True)
        assert sizes.tolist() == lengths
        assert len(runs) == len(set(runs.tolist()))
