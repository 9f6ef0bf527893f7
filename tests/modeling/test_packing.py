"""One pass over images of several sizes equals a pass for each size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.packing import packed_tokens


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
)
def test_equals_size_by_size(shapes, num_blocks):
    vit = encoder().eval()
    batches = [torch.randn(b, 3, 8 * h, 8 * w) for b, h, w in shapes]
    packed = packed_tokens(vit, batches, num_blocks)
    for ours, images in zip(packed, batches, strict=True):
        torch.testing.assert_close(ours, vit.forward_tokens(images, num_blocks))


@pytest.mark.parametrize("use_act_checkpoint", [False, True])
@pytest.mark.parametrize("layer_scale_init", [None, 0.1])
def test_gradients_equal(use_act_checkpoint, layer_scale_init):
    vit = encoder(use_act_checkpoint=use_act_checkpoint, layer_scale_init=layer_scale_init)
    batches = [torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    gradients = []
    for tokens in (packed_tokens(vit, batches), [vit.forward_tokens(x) for x in batches]):
        vit.zero_grad()
        sum(t.square().sum() for t in tokens).backward()
        gradients.append({n: p.grad.clone() for n, p in vit.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("skip", [True, False])
def test_stochastic_depth_drops_whole_images_as_often_as_stated(skip):
    # 0 in the first block, 0.5 in the second.
    vit = encoder(depth=2, drop_path_rate=0.5, skip_dropped=skip).train()
    with torch.no_grad():
        for block in vit.blocks:
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    images = torch.randn(1, 3, 16, 16).expand(400, -1, -1, -1)
    (one, two) = packed_tokens(vit, [images, torch.randn(200, 3, 32, 32)], 2)
    before = vit.forward_tokens(images[:1], 1)
    dropped = torch.isclose(one, before).flatten(1).all(1)
    assert 0.4 < dropped.float().mean() < 0.6
    assert two.shape == (200, 16, 24)
    kept = one[~dropped] - before
    torch.testing.assert_close(kept, kept[:1].expand_as(kept))


def test_skipping_what_is_dropped_changes_no_result():
    vit = encoder(depth=3, drop_path_rate=0.7).double().train()
    batches = [torch.randn(2, 3, 32, 32).double(), torch.randn(3, 3, 16, 16).double()]
    results = []
    for skip in (True, False):
        for block in vit.blocks:
            block.drop_path.skip_dropped = skip
        of_runs = []
        for seed in range(8):  # with images of one size dropped, of both, of none
            torch.manual_seed(seed)
            vit.zero_grad()
            tokens = packed_tokens(vit, batches)
            sum(t.square().sum() for t in tokens).backward()
            of_runs += [t.detach() for t in tokens]
            of_runs += [p.grad.clone() for p in vit.parameters() if p.requires_grad]
        results.append(of_runs)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"window_size": 2, "depth": 8}, {"use_rel_pos": True}, {"num_prefix_tokens": 1}]
)
def test_what_cannot_be_packed_is_refused(options):
    with pytest.raises(InputError, match="can be packed only"):
        packed_tokens(encoder(**options), [torch.zeros(1, 3, 32, 32)])
