"""FLSLViT against Detectron2's own ViT, and the switches that neither shares."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest
import torch
from detectron2.modeling.backbone.vit import ViT
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.attention import window_key_mask
from flsl_d2.modeling.vit import evenly_spread_blocks
from pretrain.studies.benchmark.measuring import stored_for_backward

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}


def pair_of_vits(window_size, use_rel_pos, class_token=True, **options):
    """Detectron2's ViT, far from its initialisation, and ours with its weights."""
    theirs = ViT(
        img_size=128,
        pretrain_img_size=128,
        pretrain_use_cls_token=class_token,
        window_size=window_size,
        window_block_indexes=(0, 2),
        use_rel_pos=use_rel_pos,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **SMALL,
    ).eval()
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "rel_pos" in name else 0.1)
    ours = FLSLViT(
        img_size=128,
        window_size=window_size,
        global_block_indexes=(1, 3),
        use_rel_pos=use_rel_pos,
        final_norm=False,
        position_offset=0.0,
        **SMALL,
        **options,
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("size", [(128, 128), (64, 176), (240, 112)])
@pytest.mark.parametrize("use_rel_pos", [False, True])
@pytest.mark.parametrize("window_size", [0, 3])
@torch.no_grad()
def test_equals_detectron2(window_size, use_rel_pos, size):
    theirs, ours = pair_of_vits(window_size, use_rel_pos)
    images = torch.randn(2, 3, *size)
    expected = theirs(images)["last_feat"]
    # Fused attention sums in another order than Detectron2's, in float32 through all blocks.
    torch.testing.assert_close(ours(images)["last_feat"], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05  # the comparison is not between zeros


@torch.no_grad()
def test_relative_positions_and_windows_matter():
    """The equality above would mean nothing if the switches changed nothing."""
    images = torch.randn(1, 3, 64, 96)
    results = [pair_of_vits(w, r)[1](images)["last_feat"] for w in (0, 3) for r in (False, True)]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().max() > 1e-3


@torch.no_grad()
def test_masked_padding_sees_real_tokens_only():
    """With padding masked, a window that is cut off gives what a smaller window would."""
    _, ours = pair_of_vits(3, False, mask_window_padding=True)
    _, plain = pair_of_vits(3, False)
    plain.load_state_dict(ours.state_dict())
    divisible, padded = torch.randn(1, 3, 96, 48), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(divisible)["last_feat"], plain(divisible)["last_feat"])
    assert (ours(padded)["last_feat"] - plain(padded)["last_feat"]).abs().max() > 1e-4
    mask = window_key_mask(1, (4, 4), 3, torch.device("cpu")).view(2, 2, 3, 3)
    assert mask[0, 0].all()
    assert mask[1, 1].sum() == 1
    assert mask[0, 1, :, 0].all()
    assert not mask[0, 1, :, 1:].any()


@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"use_rel_pos": True}])
@pytest.mark.parametrize("what", ["blocks", "gelu"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputing_changes_memory_only(precision, what, options):
    images = torch.randn(1, 3, 64, 64)
    gradients, kept = [], []
    for use in (False, True):
        torch.manual_seed(0)
        model = FLSLViT(
            img_size=64, use_act_checkpoint=use and what == "blocks", **SMALL, **options
        ).train()
        for block in model.blocks:
            block.mlp.recompute = use and what == "gelu"
        kept.append(stored_for_backward(lambda: model.forward_tokens(images), model))  # noqa: B023
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            tokens = model.forward_tokens(images)
        tokens.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype == torch.float32
        # The same operations; sums of a backward pass may be rounded in another order.
        tolerance = 1e-5 if precision == torch.float32 else 0.02
        assert (a - b).norm() <= tolerance * a.norm()
    assert kept[1] < 0.9 * kept[0]


def test_recomputing_the_gelu_repeats_no_matrix_product():
    images, operations = torch.randn(1, 3, 64, 64), []
    for use in (False, True):
        model = FLSLViT(img_size=64, **SMALL).train()
        for block in model.blocks:
            assert block.mlp.recompute, "the default"
            block.mlp.recompute = use
        with FlopCounterMode(display=False) as counter:
            model.forward_tokens(images).sum().backward()
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1]


def test_every_parameter_is_initialised():
    model = FLSLViT(img_size=64, use_rel_pos=True, layer_scale_init=0.1, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters()
    assert [n for n, p in model.named_parameters() if not torch.isfinite(p).all()] == []


def test_forward_tokens_is_the_map_row_major():
    model = FLSLViT(img_size=64, **SMALL).eval()
    images = torch.randn(2, 3, 48, 80)
    tokens = model.forward_tokens(images)
    assert tokens.shape == (2, 15, 48)
    # The same operations, so the same bits.
    torch.testing.assert_close(
        tokens, model(images)["last_feat"].flatten(2).transpose(1, 2), rtol=0, atol=0
    )
    unnormed = model.forward_tokens(images, num_blocks=4)
    torch.testing.assert_close(model.final_norm(unnormed), tokens)
    assert model.output_shape()["last_feat"].stride == 16


def test_patch_8_and_stochastic_depth():
    model = FLSLViT(img_size=64, patch_size=8, drop_path_rate=0.3, **SMALL)
    assert model(torch.randn(1, 3, 64, 32))["last_feat"].shape == (1, 48, 8, 4)
    rates = [block.drop_path.probability for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def recorded_graphs():
    """Return a list, and a backend of ``torch.compile`` that appends its graphs to it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return graphs, backend


def test_compiled_blocks_share_their_code():
    graphs, backend = recorded_graphs()
    model = FLSLViT(img_size=64, patch_size=8, **{**SMALL, "depth": 6}).eval()
    for block in model.blocks:
        block.compile_in_place(backend)
    model(torch.randn(2, 3, 64, 64))
    assert len(graphs) == 1


def test_blocks_under_stochastic_depth_are_compiled_for_any_number_of_images(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **options: compiled.append(options))
    model = FLSLViT(img_size=64, patch_size=8, drop_path_rate=0.5, **SMALL)
    for training in (True, False):
        model.train(training).compile_blocks(mode="reduce-overhead")
    assert all(each["mode"] == "reduce-overhead" for each in compiled)
    # In training the first block drops nothing.
    assert [each["dynamic"] for each in compiled] == [False, *[True] * 3, *[False] * 4]


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_see_any_number_of_images(packed):
    graphs, backend = recorded_graphs()
    torch.manual_seed(0)
    model = FLSLViT(img_size=64, patch_size=8, drop_path_rate=0.5, **{**SMALL, "depth": 6}).train()
    batches = [torch.randn(9, 3, 64, 64), torch.randn(12, 3, 32, 32)]
    results = []
    for compiled in (False, True):
        for block in model.blocks[1:] if compiled else ():  # the first block drops nothing
            block.compile_in_place(backend)
        for seed in range(8):
            torch.manual_seed(seed)
            results.append(model.forward_packed(batches) if packed else model(batches[0]))
    torch.testing.assert_close(results[:8], results[8:])
    assert len(graphs) <= 2  # for all blocks; another where a block leaves out no image


def test_what_is_dropped_is_not_computed():
    model = FLSLViT(img_size=64, patch_size=8, drop_path_rate=0.8, **SMALL)
    images = torch.randn(64, 3, 64, 64)
    operations = []
    for training in (True, False):
        with FlopCounterMode(display=False) as counter:
            model.train(training)(images)
        operations.append(counter.get_total_flops())
    assert operations[0] < 0.75 * operations[1]  # branches are left out with 0.4 on average


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (3, (0, 1, 2))]
)
def test_global_blocks_are_spread_evenly(depth, expected):
    assert evenly_spread_blocks(depth) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 100}, "img_size is 100"),
        ({"embed_dim": 50}, "3 heads do not divide"),
        ({"global_block_indexes": (4,)}, "blocks 0 to 3"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        FLSLViT(**{**SMALL, **arguments})


def test_images_that_patches_do_not_divide():
    with pytest.raises(InputError, match="70 x 64"):
        FLSLViT(img_size=64, **SMALL)(torch.zeros(1, 3, 70, 64))


class TestLoading:
    """A full set of weights, counted aloud, or an error: also when nothing is strict."""

    def test_says_how_many(self, caplog):
        model = FLSLViT(img_size=64, **SMALL)
        with caplog.at_level(logging.INFO, logger="detectron2.flsl_d2"):
            model.load_state_dict(model.state_dict())
        assert f"{len(model.state_dict())} of {len(model.state_dict())} matched" in caplog.text

    @pytest.mark.parametrize("dropped", ["blocks.1.mlp.fc1.weight", "final_norm.bias"])
    def test_a_missing_weight_is_an_error_though_not_strict(self, dropped):
        model = FLSLViT(img_size=64, **SMALL)
        state = {k: v for k, v in model.state_dict().items() if k != dropped}
        with pytest.raises(RuntimeError, match=dropped.replace(".", r"\.")):
            model.load_state_dict(state, strict=False)

    def test_another_width_is_named(self):
        state = FLSLViT(img_size=64, embed_dim=96, depth=4, num_heads=3).state_dict()
        with pytest.raises(RuntimeError, match=r"embed_dim=96, .* embed_dim=48; call"):
            FLSLViT(img_size=64, **SMALL).load_state_dict(state, strict=False)

    def test_another_grid_is_resampled(self):
        large, small = FLSLViT(img_size=128, **SMALL), FLSLViT(img_size=64, **SMALL)
        small.load_state_dict(large.state_dict())
        assert small.pos_embed.shape == (1, 16, 48)
        # The coordinates of the smaller grid lie between those of the larger.
        assert small.pos_embed.min() >= large.pos_embed.min() - 0.2

    def test_published_name_of_the_norm(self):
        model, other = FLSLViT(img_size=64, **SMALL), FLSLViT(img_size=64, **SMALL)
        nn.init.normal_(model.final_norm.weight)
        state = {k.replace("final_norm", "norm"): v for k, v in model.state_dict().items()}
        other.load_state_dict(state)
        assert torch.equal(other.final_norm.weight, model.final_norm.weight)


class TestPrefixTokens:
    """Tokens that take part in attention and are not in the output."""

    @torch.no_grad()
    def test_equals_a_transformer_with_a_class_token_and_registers(self):
        theirs = VisionTransformer(
            img_size=64, num_classes=0, reg_tokens=2, no_embed_class=True, **SMALL
        ).eval()
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.2)
        ours = FLSLViT(img_size=64, num_prefix_tokens=3, **SMALL).eval()
        state = theirs.state_dict()
        state["prefix_tokens"] = torch.cat([state.pop("cls_token"), state.pop("reg_token")], dim=1)
        ours.load_state_dict(state)
        images = torch.randn(2, 3, 64, 64)
        expected = theirs.forward_features(images)[:, 3:]
        # timm's operations in another order, in float32 through all blocks.
        torch.testing.assert_close(ours.forward_tokens(images), expected, rtol=1e-4, atol=1e-4)
        tokens_alone = FLSLViT(img_size=64, **SMALL).eval()
        tokens_alone.load_state_dict(state, strict=False)
        assert (tokens_alone.forward_tokens(images) - expected).abs().max() > 1e-2

    def test_maps_of_any_shape_and_intermediate_blocks(self):
        model = FLSLViT(img_size=64, num_prefix_tokens=2, **SMALL).eval()
        images = torch.randn(1, 3, 48, 80)
        assert model(images)["last_feat"].shape == (1, 48, 3, 5)
        unnormed = model.forward_tokens(images, num_blocks=4)
        torch.testing.assert_close(model.final_norm(unnormed), model.forward_tokens(images))

    @pytest.mark.parametrize("other", [{"window_size": 2}, {"use_rel_pos": True}])
    def test_have_no_place_in_windows_or_relative_positions(self, other):
        with pytest.raises(InputError, match="num_prefix_tokens is 1"):
            FLSLViT(num_prefix_tokens=1, **SMALL, **other)

    def test_are_trained_and_initialised(self):
        model = FLSLViT(img_size=64, num_prefix_tokens=2, **SMALL)
        model.forward_tokens(torch.randn(1, 3, 64, 64)).sum().backward()
        assert model.prefix_tokens.grad.abs().sum() > 0
        assert 0 < model.prefix_tokens.std() < 0.1

    def test_leave_no_trace_where_there_are_none(self):
        assert not [n for n in FLSLViT(**SMALL).state_dict() if "prefix" in n]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_prefix_tokens": 2, "layer_scale_init": 0.5},
        {"window_size": 2, "use_rel_pos": True, "rel_pos_img_size": 128, "final_norm": False},
        {"window_size": 3, "mask_window_padding": True, "global_block_indexes": (0,)},
        {"position_offset": 0.0, "position_antialias": True, "mlp_ratio": 3.0, "qkv_bias": False},
    ],
)
@torch.no_grad()
def test_the_architecture_rebuilds_the_encoder(arguments):
    model = FLSLViT(img_size=64, **SMALL, **arguments).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    again = FLSLViT(**json.loads(json.dumps(model.architecture))).eval()
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 48, 80)
    assert torch.equal(model(images)["last_feat"], again(images)["last_feat"])
    assert again.architecture == model.architecture


@pytest.mark.parametrize(("offset", "antialias"), [(0.1, False), (0.0, False), (0.0, True)])
@torch.no_grad()
def test_a_table_loaded_into_another_grid_is_the_one_of_images_of_that_size(offset, antialias):
    options = {"position_offset": offset, "position_antialias": antialias, **SMALL}
    large, small = FLSLViT(img_size=128, **options).eval(), FLSLViT(img_size=64, **options).eval()
    nn.init.normal_(large.pos_embed)
    small.load_state_dict(large.state_dict())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(small.forward_tokens(images), large.forward_tokens(images))


class TestPositions:
    """Positions of a pass: those of the table, or none."""

    def test_without_any_patches_do_not_know_their_place(self):
        model = FLSLViT(img_size=64, **SMALL).eval()
        tokens = model.forward_tokens(torch.zeros(1, 3, 64, 64), positions="none")
        torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens))
        packed = model.forward_packed([torch.zeros(1, 3, 64, 64)], positions="none")[0]
        torch.testing.assert_close(packed, tokens)
