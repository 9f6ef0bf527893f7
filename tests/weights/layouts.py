"""Weight files as other projects write them, each with timm's model of the same network.

The layouts are those of the projects' training scripts: which keys, which names, what lies beside
the encoder. Every weight is random, so that nothing but the right place gives the right features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from flsl_d2.modeling.positions import sincos_positions

WIDTH = {"embed_dim": 192, "depth": 2, "num_heads": 3}


class Layout(NamedTuple):
    """A file's content, and the model that it is of."""

    content: dict
    model: nn.Module
    resampling: Callable[[Tensor, tuple[int, int]], Tensor]


def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.15)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            parameter.data += 1
    return model.eval().requires_grad_(False)


def timm_vit(img_size: int = 64, **options) -> VisionTransformer:
    return randomised(
        VisionTransformer(**{"img_size": img_size, "num_classes": 0, **WIDTH, **options})
    )


def table_by_offset(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINO's rule: a scale factor of (n + 0.1) / G along each side."""
    return _interpolated(table, scale_factor=tuple((n + 0.1) / len(table) for n in grid))


def table_by_size(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rule of MAE, DeiT and ViTDet: the size alone."""
    return _interpolated(table, size=grid)


def table_antialiased(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rule of timm and of DINOv2 with registers."""
    return _interpolated(table, size=grid, antialias=True)


def _interpolated(table: Tensor, **options) -> Tensor:
    maps = F.interpolate(table.permute(2, 0, 1)[None], mode="bicubic", **options)
    return maps[0].permute(1, 2, 0)


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def some(*names: str) -> dict:
    return {name: torch.randn(4, 3) for name in names}


def _gammas(state: dict) -> dict:
    """LayerScale by the names of iBOT and DeiT III."""
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in state.items()
    }


def _pair(wanted: str, model: nn.Module, heads: dict, mark: str, **extra) -> dict:
    """A run's checkpoint; the student was wrapped for DDP, the teacher was not."""
    other = randomised(type(model)(img_size=64, num_classes=0, **WIDTH))
    states = {"teacher": other.state_dict(), "student": other.state_dict()}
    states[wanted] = model.state_dict()
    return {
        "student": prefixed("module.", prefixed("backbone.", states["student"]) | heads),
        "teacher": prefixed("backbone.", states["teacher"]) | heads,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16),
        mark: {"center": torch.zeros(1, 8)},
        **extra,
    }


def dino_backbone() -> Layout:
    model = timm_vit()
    return Layout(model.state_dict(), model, table_by_offset)


def _dino(which: str) -> Layout:
    model = timm_vit()
    heads = some("head.mlp.0.weight", "head.last_layer.weight_g")
    return Layout(_pair(which, model, heads, "dino_loss"), model, table_by_offset)


def ibot_teacher() -> Layout:
    model = timm_vit()
    heads = some("head.mlp.0.weight", "head.last_layer2.weight_v")
    content = _pair("teacher", model, heads, "ibot_loss")
    content["student"]["module.backbone.masked_embed"] = torch.randn(1, 192)
    return Layout(content, model, table_by_offset)


def ibot_backbone() -> Layout:
    model = timm_vit(init_values=0.1)
    return Layout({"state_dict": _gammas(model.state_dict())}, model, table_by_offset)


def selfpatch() -> Layout:
    model = timm_vit(class_token=False, global_pool="avg", final_norm=False)
    heads = some("ca_head.cls_token", "ca_head.norm.weight", "c_head.mlp.0.weight", "p_head.x")
    content = _pair("teacher", timm_vit(), heads, "dino_loss")
    content["teacher"] = prefixed("backbone.", model.state_dict()) | heads
    return Layout(content, model, table_by_offset)


def flsl() -> Layout:
    model = timm_vit(class_token=False, global_pool="avg", fc_norm=False)
    model.pos_embed.copy_(sincos_positions(192, 4))
    state = model.state_dict() | {"cls_token": torch.randn(1, 1, 192)}
    content = _pair("teacher", timm_vit(), some("head.mlp.0.weight"), "flsl_loss")
    content["teacher"] = prefixed("backbone.", state) | some("head.mlp.0.weight")
    return Layout(content, model, table_by_offset)


def flsl_backbone() -> Layout:
    content, model, rule = flsl()
    teacher = {n: t for n, t in content["teacher"].items() if n.startswith("backbone.")}
    return Layout({n.removeprefix("backbone."): t for n, t in teacher.items()}, model, rule)


def _moco(wanted: str) -> Layout:
    width = {"embed_dim": 384, "depth": 1, "num_heads": 12}
    model, other = timm_vit(**width), timm_vit(**width)
    for vit in (model, other):
        fixed = sincos_positions(384, 4)
        vit.pos_embed.copy_(torch.cat([torch.zeros(1, 1, 384), fixed], dim=1))
    names = ("base_encoder", "momentum_encoder")
    states = {name: (model if name == wanted else other).state_dict() for name in names}
    state = some("module.predictor.0.weight")
    for name in names:
        state |= prefixed(f"module.{name}.", states[name] | some("head.0.weight"))
    content = {"epoch": 300, "arch": "vit_small", "state_dict": state, "scaler": {"scale": 1.0}}
    return Layout(content, model, table_by_size)


def _dinov2_state(registers: int) -> tuple[dict, VisionTransformer]:
    model = timm_vit(
        56, patch_size=14, init_values=0.1, reg_tokens=registers, no_embed_class=registers > 0
    )
    state = model.state_dict() | {"mask_token": torch.randn(1, 192)}
    if registers:  # the class token alone has a position there, which timm folds into the token
        position = torch.randn(1, 1, 192)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["register_tokens"] = state.pop("reg_token")
    return state, model


def dinov2() -> Layout:
    state, model = _dinov2_state(0)
    return Layout(state, model, table_by_offset)


def dinov2_registers() -> Layout:
    state, model = _dinov2_state(4)
    return Layout(state, model, table_antialiased)


def dinov2_training() -> Layout:
    state, model = _dinov2_state(0)
    chunked = {  # blocks are stored in chunks, by their number in the whole
        name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): tensor
        for name, tensor in state.items()
    }
    heads = some("dino_head.mlp.0.weight", "ibot_head.last_layer.weight_g")
    return Layout({"teacher": prefixed("backbone.", chunked) | heads}, model, table_by_offset)


def mae() -> Layout:
    model = timm_vit()
    return Layout({"model": model.state_dict()}, model, table_by_size)


def mae_with_decoder() -> Layout:
    model = timm_vit()
    decoder = some(
        "mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight"
    )
    return Layout({"model": model.state_dict() | decoder}, model, table_by_size)


def deit() -> Layout:
    model = timm_vit(num_classes=5)
    return Layout({"model": model.state_dict()}, model, table_by_size)


def deit_distilled() -> Layout:
    model = randomised(VisionTransformerDistilled(img_size=64, num_classes=5, **WIDTH))
    return Layout({"model": model.state_dict()}, model, table_by_size)


def deit_3() -> Layout:
    model = timm_vit(num_classes=5, init_values=0.1, no_embed_class=True)
    return Layout({"model": _gammas(model.state_dict())}, model, table_by_size)


def _timm(**options) -> Layout:
    model = timm_vit(**options)
    return Layout(model.state_dict(), model, table_antialiased)


def timm_run() -> Layout:
    content, model, rule = _timm(num_classes=5)
    run = {"epoch": 1, "arch": "vit_tiny_patch16_224", "state_dict": content, "metric": 71.5}
    return Layout(run, model, rule)


LAYOUTS: dict[str, tuple[Callable[[], Layout], str | None, str]] = {
    # name: (content and model, choice of encoder, layout that the report names)
    "DINO backbone": (dino_backbone, None, "DINO backbone or timm"),
    "DINO teacher": (lambda: _dino("teacher"), None, "DINO checkpoint"),
    "DINO student": (lambda: _dino("student"), "student", "DINO checkpoint"),
    "iBOT teacher": (ibot_teacher, "teacher", "iBOT checkpoint"),
    "iBOT backbone": (ibot_backbone, None, "iBOT backbone"),
    "SelfPatch": (selfpatch, None, "SelfPatch checkpoint"),
    "FLSL": (flsl, None, "published FLSL checkpoint"),
    "FLSL backbone": (flsl_backbone, None, "published FLSL backbone"),
    "MoCo v3": (lambda: _moco("base_encoder"), None, "MoCo v3 checkpoint"),
    "MoCo v3 teacher": (lambda: _moco("momentum_encoder"), "teacher", "MoCo v3 checkpoint"),
    "DINOv2": (dinov2, None, "DINOv2"),
    "DINOv2 registers": (dinov2_registers, None, "DINOv2 with registers"),
    "DINOv2 training": (dinov2_training, None, "DINOv2"),
    "MAE": (mae, None, "MAE or DeiT without head"),
    "MAE with decoder": (mae_with_decoder, None, "MAE with its decoder"),
    "DeiT": (deit, None, "DeiT"),
    "DeiT distilled": (deit_distilled, None, "DeiT"),
    "DeiT III": (deit_3, None, "DeiT"),
    "timm": (lambda: _timm(num_classes=5), None, "timm"),
    "timm run": (timm_run, None, "timm checkpoint"),
    "timm mean pooling": (lambda: _timm(num_classes=5, global_pool="avg"), None, "timm"),
    "timm no class token": (
        lambda: _timm(class_token=False, global_pool="avg"),
        None,
        "timm, without class token",
    ),
    "timm registers": (lambda: _timm(reg_tokens=4), None, "timm"),
    "timm registers apart": (lambda: _timm(reg_tokens=4, no_embed_class=True), None, "timm"),
    "timm no bias": (lambda: _timm(num_classes=5, qkv_bias=False, mlp_ratio=2.0), None, "timm"),
}
