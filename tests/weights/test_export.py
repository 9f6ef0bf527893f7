"""Encoders written for timm, safetensors and Detectron2 are the same encoders there."""

from __future__ import annotations

import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from layouts import randomised
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import FLSLCheckpointer, build_encoder
from flsl_d2.weights.writing import timm_arguments, timm_call, write_encoder, write_timm

SMALL = {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3}
variants = pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_prefix_tokens": 1, "position_offset": 0.0, "position_antialias": True},
        {"num_prefix_tokens": 5, "layer_scale_init": 0.2},
        {"final_norm": False, "qkv_bias": False, "mlp_ratio": 2.0},
        {"patch_size": 8, "in_chans": 4},
    ],
)


def encoder_with(**options) -> FLSLViT:
    return randomised(FLSLViT(**{**SMALL, **options}))


@variants
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_timm_loads_strictly_and_gives_the_same_tokens(tmp_path, options, suffix):
    encoder = encoder_with(**options)
    path = tmp_path / f"timm{suffix}"
    write_timm(encoder, path)
    scope: dict = {}
    exec(f"import safetensors.torch, timm, torch\n{timm_call(encoder, path)}", scope)
    model = scope["model"].eval()
    images = torch.randn(2, options.get("in_chans", 3), 64, 64)
    expected = encoder.forward_tokens(images)
    assert expected.std() > 0.1
    got = model.forward_features(images)[:, model.num_prefix_tokens :]
    # timm's operations in another order, in float32.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_timm_at_another_size(tmp_path):
    encoder = encoder_with(num_prefix_tokens=1, position_offset=0.0, position_antialias=True)
    write_timm(encoder, tmp_path / "a.pth")
    arguments = timm_arguments(encoder) | {"dynamic_img_size": True}
    model = timm.create_model("vit_small_patch16_224", **arguments).eval()
    model.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    images = torch.randn(1, 3, 96, 48)
    # timm's operations in another order, in float32.
    torch.testing.assert_close(
        model.forward_features(images)[:, 1:],
        encoder.forward_tokens(images),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "options", [{"window_size": 2, "global_block_indexes": (1,)}, {"use_rel_pos": True}]
)
def test_what_timm_does_not_have_is_refused(tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        write_timm(encoder_with(**options), tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_prefix_tokens": 2, "layer_scale_init": 0.1},
        {"window_size": 2, "global_block_indexes": (1,), "use_rel_pos": True},
    ],
)
@torch.no_grad()
def test_encoder_files_rebuild_the_encoder(tmp_path, options, suffix):
    encoder = encoder_with(**options)
    path = str(tmp_path / f"encoder{suffix}")
    write_encoder(encoder, path)
    again = build_encoder(path)
    assert again.architecture == encoder.architecture
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(again(images)["last_feat"], encoder(images)["last_feat"])
    model = nn.ModuleDict({"backbone": FLSLViT(**SMALL, **options)})
    FLSLCheckpointer(model).load(path)
    assert torch.equal(model["backbone"].pos_embed, encoder.pos_embed)


def test_a_stock_checkpointer_reads_the_pth_file(tmp_path):
    encoder = encoder_with(num_prefix_tokens=1)
    write_encoder(encoder, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=True)
    model = nn.ModuleDict({"backbone": FLSLViT(**SMALL, window_size=2)})
    DetectionCheckpointer(model).load(str(tmp_path / "a.pth"))
    for name, tensor in model["backbone"].state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name])


@torch.no_grad()
def test_a_timm_file_comes_back(tmp_path):
    encoder = encoder_with(num_prefix_tokens=5, layer_scale_init=0.2)
    write_timm(encoder, tmp_path / "a.safetensors")
    again = build_encoder(str(tmp_path / "a.safetensors"), num_heads=3)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again.forward_tokens(images), encoder.forward_tokens(images))


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    encoder = encoder_with()
    with pytest.raises(InputError, match=r"use \.pth or \.safetensors"):
        write_encoder(encoder, tmp_path / "a.pkl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_encoder(encoder, tmp_path / "file" / "a.pth")
    (tmp_path / "a.pth").write_text("before")

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write_encoder(encoder, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "file"]
