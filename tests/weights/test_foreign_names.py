"""Files in the names of transformers, Flax and Segment Anything give timm's features.

The files are made by undoing the conversion by hand: the names and shapes are those of the
libraries' own modules, and every weight is random.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from layouts import (
    WIDTH,
    prefixed,
    randomised,
    table_antialiased,
    table_by_size,
    timm_vit,
)
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.weights import build_encoder, open_encoder, read_weights

HEADS, DEPTH = WIDTH["num_heads"], WIDTH["depth"]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Compare tokens of two implementations in float32, which differ by rounding alone."""
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def as_transformers(model: VisionTransformer, dinov2: bool) -> dict[str, Tensor]:
    state = model.state_dict()
    layer = {
        "attn.proj.": "attention.output.dense.",
        "norm1.": "norm1." if dinov2 else "layernorm_before.",
        "norm2.": "norm2." if dinov2 else "layernorm_after.",
        "mlp.fc1.": "mlp.fc1." if dinov2 else "intermediate.dense.",
        "mlp.fc2.": "mlp.fc2." if dinov2 else "output.dense.",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    }
    out = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            _, number, _, _, kind = name.split(".")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"encoder.layer.{number}.attention.attention.{part}.{kind}"] = rows.clone()
        elif name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            old = next(old for old in layer if rest.startswith(old))
            out[f"encoder.layer.{number}.{layer[old]}{rest[len(old) :]}"] = tensor
        else:
            old = next(old for old in top if name.startswith(old))
            out[f"{top[old]}{name[len(old) :]}"] = tensor
    return out


def tokens_at(model: VisionTransformer, images: Tensor, rule) -> Tensor:
    """Compute timm's tokens with positions that the rule has resampled."""
    grid = tuple(side // model.patch_embed.patch_size[0] for side in images.shape[-2:])
    table = model.pos_embed[0]
    leading = len(table) - 16
    resampled = rule(table[leading:].unflatten(0, (4, 4)), grid).flatten(0, 1)
    model.patch_embed.strict_img_size = False
    model.pos_embed = torch.nn.Parameter(torch.cat([table[:leading], resampled])[None])
    return model.forward_features(images)[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("prefix", ["", "vit.", "dinov2."])
@pytest.mark.parametrize("dinov2", [False, True])
@torch.no_grad()
def test_transformers(tmp_path, prefix, dinov2):
    options = {"patch_size": 14, "init_values": 0.1} if dinov2 else {}
    model = timm_vit(56 if dinov2 else 64, **options)
    state = prefixed(prefix, as_transformers(model, dinov2))
    if prefix:
        state |= {"classifier.weight": torch.ones(2, 192), "classifier.bias": torch.ones(2)}
    elif not dinov2:
        state |= {"pooler.dense.weight": torch.ones(2)}
    torch.save(state, tmp_path / "a.pth")
    encoder, report = open_encoder(str(tmp_path / "a.pth"))
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    assert_same(encoder.forward_tokens(images), model.forward_features(images)[:, 1:])
    accounted = [n for names in report.matched.values() for n in names.split(", ")]
    assert sorted([*accounted, *report.dropped]) == sorted(state)
    assert (report.source, report.unused) == ("transformers", [])
    patch = encoder.patch_size
    images = torch.randn(1, 3, 6 * patch, 3 * patch)
    assert_same(encoder.forward_tokens(images), tokens_at(model, images, table_by_size))


@torch.no_grad()
def test_transformers_dinov2_with_registers(tmp_path):
    model = timm_vit(56, patch_size=14, init_values=0.1, reg_tokens=4, no_embed_class=True)
    registers = model.state_dict()["reg_token"]
    plain = {n: t for n, t in model.state_dict().items() if n != "reg_token"}
    position = torch.randn(1, 1, 192)
    plain["cls_token"] = plain["cls_token"] - position
    plain["pos_embed"] = torch.cat([position, plain["pos_embed"]], dim=1)

    class Plain:
        def state_dict(self):
            return plain

    state = as_transformers(Plain(), dinov2=True)
    state |= {"embeddings.register_tokens": registers, "embeddings.mask_token": torch.ones(1, 192)}
    torch.save(state, tmp_path / "a.pth")
    encoder = build_encoder(str(tmp_path / "a.pth"))
    images = torch.randn(1, 3, 56, 56)
    assert_same(encoder.forward_tokens(images), model.forward_features(images)[:, 5:])
    images = torch.randn(1, 3, 6 * 14, 3 * 14)
    assert_same(encoder.forward_tokens(images), tokens_at(model, images, table_antialiased))


def test_what_else_transformers_writes_is_refused_by_name(tmp_path):
    state = as_transformers(timm_vit(), dinov2=False)
    for name, says in (
        ("encoder.layer.0.mlp.weights_in.weight", "SwiGLU"),
        ("embeddings.detection_tokens", "a plain ViT lacks"),
        ("encoder.layer.0.lambda_1", "a plain ViT lacks"),
    ):
        torch.save(state | {name: torch.ones(2)}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=says) as error:
            build_encoder(str(tmp_path / "a.pth"))
        assert name in str(error.value)
    del state["encoder.layer.1.attention.attention.key.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"attention\.attention\.query\.bias"):
        build_encoder(str(tmp_path / "a.pth"))


def as_flax(model: VisionTransformer, big_vision: bool, stacked: bool = False) -> dict:
    """Make the arrays of google-research/vision_transformer, or of big_vision."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    attention, mlp, second = (0, 0, 1) if big_vision else (1, 3, 2)
    root = "params/" if big_vision else ""
    table = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    arrays = {
        "cls": state["cls_token"],
        table: state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((192, 5), "f4"),
        "head/bias": np.zeros(5, "f4"),
    }
    blocks = [{} for _ in range(DEPTH)]
    for i, block in enumerate(blocks):
        old = f"blocks.{i}."
        for norm, number in (("norm1", 0), ("norm2", second)):
            block[f"LayerNorm_{number}/scale"] = state[f"{old}{norm}.weight"]
            block[f"LayerNorm_{number}/bias"] = state[f"{old}{norm}.bias"]
        for number in (0, 1):
            dense = f"MlpBlock_{mlp}/Dense_{number}/"
            block[f"{dense}kernel"] = state[f"{old}mlp.fc{number + 1}.weight"].T
            block[f"{dense}bias"] = state[f"{old}mlp.fc{number + 1}.bias"]
        product = f"MultiHeadDotProductAttention_{attention}/"
        weights = np.split(state[f"{old}attn.qkv.weight"], 3)
        biases = np.split(state[f"{old}attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            block[f"{product}{part}/kernel"] = weight.T.reshape(192, HEADS, -1)
            block[f"{product}{part}/bias"] = bias.reshape(HEADS, -1)
        block[f"{product}out/kernel"] = state[f"{old}attn.proj.weight"].T.reshape(HEADS, -1, 192)
        block[f"{product}out/bias"] = state[f"{old}attn.proj.bias"]
    for name in blocks[0]:
        if stacked:
            stack = np.stack([block[name] for block in blocks])
            arrays[f"Transformer/encoderblock/{name}"] = stack
        else:
            for i, block in enumerate(blocks):
                arrays[f"Transformer/encoderblock_{i}/{name}"] = block[name]
    return {f"{root}{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize(("big_vision", "stacked"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_flax(tmp_path, big_vision, stacked):
    model = timm_vit()
    arrays = as_flax(model, big_vision, stacked)
    np.savez(tmp_path / "a.npz", **arrays)
    theirs = timm_vit()
    theirs.load_pretrained(str(tmp_path / "a.npz"))  # timm's own conversion
    images = torch.randn(1, 3, 64, 64)
    encoder, report = open_encoder(str(tmp_path / "a.npz"))
    assert_same(encoder.forward_tokens(images), theirs.forward_features(images)[:, 1:])
    assert_same(encoder.forward_tokens(images), model.forward_features(images)[:, 1:])
    assert report.source == "Flax"
    assert report.unused == []
    assert encoder.position_antialias


def test_numpy_archives_with_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"embedding/kernel": np.array([{}], dtype=object)})
    with pytest.raises(InputError, match="which only running code"):
        read_weights(str(tmp_path / "a.npz"))


def test_bfloat16_of_jax(tmp_path):
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    np.savez(tmp_path / "a.npz", w=values.view(torch.int16).numpy().view("V2"))
    assert torch.equal(read_weights(str(tmp_path / "a.npz"))["w"], values)


def test_a_healthy_archive_of_an_unfinished_model_is_not_called_damaged(tmp_path):
    arrays = {"embedding/kernel": np.zeros((16, 16, 3, 8)), "cls": np.zeros((1, 1, 8))}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match="hold no vision transformer") as error:
        build_encoder(str(tmp_path / "a.npz"))
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("original", [False, True])
@torch.no_grad()
def test_segment_anything(tmp_path, original):
    model = randomised(
        VisionTransformerSAM(
            img_size=128, embed_dim=64, num_heads=2, depth=4, window_size=3,
            use_rel_pos=True, global_attn_indexes=(1, 3), neck_chans=8, num_classes=0,
        )
    )  # fmt: skip
    state = dict(model.state_dict())
    if original:
        state = prefixed("image_encoder.", state)
        state = {name.replace("mlp.fc", "mlp.lin"): tensor for name, tensor in state.items()}
        state["mask_decoder.iou_token.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "a.pth")
    encoder, report = open_encoder(str(tmp_path / "a.pth"))
    for size in ((128, 128), (96, 160)):
        images = torch.randn(1, 3, *size)
        model.patch_embed.strict_img_size = False
        tokens = model.patch_embed(images)
        tokens = tokens + resample_abs_pos_embed_nhwc(model.pos_embed, tokens.shape[1:3])
        expected = model.blocks(tokens).flatten(1, 2)
        assert_same(encoder.forward_tokens(images), expected)
    known = encoder.architecture
    assert (known["window_size"], known["global_block_indexes"]) == (3, [1, 3])
    assert (known["num_heads"], known["final_norm"]) == (2, False)
    assert report.source == "image encoder of Segment Anything"
    assert report.unused == []
    accounted = [n for names in report.matched.values() for n in names.split(", ")]
    assert sorted([*accounted, *report.dropped]) == sorted(state)


def as_mmpretrain(model: VisionTransformer, in_segmenter: bool) -> dict[str, Tensor]:
    """Make the state dict of mmpretrain, or of mmsegmentation, whose attention is PyTorch's."""
    out = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            ("blocks.", "layers."),
            ("norm1.", "ln1."),
            ("norm2.", "ln2."),
            ("patch_embed.proj", "patch_embed.projection"),
            ("mlp.fc1", "ffn.layers.0.0"),
            ("mlp.fc2", "ffn.layers.1"),
            *(
                [("attn.qkv.", "attn.attn.in_proj_"), ("attn.proj", "attn.attn.out_proj")]
                if in_segmenter
                else []
            ),
            ("ls1.gamma", "attn.gamma1.weight"),
            ("ls2.gamma", "ffn.gamma2.weight"),
        ):
            name = name.replace(old, new)
        out[name.replace("norm.", "ln1.") if name.startswith("norm.") else name] = tensor
    return prefixed("backbone.", out)


def as_torchvision(model: VisionTransformer) -> dict[str, Tensor]:
    out = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            ("blocks.", "encoder.layers.encoder_layer_"),
            ("norm1", "ln_1"),
            ("norm2", "ln_2"),
            ("patch_embed.proj", "conv_proj"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.3"),
            ("attn.qkv.", "self_attention.in_proj_"),
            ("attn.proj", "self_attention.out_proj"),
            ("cls_token", "class_token"),
            ("pos_embed", "encoder.pos_embedding"),
        ):
            name = name.replace(old, new)
        out[name.replace("norm.", "encoder.ln.") if name.startswith("norm.") else name] = tensor
    return out | {"heads.head.weight": torch.ones(2)}


@pytest.mark.parametrize("layout", ["mmpretrain", "mmsegmentation", "torchvision"])
@torch.no_grad()
def test_openmmlab_and_torchvision(tmp_path, layout):
    model = timm_vit(**({"init_values": 0.1} if layout == "mmpretrain" else {}))
    if layout == "torchvision":
        state = as_torchvision(model)
    else:
        state = as_mmpretrain(model, layout == "mmsegmentation")
        state["head.fc.weight"] = torch.ones(2)
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "a.pth")
    encoder, report = open_encoder(str(tmp_path / "a.pth"))
    images = torch.randn(1, 3, 64, 64)
    assert_same(encoder.forward_tokens(images), model.forward_features(images)[:, 1:])
    accounted = [n for names in report.matched.values() for n in names.split(", ")]
    assert sorted([*accounted, *report.dropped]) == sorted(state)


def test_what_lies_beside_a_file_of_transformers_is_heeded(tmp_path):
    state = as_transformers(timm_vit(), dinov2=False)
    torch.save(state, tmp_path / "a.pth")
    config = {"hidden_size": 192, "num_attention_heads": 12, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(half))
    encoder = build_encoder(str(tmp_path / "a.pth"))
    assert encoder.architecture["num_heads"] == 12
    assert encoder.input_format.mean == (127.5,) * 3
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match="lack the blocks 2, 3 of 4"):
        build_encoder(str(tmp_path / "a.pth"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 5}))
    assert build_encoder(str(tmp_path / "a.pth")).architecture["num_heads"] == 3
