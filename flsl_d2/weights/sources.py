"""Kinds of files with an encoder's weights: one entry for each.

An entry says how the kind is recognised, which tensors are left out and why, and what no tensor
tells: how the source resamples positions, and its number of heads. The layouts are those of the
projects' own code at the addresses that ``docs/CHECKPOINTS.md`` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flsl_d2.modeling.positions import sincos_positions
from flsl_d2.weights.reading import ENCODER_FORMAT
from flsl_d2.weights.weight_sets import WeightSet

KNOWN_LAYOUTS = (
    "this project's own, published FLSL, DINO, iBOT, SelfPatch, MAE, MoCo v3, DINOv2, DeiT, plain "
    "ViTs of timm, transformers, OpenMMLab, torchvision and Flax, Detectron2's ViTDet and Segment "
    "Anything"
)

# How each project resamples its positions for images of another size.
_DINO_POSITIONS = {"position_offset": 0.1, "position_antialias": False}
_SIZED_POSITIONS = {"position_offset": 0.0, "position_antialias": False}
_TIMM_POSITIONS = {"position_offset": 0.0, "position_antialias": True}

# Attention heads of ViT-T, S, B, L, H, g and G in every project here (but MoCo v3's ViT-S), and of
# the further widths that timm's plain ViTs have. At 1536 they disagree.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
USUAL_HEADS = {**_HEADS, 256: 4, 320: 5, 512: 8, 640: 10, 832: 13, 896: 14, 1152: 16}

_PIXELS = (
    "models of this kind differ in the pixels that they expect: most take ImageNet's mean and "
    "standard deviation, as is assumed here, some (augreg, SigLIP) 0.5 and 0.5"
)
_UNUSED_CLASS_TOKEN = {r"cls_token$": "stored by the published code, but unused"}
_HEAD = "the projection head serves pre-training only"


@dataclass(frozen=True)
class Source:
    """The layout of one kind of file.

    Attributes:
        name: name in reports.
        fits: whether a set of weights, by timm's names, is of this source.
        positions: arguments of ``FLSLViT`` for the source's way to resample positions.
        heads: width: number of heads; None where the models of that width disagree.
        dropped: pattern of names under the encoder's prefix that are left out: reason.
        dropped_outside: the same for names outside the prefix.
        architecture_key: key of the file for the arguments of ``FLSLViT``.
        norm: whether encoders of this source end with a norm; None where both occur.
        refusal: the part that ``FLSLViT`` does not compute; empty where it can be read.
        note: advice to users of such a file.
    """

    name: str
    fits: Callable[[WeightSet], bool]
    positions: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[int, int | None] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    dropped_outside: Mapping[str, str] = field(default_factory=dict)
    architecture_key: str = ""
    norm: bool | None = True
    refusal: str = ""
    note: str = ""


def recognise(weights: WeightSet) -> tuple[Source, dict[str, Any]]:
    """Find the first entry of :data:`SOURCES` that fits; the last one fits everything.

    Returns:
        The entry, and the arguments of ``FLSLViT`` that it gives for this file.
    """
    source = next(source for source in SOURCES if source.fits(weights))
    architecture = dict(source.positions)
    qkv = weights.tensors.get("blocks.0.attn.qkv.weight")
    if qkv is not None and qkv.shape[-1] in source.heads:
        architecture["num_heads"] = source.heads[qkv.shape[-1]]
    if source.architecture_key:
        architecture.update(weights.content.get(source.architecture_key) or {})
    return source, architecture


def _is_rotary(file: WeightSet) -> bool:
    """Recognise timm's models with rotary positions: they alone call LayerScale ``gamma_1``."""
    options = file.content.get("args")
    names = [file.content.get("arch"), options.get("model") if isinstance(options, dict) else None]
    if any("rope" in str(name) for name in names):
        return True
    table = file.positions
    from_timm = file.has("blocks.0.gamma_1") and file.has("cls_token") and table is not None
    is_square = table is not None and math.isqrt(table.shape[1]) ** 2 == table.shape[1]
    return from_timm and is_square and file.containers != ("model",)


def _is_post_norm(file: WeightSet) -> bool:
    plain = not file.has("blocks.0.attn.qkv.bias", "blocks.0.ls1.gamma", "cls_token")
    return plain and file.has("fc_norm.weight", "norm.weight") and not file.in_detector


def _is_published_flsl(file: WeightSet) -> bool:
    """Tell whether a class token stands beside fixed positions that leave it no place."""
    table = file.positions
    if not file.has("cls_token") or table is None or table.is_meta or table.shape[-1] % 4:
        return False
    side = math.isqrt(table.shape[1])
    fixed = sincos_positions(table.shape[-1], side)
    # Half precision keeps three decimals.
    return side**2 == table.shape[1] and torch.allclose(table.float(), fixed, atol=1e-3)


def _is_dinov2(file: WeightSet) -> bool:
    return file.has("mask_token") and file.has("blocks.0.ls1.gamma")


def _of_layout(layout: str) -> Callable[[WeightSet], bool]:
    return lambda file: file.layout == layout


_DINO: dict[str, Any] = {"positions": _DINO_POSITIONS, "heads": _HEADS}
_SIZED: dict[str, Any] = {"positions": _SIZED_POSITIONS, "heads": _HEADS}
_TIMM: dict[str, Any] = {"positions": _TIMM_POSITIONS, "heads": USUAL_HEADS, "note": _PIXELS}
_DETECTOR: dict[str, Any] = {
    "dropped_outside": {r"": "belongs to the detector"},
    "norm": None,
    "note": "windows are read off relative positions; a detector without those keeps no trace of "
    "its windows, so give window_size to have them",
}

# The first entry that fits is taken, so the more specific ones stand first.
SOURCES = (
    Source(
        "FLSL encoder of this project",
        lambda file: file.content.get("format") == ENCODER_FORMAT,
        architecture_key="encoder",
    ),
    Source(
        "pre-training checkpoint of this project",
        lambda file: (
            file.is_run()
            and (isinstance(file.content.get("encoder"), dict) or file.has("final_norm.weight"))
        ),
        architecture_key="encoder",
        dropped_outside={
            r"(teacher|student)\.head\.": _HEAD,
            r"": "belongs to the pre-training objective",
        },
    ),
    Source(
        "ViT with rotary positions",
        _is_rotary,
        refusal="rotary positions (LayerScale named gamma_1 beside positions without a class "
        "token is timm's ViT with rotary positions; DeiT III's own files have the key 'model')",
    ),
    Source(
        "published FLSL checkpoint",
        lambda file: file.is_run("flsl_loss"),
        dropped=_UNUSED_CLASS_TOKEN,
        **_DINO,
    ),
    Source(
        "SelfPatch checkpoint",
        lambda file: any(name.startswith("ca_head.") for name in file.outside),
        norm=None,
        **_DINO,
    ),
    Source("iBOT checkpoint", lambda file: file.is_run("ibot_loss"), **_DINO),
    Source("DINO checkpoint", lambda file: file.is_run("dino_loss"), **_DINO),
    Source(
        "transformers, DINOv2 with registers",
        lambda file: file.layout == "transformers" and file.has("register_tokens"),
        _TIMM_POSITIONS,
        _HEADS,
    ),
    Source("transformers", _of_layout("transformers"), note=_PIXELS, **_SIZED),
    Source("OpenMMLab", _of_layout("OpenMMLab"), **_SIZED),
    Source("torchvision", _of_layout("torchvision"), **_SIZED),
    Source("Flax", _of_layout("Flax"), **_TIMM),
    Source(
        "image encoder of Segment Anything",
        _of_layout("SAM"),
        _TIMM_POSITIONS,
        dropped={r"neck\.": "the neck follows after the encoder"},
        dropped_outside={r"(prompt_encoder|mask_decoder)\.": "belongs to prompts and masks"},
        norm=None,
        note="the encoder ends before the neck; pixels are scaled by ImageNet's mean and standard "
        "deviation",
    ),
    Source(
        "MoCo v3 checkpoint",
        lambda file: bool({"base_encoder", "momentum_encoder"} & set(file.components)),
        _SIZED_POSITIONS,
        {**_HEADS, 384: 12},
        dropped={r"head\.": _HEAD},
    ),
    Source(
        "DINOv2 with registers",
        lambda file: _is_dinov2(file) and file.has("register_tokens"),
        _TIMM_POSITIONS,
        _HEADS,
    ),
    Source("DINOv2", _is_dinov2, dropped_outside={r".*_loss\.": "belongs to the losses"}, **_DINO),
    Source("MAE with its decoder", lambda file: file.has("decoder_embed.weight"), **_SIZED),
    Source(
        "detector of this project",
        lambda file: file.in_detector and file.has("final_norm.weight"),
        architecture_key="encoder",
        **_DETECTOR,
    ),
    Source("Detectron2's ViTDet", lambda file: file.in_detector, **_SIZED, **_DETECTOR),
    Source(
        "state dict of an FLSLViT",
        lambda file: (
            not file.has(
                *("cls_token", "norm.weight", "fc_norm.weight", "reg_token", "register_tokens")
            )
        ),
    ),
    Source(
        "timm's ViT with residual post-norm",
        _is_post_norm,
        refusal="norms after the residual branches (as timm's vit_base_patch16_rpn_224, which "
        "alone has neither a class token nor biases of queries, keys and values)",
    ),
    Source(
        "timm, without class token",
        lambda file: (
            not file.has("cls_token", "reg_token", "attn_pool.latent", "blocks.0.ls1.gamma")
        ),
        _TIMM_POSITIONS,
        {**USUAL_HEADS, 768: None},  # 12 in SigLIP's, 16 in vit_base_patch16_gap_224
        note=_PIXELS,
    ),
    Source(
        "DeiT",
        lambda file: file.is_in("model") and file.has("head.weight"),
        note="RoPE-ViT's models with axial frequencies have the same names and shapes as DeiT "
        "III's, and cannot be read",
        **_SIZED,
    ),
    Source("published FLSL backbone", _is_published_flsl, dropped=_UNUSED_CLASS_TOKEN, **_DINO),
    Source(
        "MAE or DeiT without head",
        lambda file: file.is_in("model"),
        _SIZED_POSITIONS,
        {width: heads for width, heads in _HEADS.items() if width != 384},
        note="MoCo v3's ViT-S, when converted to DeiT's layout, looks the same but has 12 heads: "
        "give num_heads=12 for it",
    ),
    Source("timm checkpoint", lambda file: "arch" in file.content, **_TIMM),
    Source("iBOT backbone", lambda file: file.is_in("state_dict"), **_DINO),
    Source(
        "timm",  # has what DINO's own backbones never have
        lambda file: (
            not file.has("cls_token")
            or file.has("head.weight", "fc_norm.weight", "reg_token", "blocks.0.ls1.gamma")
        ),
        **_TIMM,
    ),
    Source(
        "DINO backbone or timm",
        lambda file: True,
        note="DINO's backbone and timm's models without classifier look the same; positions are "
        "resampled as DINO does it; for timm's way give position_offset=0 and "
        "position_antialias=True",
        **_DINO,
    ),
)
