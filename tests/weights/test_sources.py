"""A file in another project's layout gives that project's own features."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, Layout, some, timm_vit
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.weights import build_encoder, open_encoder

names = pytest.mark.parametrize("name", LAYOUTS)


def written(name: str, folder) -> tuple[str, Layout, str]:
    make, which, source = LAYOUTS[name]
    layout = make()
    torch.save(layout.content, folder / "weights.pth")
    return f"{folder / 'weights.pth'}{f'?which={which}' if which else ''}", layout, source


def tokens_of(model, images: Tensor) -> Tensor:
    return model.forward_features(images)[:, model.num_prefix_tokens :]


@names
@torch.no_grad()
def test_the_same_features_as_the_sources_own_model(name, tmp_path):
    path, layout, source = written(name, tmp_path)
    encoder, report = open_encoder(path)
    images = torch.randn(2, 3, *layout.model.patch_embed.img_size)
    expected = tokens_of(layout.model, images)
    assert expected.std() > 0.1  # the comparison is not between zeros
    torch.testing.assert_close(encoder.forward_tokens(images), expected, rtol=1e-4, atol=1e-4)
    assert report.source == source
    assert not encoder.training
    assert report.unused == []


@names
@torch.no_grad()
def test_the_same_features_at_another_size(name, tmp_path):
    """Shrinking one side and stretching the other tells every rule of resampling apart."""
    path, (_, model, rule), _ = written(name, tmp_path)
    patch = model.patch_embed.patch_size[0]
    images = torch.randn(1, 3, 6 * patch, 3 * patch)
    table = model.pos_embed[0]
    leading = table.shape[0] - 16
    resampled = rule(table[leading:].unflatten(0, (4, 4)), (6, 3))
    model.patch_embed.strict_img_size = False
    model.pos_embed = torch.nn.Parameter(
        torch.cat([table[:leading], resampled.flatten(0, 1)])[None], requires_grad=False
    )
    expected = tokens_of(model, images)
    encoder = build_encoder(path)
    # The source's operations in another order, in float32.
    torch.testing.assert_close(encoder.forward_tokens(images), expected, rtol=1e-4, atol=1e-4)
    encoder.position_offset = 0.3  # a wrong rule shows
    assert (encoder.forward_tokens(images) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_timms_own_resampling(tmp_path):
    model = timm_vit(num_classes=5, dynamic_img_size=True)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    images = torch.randn(1, 3, 96, 48)
    # The source's operations in another order, in float32.
    torch.testing.assert_close(
        build_encoder(str(tmp_path / "a.pth")).forward_tokens(images),
        tokens_of(model, images),
        rtol=1e-4,
        atol=1e-4,
    )


@names
def test_every_name_in_the_file_is_accounted_for(name, tmp_path):
    path, layout, _ = written(name, tmp_path)
    _, report = open_encoder(path)
    state = layout.content
    for key in ("teacher", "model", "state_dict"):
        state = state.get(key, state) if isinstance(state.get(key), dict) else state
    if "?which=student" in path:
        state = layout.content["student"]
    accounted = [n for names in report.matched.values() for n in names.split(", ")]
    assert sorted([*accounted, *report.dropped]) == sorted(state)


def test_safetensors(tmp_path):
    model = timm_vit(num_classes=5)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # The source's operations in another order, in float32.
        torch.testing.assert_close(
            build_encoder(str(tmp_path / "a.safetensors")).forward_tokens(images),
            tokens_of(model, images),
            rtol=1e-4,
            atol=1e-4,
        )


def refusal(content: dict, folder, query: str = "", **changes) -> str:
    torch.save(content, folder / "a.pth")
    with pytest.raises(InputError) as error:
        build_encoder(f"{folder / 'a.pth'}{query}", **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def flat(**extra: Tensor) -> dict:
    return {**timm_vit().state_dict(), **{k.replace("__", "."): v for k, v in extra.items()}}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("blocks.1.attn.q_norm.weight", "normalised queries"),
        ("blocks.0.attn.relative_position_bias_table", "relative position biases"),
        ("norm_pre.weight", "CLIP"),
        ("blocks.0.attn1.qkv.weight", "a plain ViT lacks"),
        ("blocks.1.attn.qkv.lora_A.weight", "merge them"),
        ("patch_embed.norm.weight", "a plain ViT lacks"),
    ],
)
def test_what_the_encoder_does_not_compute_is_refused_by_name(tmp_path, name, says):
    text = refusal(flat() | some(name), tmp_path)
    assert says in text
    assert name in text


def test_timms_packed_swiglu_is_refused(tmp_path):
    model = timm_vit(mlp_layer=SwiGLUPacked, mlp_ratio=4.0)
    assert "SwiGLU" in refusal(model.state_dict(), tmp_path)


def test_a_convolutional_stem_is_refused(tmp_path):
    state = {n: t for n, t in flat().items() if not n.startswith("patch_embed")}
    text = refusal(state | some("patch_embed.proj.0.weight", "patch_embed.proj.1.bias"), tmp_path)
    assert "a plain ViT lacks" in text


def test_other_networks_are_refused(tmp_path):
    for other in (some("layer1.0.conv1.weight"), {"model": some("a")}, {"epoch": 3}, {}):
        assert "no vision transformer in a known layout" in refusal(other, tmp_path)


def test_incomplete_encoders_are_refused(tmp_path):
    for missing in ("pos_embed", "patch_embed.proj.bias", "blocks.1.mlp.fc2.weight", "norm.bias"):
        state = {name: tensor for name, tensor in flat().items() if name != missing}
        refusal(state, tmp_path)
    wrong = flat()
    wrong["pos_embed"] = wrong["pos_embed"][:, :-2]
    assert "make no square" in refusal(wrong, tmp_path)
    wrong["pos_embed"] = torch.randn(192)
    refusal(wrong, tmp_path)


def test_values_that_are_no_weights_are_refused(tmp_path):
    state = timm_vit().state_dict()
    name = "blocks.1.mlp.fc1.weight"
    faulty = {
        "infinite values or NaN": state[name].index_fill(0, torch.tensor(3), float("nan")),
        "torch.int8": state[name].to(torch.int8),
    }
    for says, tensor in faulty.items():
        torch.save({**state, name: tensor}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=f"hold {says}|hold {name} as {says}"):
            build_encoder(str(tmp_path / "a.pth"))


def test_a_student_where_there_is_none(tmp_path):
    text = refusal(flat(), tmp_path, "?which=student")
    assert "hold no set of encoder weights 'student'; leave which=student out" in text


def test_heads_that_nothing_tells(tmp_path):
    state = timm_vit(embed_dim=96).state_dict()
    assert "give num_heads" in refusal(state, tmp_path)
    torch.save(state, tmp_path / "a.pth")
    encoder = build_encoder(str(tmp_path / "a.pth"), num_heads=3)
    assert encoder.architecture["num_heads"] == 3


@torch.no_grad()
def test_moco_v3_in_deits_layout_takes_the_heads_that_are_given(tmp_path):
    model = timm_vit(embed_dim=384, depth=1, num_heads=12)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    encoder, report = open_encoder(str(tmp_path / "a.pth"), num_heads=12)
    images = torch.randn(1, 3, 64, 64)
    # The source's operations in another order, in float32.
    torch.testing.assert_close(
        encoder.forward_tokens(images), tokens_of(model, images), rtol=1e-4, atol=1e-4
    )
    assert "num_heads=12" in report.note


def test_heads_that_are_given_win_over_the_usual_number(tmp_path):
    path, _, _ = written("MoCo v3", tmp_path)
    assert build_encoder(path, num_heads=6).architecture["num_heads"] == 6


def test_windows_need_the_class_token_dropped(tmp_path):
    assert "set num_prefix_tokens=0" in refusal(flat(), tmp_path, window_size=2)
    encoder, report = open_encoder(str(tmp_path / "a.pth"), window_size=2, num_prefix_tokens=0)
    assert encoder.num_prefix_tokens == 0
    assert "num_prefix_tokens=0" in report.dropped["cls_token"]


def test_unknown_weights_outside_the_encoder_are_listed(tmp_path, caplog):
    torch.save(flat() | some("surprise.weight"), tmp_path / "a.pth")
    _, report = open_encoder(str(tmp_path / "a.pth"))
    assert report.unused == ["surprise.weight"]
    assert "not used: surprise.weight" in caplog.text
