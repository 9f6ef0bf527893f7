"""Where an encoder's weights can come from: one entry for each layout of a file.

An entry says where the tensors are, how their names become those of ``FLSLViT``, which are left
out and why, and what the source computes that no tensor tells. Whatever an entry does not account
for is an unmatched weight and gets listed. The layouts are those of the projects' own code at the
addresses that ``docs/CHECKPOINTS.md`` names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.modeling.positions import sincos_positions
from flsl_d2.weights.layout import EncoderWeights, Source

__all__ = [
    "KNOWN_LAYOUTS",
    "SOURCES",
    "TIMM_NAMES",
    "USUAL_HEADS",
    "EncoderWeights",
    "Source",
    "find_encoder_weights",
]

# For messages.
KNOWN_LAYOUTS = (
    "this project's own, published FLSL, DINO, iBOT, SelfPatch, MAE, MoCo v3, DINOv2, DeiT, timm's "
    "plain ViTs and Detectron2's ViTDet"
)

# The published name of the last norm, and the one here; reversed, it exports.
TIMM_NAMES = (("norm.", "final_norm."),)
# LayerScale as iBOT and DeiT III call it.
_GAMMA_NAMES = (*TIMM_NAMES, (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))

# How each project resamples its positions for images of another size.
_DINO_POSITIONS = {"position_offset": 0.1, "position_antialias": False}
_SIZED_POSITIONS = {"position_offset": 0.0, "position_antialias": False}
_TIMM_POSITIONS = {"position_offset": 0.0, "position_antialias": True}

# Attention heads of ViT-T, S, B, L, H, g and G in every project here (but MoCo v3's ViT-S), and of
# the further widths that timm's plain ViTs have. At 1536 they disagree.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
USUAL_HEADS = {**_HEADS, 256: 4, 320: 5, 512: 8, 640: 10, 832: 13, 896: 14, 1152: 16}

_PROJECTION = "the projection head serves pre-training only"
_CLASSIFIER = {
    r"(head|head_dist|pre_logits)\.": "the classifier is not part of the encoder",
    r"(fc_norm|attn_pool)\.": "it pools the tokens for a classifier",
}
_MASK_TOKEN = {r"(backbone\.)?(mask_token|masked_embed)$": "masks patches in pre-training only"}


def _has(name: str) -> Any:
    return lambda state: name in state


def _both(name: str, marks: tuple[str, ...] = (), **common: Any) -> tuple[Source, Source]:
    """A file with a teacher and a student under these keys, each with ``backbone.``."""
    return tuple(
        Source(
            name, path=(which,), prefix="backbone.", marks=(*marks, which), which=which, **common
        )
        for which in ("teacher", "student")
    )


def _is_dinov2(state: Mapping[str, Tensor]) -> bool:
    return "mask_token" in state and any(name.endswith(".ls1.gamma") for name in state)


def _is_published_flsl(state: Mapping[str, Tensor]) -> bool:
    """Fixed sine-cosine positions of patches alone, beside a class token that nothing uses."""
    table = state.get("pos_embed")
    if "cls_token" not in state or table is None or table.dim() != 3:
        return False
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1] or table.shape[-1] % 4:
        return False
    fixed = sincos_positions(table.shape[-1], side)
    return torch.allclose(table.float(), fixed, atol=1e-3)


def _is_own(state: Mapping[str, Tensor]) -> bool:
    return "cls_token" not in state and "norm.weight" not in state and "fc_norm.weight" not in state


_DINOV2 = {"renamed": TIMM_NAMES, "heads": _HEADS, "dropped": _MASK_TOKEN}
_DEIT = {"renamed": _GAMMA_NAMES, "architecture": _SIZED_POSITIONS}
_DETECTOR = {
    "path": ("model",),
    "prefix": "backbone.net.",
    "dropped": {r"(?!backbone\.net\.)": "belongs to the detector"},
    "note": "windows are read off relative positions; a detector without those keeps no trace of "
    "its windows, so give window_size to have them",
}
_TIMM = {
    "renamed": _GAMMA_NAMES,
    "heads": USUAL_HEADS,
    "dropped": _CLASSIFIER,
    "architecture": _TIMM_POSITIONS,
    "note": "timm's models differ in what pixels they expect: most take ImageNet's mean and "
    "standard deviation, as FLSLViT is fed here, some (augreg, SigLIP) 0.5 and 0.5",
}

# The first entry that fits is taken, so the more specific ones stand first, and of a file's two
# encoders the one that its own project evaluates.
SOURCES = (
    Source(
        "FLSL encoder of this project",
        path=("model",),
        marks=("format", "encoder"),
        architecture_key="encoder",
    ),
    *(
        Source(
            "pre-training checkpoint of this project",
            path=("model",),
            prefix=f"{which}.backbone.",
            which=which,
            architecture_key="encoder",
            dropped={
                rf"{other}\.": f"the {which} is taken",
                rf"{which}\.head\.": _PROJECTION,
                rf"(?!{which}\.)": "belongs to the pre-training objective",
            },
        )
        for which, other in (("teacher", "student"), ("student", "teacher"))
    ),
    *_both(
        "published FLSL checkpoint",
        marks=("flsl_loss",),
        renamed=TIMM_NAMES,
        architecture=_DINO_POSITIONS,
        heads=_HEADS,
        dropped={
            r"head\.": _PROJECTION,
            r"backbone\.cls_token$": "stored by the published code, but unused",
        },
    ),
    *_both(
        "SelfPatch checkpoint",
        fits=_has("ca_head.cls_token"),
        architecture=_DINO_POSITIONS,
        heads=_HEADS,
        dropped={r"(ca|c|p)_head\.": _PROJECTION},
    ),
    *_both(
        "iBOT checkpoint",
        marks=("ibot_loss",),
        renamed=_GAMMA_NAMES,
        architecture=_DINO_POSITIONS,
        heads=_HEADS,
        dropped={r"head\.": _PROJECTION, **_MASK_TOKEN},
    ),
    *_both(
        "DINO checkpoint",
        marks=("dino_loss",),
        renamed=TIMM_NAMES,
        architecture=_DINO_POSITIONS,
        heads=_HEADS,
        dropped={r"head\.": _PROJECTION},
    ),
    *(
        Source(
            "DINOv2 teacher of a training run",
            path=("teacher",),
            prefix="backbone.",
            fits=fits,
            renamed=TIMM_NAMES,
            heads=_HEADS,
            architecture=architecture,
            dropped={r"(dino_head|ibot_head)\.": _PROJECTION, **_MASK_TOKEN},
        )
        for fits, architecture in (
            (_has("backbone.register_tokens"), _TIMM_POSITIONS),
            (_has("backbone.mask_token"), _DINO_POSITIONS),
        )
    ),
    *(
        Source(
            "MoCo v3 checkpoint",
            path=("state_dict",),
            prefix=f"{encoder}.",
            which=which,
            renamed=TIMM_NAMES,
            architecture=_SIZED_POSITIONS,
            heads={**_HEADS, 384: 12},
            dropped={
                rf"{other}\.": f"the {encoder.replace('_', ' ')} is taken",
                rf"{encoder}\.head\.": _PROJECTION,
                r"predictor\.": _PROJECTION,
            },
        )
        for which, encoder, other in (
            ("student", "base_encoder", "momentum_encoder"),
            ("teacher", "momentum_encoder", "base_encoder"),
        )
    ),
    Source(
        "DINOv2 with registers",
        fits=lambda state: _is_dinov2(state) and "register_tokens" in state,
        architecture=_TIMM_POSITIONS,
        **_DINOV2,
    ),
    Source("DINOv2", fits=_is_dinov2, architecture=_DINO_POSITIONS, **_DINOV2),
    Source(
        "MAE with its decoder",
        path=("model",),
        fits=_has("decoder_embed.weight"),
        renamed=TIMM_NAMES,
        architecture=_SIZED_POSITIONS,
        heads=_HEADS,
        dropped={r"(decoder_|mask_token)": "the decoder serves pre-training only"},
    ),
    Source(
        "DeiT",
        path=("model",),
        fits=_has("head.weight"),
        heads=_HEADS,
        dropped=_CLASSIFIER,
        **_DEIT,
    ),
    Source(
        "detector of this project",
        fits=_has("backbone.net.final_norm.weight"),
        **_DETECTOR,
    ),
    Source(
        "Detectron2's ViTDet",
        architecture=_SIZED_POSITIONS,
        heads=_HEADS,
        **_DETECTOR,
    ),
    Source("state dict of an FLSLViT", fits=_is_own),
    Source("state dict of an FLSLViT", path=("model",), fits=_is_own),
    *(
        Source(
            "published FLSL backbone",
            path=path,
            fits=_is_published_flsl,
            renamed=TIMM_NAMES,
            architecture=_DINO_POSITIONS,
            heads=_HEADS,
            dropped={r"cls_token$": "stored by the published code, but unused"},
        )
        for path in ((), ("model",), ("state_dict",))
    ),
    Source(
        "MAE or DeiT without head",
        path=("model",),
        dropped=_MASK_TOKEN,
        heads={width: heads for width, heads in _HEADS.items() if width != 384},
        note="MoCo v3's ViT-S, when converted to DeiT's layout, looks the same but has 12 heads: "
        "give num_heads=12 for it",
        **_DEIT,
    ),
    Source("timm checkpoint", path=("state_dict",), marks=("arch",), **_TIMM),
    Source(
        "iBOT backbone",
        path=("state_dict",),
        renamed=_GAMMA_NAMES,
        architecture=_DINO_POSITIONS,
        heads=_HEADS,
        dropped={**_CLASSIFIER, **_MASK_TOKEN},
    ),
    Source("timm", fits=lambda state: _is_timm(state), **_TIMM),
    Source(
        "DINO backbone or timm",
        renamed=_GAMMA_NAMES,
        architecture=_DINO_POSITIONS,
        heads=_HEADS,
        dropped=_CLASSIFIER,
        note="DINO's backbone and timm's models without classifier look the same; positions are "
        "resampled as DINO does it; for timm's way give position_offset=0 and "
        "position_antialias=True",
    ),
)


def _is_timm(state: Mapping[str, Tensor]) -> bool:
    """What DINO's own backbones never have: a classifier, registers, LayerScale or no class."""
    marks = ("head.weight", "fc_norm.weight", "reg_token", "blocks.0.ls1.gamma")
    return "cls_token" not in state or any(mark in state for mark in marks)


def find_encoder_weights(
    content: Mapping[str, Any], which: str | None = None
) -> EncoderWeights | None:
    """The encoder in a file that :func:`flsl_d2.weights.read_weights` read.

    Args:
        content: of the file.
        which: ``teacher`` or ``student``, in files that hold both; None takes the one that the
            file's own project evaluates (the teacher; for MoCo v3, the base encoder).

    Returns:
        None where no entry of :data:`SOURCES` fits.

    Raises:
        InputError: a teacher or student is asked of a file that does not have it.
    """
    found = None
    for source in SOURCES:
        if found is not None and source.name != found:
            break
        state = source.tensors_of(content)
        if state is None:
            continue
        found = source.name
        if which in (None, source.which):
            return source.convert(state, content)
    if found is not None:
        raise InputError(
            f"the weights ({found}) hold no {which} apart; leave which={which} out to take the "
            "one encoder that they have."
        )
    return None
