"""A part is never taken for a whole encoder, and a grid never for another one."""

from __future__ import annotations

import argparse

import pytest
import torch
from layouts import prefixed, timm_vit

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import build_encoder, open_encoder


def refusal(content: dict, folder, **changes) -> str:
    torch.save(content, folder / "a.pth")
    with pytest.raises(InputError) as error:
        build_encoder(str(folder / "a.pth"), **changes)
    assert "a.pth" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_blocks_and_a_missing_tail(tmp_path):
    state = timm_vit(depth=4).state_dict()
    middle = {n: t for n, t in state.items() if "blocks.1." not in n and "blocks.2." not in n}
    assert "lack the blocks 1, 2 of 4" in refusal(middle, tmp_path)
    first = {n: t for n, t in state.items() if "blocks.2" not in n and "blocks.3" not in n}
    first = {n: t for n, t in first.items() if not n.startswith("norm.")}
    assert "end after block 1 without a last norm" in refusal(first, tmp_path)
    second = {n: t for n, t in state.items() if "blocks.2" in n or "blocks.3" in n}
    assert "without its patch embedding" in refusal(second, tmp_path)
    bare = FLSLViT(img_size=64, embed_dim=192, depth=2, num_heads=3, final_norm=False)
    assert "final_norm=False" in refusal(bare.state_dict(), tmp_path)
    built = build_encoder(str(tmp_path / "a.pth"), final_norm=False)
    assert not built.architecture["final_norm"]


def test_blocks_that_the_options_promise(tmp_path):
    options = argparse.Namespace(depth=12)
    content = {"model": timm_vit(depth=3).state_dict(), "args": options}
    assert "lack the blocks 3, 4" in refusal(content, tmp_path)
    assert build_encoder(str(tmp_path / "a.pth"), depth=3).depth == 3


@pytest.mark.parametrize("change", [lambda t: t.to(torch.float8_e4m3fn), lambda t: t[..., :64]])
def test_positions_that_cannot_be_added_to_tokens(change, tmp_path):
    state = timm_vit().state_dict()
    refusal({**state, "pos_embed": change(state["pos_embed"])}, tmp_path)


def test_shares_of_processes_and_patches_that_are_not_square(tmp_path):
    state = timm_vit().state_dict()
    assert "DeepSpeed" in refusal({"module": {n: torch.empty(0) for n in state}}, tmp_path)
    wide = state | {"patch_embed.proj.weight": torch.ones(192, 3, 8, 16)}
    assert "patches of 8 x 16 pixels" in refusal(wide, tmp_path)


def strip(class_token: bool = True) -> dict:
    """A trained table of 8 x 32 positions: neighbours are alike."""
    model = timm_vit((32, 128), patch_size=4, class_token=class_token, global_pool="avg")
    state = model.state_dict()
    rows = torch.linspace(0, 3, 8)[:, None, None] * torch.randn(192)
    columns = torch.linspace(0, 3, 32)[None, :, None] * torch.randn(192)
    table = (rows + columns).sin().flatten(0, 1)[None]
    start = torch.zeros(1, int(class_token), 192)
    return state | {"pos_embed": torch.cat([start, table], dim=1)}


@pytest.mark.parametrize("class_token", [True, False])
def test_a_strip_is_not_a_square(tmp_path, class_token):
    state = strip(class_token)
    assert "8 x 32 patches, as neighbours" in refusal(state, tmp_path)
    noise = state | {"pos_embed": torch.randn_like(state["pos_embed"])}
    options = argparse.Namespace(input_size=[32, 128])
    assert "8 x 32 patches, as its options" in refusal({"model": noise, "args": options}, tmp_path)
    built = build_encoder(str(tmp_path / "a.pth"), img_size=64, num_heads=3)
    assert built.architecture["img_size"] == 64
    odd = state | {"pos_embed": state["pos_embed"][:, :-3]}
    assert "make no square" in refusal(odd, tmp_path)


def test_a_class_token_is_no_part_of_a_strip(tmp_path):
    """15 x 17 positions and that of a class token are 256 rows, as 16 x 16 are."""
    state = timm_vit((60, 68), patch_size=4).state_dict()
    content = {"model": state, "config": {"img_size": (60, 68)}}
    assert "15 x 17 patches" in refusal(content, tmp_path)


@pytest.mark.parametrize("file", ["flsl_d2://flsl_vit_mini_p8_small_data.safetensors"])
def test_trained_squares_are_squares(file, tmp_path):
    state = build_encoder(file).state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert build_encoder(str(tmp_path / "a.pth"), num_heads=4).architecture["depth"] > 1


def test_tensors_that_are_no_weights_are_no_set(tmp_path):
    state = timm_vit().state_dict()
    moments = {"exp_avg": {n: t * 0 for n, t in state.items()}}
    torch.save({"model": state, "optimizer": moments, "grads": dict(state)}, tmp_path / "a.pth")
    _, report = open_encoder(str(tmp_path / "a.pth"))
    assert report.other_sets == []


ROLES = [
    (("hematology_encoder", "radiology_encoder"), None),
    (("vit_base", "vit_other"), None),
    (("encoder", "target_encoder"), "target_encoder"),
    (("online_network", "target_network"), "online_network"),
    (("encoder_q", "encoder_k"), "encoder_q"),
    (("student", "modelEMA"), "modelEMA"),
    (("net", "net_averaged"), "net"),
    (("semantic", "momentum"), "semantic"),
]


@pytest.mark.parametrize(("names", "chosen"), ROLES)
def test_roles_are_whole_words(tmp_path, names, chosen):
    models = {name: timm_vit() for name in names}
    content = {}
    for name, model in models.items():
        content |= prefixed(f"{name}.", model.state_dict())
    if chosen is None:
        text = refusal(content, tmp_path)
        assert all(name in text for name in names)
        return
    torch.save(content, tmp_path / "a.pth")
    encoder, report = open_encoder(str(tmp_path / "a.pth"))
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, models[chosen].blocks[0].mlp.fc1.weight)
    assert report.other_sets == [name for name in names if name != chosen]
