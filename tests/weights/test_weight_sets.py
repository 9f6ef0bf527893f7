"""Wrappers, prefixes and containers come off in any order; several sets of weights are named."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import prefixed, randomised, timm_vit
from timm.models.vision_transformer import VisionTransformer

from flsl_d2.errors import InputError
from flsl_d2.weights import open_encoder, read_weights
from flsl_d2.weights.encoder_weights import find_encoder_weights

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PREFIXES = ("encoder.", "model.", "backbone.", "student_model.vit.")
CONTAINERS = ("model_state_dict", "net", "state_dict", "model", "weights")


def tiny() -> VisionTransformer:
    return randomised(VisionTransformer(32, 16, embed_dim=192, depth=1, num_heads=3, num_classes=0))


def tensors_in(content: dict, which: str | None = None) -> dict:
    weights = find_encoder_weights(content, which, "a.pth")
    assert weights is not None
    return weights.tensors


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(WRAPPERS + PREFIXES), max_size=4),
    st.lists(st.sampled_from(CONTAINERS), max_size=3, unique=True),
)
def test_any_stack_of_wrappers_prefixes_and_containers_comes_off(prefixes, containers):
    model = tiny()
    content = prefixed("".join(prefixes), model.state_dict())
    for key in containers:
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}}
    tensors = tensors_in(content)
    assert torch.equal(tensors["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)
    assert torch.equal(tensors["final_norm.bias"], model.norm.bias)
    assert len(tensors) == len(model.state_dict())


def test_wrappers_of_single_blocks_come_off():
    model = tiny()
    state = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): tensor
        for name, tensor in model.state_dict().items()
    }
    tensors = tensors_in(prefixed("_fsdp_wrapped_module.", state))
    assert torch.equal(tensors["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight)


def test_two_tensors_of_one_name_are_refused():
    state = tiny().state_dict()
    with pytest.raises(InputError, match="the same name without their wrappers"):
        find_encoder_weights(state | prefixed("module.", state))


PAIRS = [
    # Two sets as files have them, the names that take them, and the one that is the default.
    (lambda a, b: {"state_dict": a, "state_dict_ema": b}, ("state_dict", "state_dict_ema"), 0),
    (lambda a, b: {"model": a, "model_ema": b, "epoch": 1}, ("model", "model_ema"), 0),
    (lambda a, b: {"model": a, "ema": {"module": b}}, ("model", "ema"), 0),
    (
        lambda a, b: {"state_dict": prefixed("model.", a) | prefixed("ema_model.module.", b)},
        ("model", "ema_model"),
        0,
    ),
    (lambda a, b: {"student": prefixed("module.", a), "teacher": b}, ("student", "teacher"), 1),
    (
        lambda a, b: {"model": prefixed("student.net.", a) | prefixed("teacher.net.", b)},
        ("student", "teacher"),
        1,
    ),
    (
        lambda a, b: prefixed("base_encoder.", a) | prefixed("momentum_encoder.", b),
        ("base_encoder", "momentum_encoder"),
        0,
    ),
    (lambda a, b: {"left": a, "right": b}, ("left", "right"), None),
]


@pytest.mark.parametrize(("layout", "names", "default"), PAIRS)
def test_every_set_of_a_file_is_named_and_can_be_taken(tmp_path, layout, names, default):
    models = [tiny(), tiny()]
    path = str(tmp_path / "a.pth")
    torch.save(layout(*(model.state_dict() for model in models)), path)
    for name, model in zip(names, models, strict=True):
        for encoder, report in (open_encoder(path, name), open_encoder(f"{path}?which={name}")):
            assert torch.equal(encoder.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
            assert report.other_sets == [other for other in names if other != name]
            assert report.other_sets[0] in report.line()
            assert report.other_sets[0] in report.table()
    if default is None:
        with pytest.raises(InputError, match=r"hold 2 sets of encoder weights \(left, right"):
            open_encoder(path)
    else:
        encoder, _ = open_encoder(path)
        expected = models[default].blocks[0].mlp.fc1.weight
        assert torch.equal(encoder.blocks[0].mlp.fc1.weight, expected)
    with pytest.raises(InputError, match=f"use which=NAME with one of {names[0]}, {names[1]}"):
        open_encoder(path, "nosuch")


def test_the_names_of_moco_v3s_encoders_have_synonyms():
    states = [tiny().state_dict(), tiny().state_dict()]
    content = prefixed("base_encoder.", states[0]) | prefixed("momentum_encoder.", states[1])
    for which, state in zip(("student", "teacher"), states, strict=True):
        assert torch.equal(tensors_in(content, which)["pos_embed"], state["pos_embed"][:, 1:])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"state_dict": {"visual.transformer.resblocks.0.ln_1.weight": 0}}, "CLIP"),
        ({"layer1.0.conv1.weight": 0}, "a ResNet"),
        ({"model": {"backbone._flat_param": 0}}, "FSDP"),
        ({"vision_encoder.layers.0.attn.qkv.weight": 0}, "Segment Anything"),
        ({"net": {"strange.weight": 0}}, "1 tensors under 'net': strange.weight"),
        ({"epoch": 3}, "no tensors; keys: epoch"),
    ],
)
def test_what_a_file_holds_instead_is_named(tmp_path, content, says):
    def with_tensors(node):
        if isinstance(node, dict):
            return {key: with_tensors(value) for key, value in node.items()}
        return torch.ones(2) if node == 0 else node

    torch.save(with_tensors(content), tmp_path / "a.pth")
    with pytest.raises(InputError, match="hold no vision transformer in a known layout") as error:
        open_encoder(str(tmp_path / "a.pth"))
    assert says in str(error.value)


def test_a_dinov2_training_run_gives_its_teacher_and_accounts_for_all(tmp_path):
    """The layout of ``model_final.rank_0.pth``: one dict, FSDP's names, blocks in chunks."""
    model = timm_vit(56, patch_size=14, init_values=0.1)
    state = model.state_dict() | {"mask_token": torch.zeros(1, 192)}
    chunked = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in state.items()}
    content = dict(
        itertools.chain(
            prefixed("teacher.backbone.", chunked).items(),
            prefixed("student.backbone.", {n: t + 1 for n, t in chunked.items()}).items(),
        )
    )
    content |= {"teacher.dino_head.mlp.0.weight": torch.ones(2), "dino_loss.center": torch.ones(2)}
    torch.save({"model": content, "iteration": 9}, tmp_path / "a.pth")
    encoder, report = open_encoder(str(tmp_path / "a.pth"))
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        # The same operations in another order of attention: rounding of float32 alone.
        # The source's operations in another order, in float32.
        torch.testing.assert_close(
            encoder.forward_tokens(images),
            model.forward_features(images)[:, 1:],
            rtol=1e-4,
            atol=1e-4,
        )
    accounted = [n for names in report.matched.values() for n in names.split(", ")]
    assert sorted([*accounted, *report.dropped]) == sorted(content)
    assert (report.source, report.unused, report.other_sets) == ("DINOv2", [], ["student"])
    assert len(read_weights(str(tmp_path / "a.pth"))["model"]) == len(content)
