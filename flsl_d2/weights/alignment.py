"""Conversion of tensors in timm's names to those of ``FLSLViT``, with an account of the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flsl_d2.modeling.positions import num_leading_positions
from flsl_d2.weights.foreign_names import Renamed
from flsl_d2.weights.sources import Source
from flsl_d2.weights.weight_sets import WeightSet

# The name of the last norm in timm, and the one here; reversed, the pair exports.
TIMM_NAMES = (("norm.", "final_norm."),)
_NAMES = (*TIMM_NAMES, (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))

# Tokens beside those of the patches, in the order in which every source puts them.
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens")

_PROJECTION = "the projection head serves pre-training only"
# Reasons for leaving tensors out, by their names under the encoder's prefix.
_DROPPED = {
    r"(head|head_dist|pre_logits|((cls|distillation)_)?classifier)\.": "the classifier is not part "
    "of the encoder",
    r"(fc_norm|attn_pool|pooler|MAPHead_0)\.": "it pools the tokens for a classifier",
    r"(mask_token|masked_embed)$": "masks patches in pre-training only",
    r"decoder": "the decoder serves pre-training only",
}
# The same for names outside the prefix.
_DROPPED_OUTSIDE = {
    r"(.*\.)?(dino_head|ibot_head|ca_head|c_head|p_head|head|predictor|projector)\.": _PROJECTION,
    **_DROPPED,
}

_SWIGLU = "SwiGLU instead of an MLP"
_ROTARY = "rotary positions"
# Parts that FLSLViT does not compute, by the names of their weights.
_UNSUPPORTED = {
    r"rope": _ROTARY,
    r"blocks\.\d+\.mlp\.(w12|w3|w1|w2|fc1_g|fc1_x)\b": _SWIGLU,
    r"blocks\.\d+\.attn\.([qk]_norm|norm_[qk])\b": "normalised queries and keys",
    r"blocks\.\d+\.attn\.(relative_position|rel_pos\.)": "relative position biases",
    r"blocks\.\d+\.attn\.[qkv]_(bias|proj)": "BEiT's or EVA's biases of queries and values",
    r"blocks\.\d+\.(attn|mlp)\.(norm|sub_norm|inner_attn_ln|ffn_ln)\b": "norms inside the "
    "attention or MLP (BEiT-3, EVA-02)",
    r"blocks\.\d+\.attn\.lambda_": "differential attention",
    r"blocks\.\d+\.attn\.proj_[lw]\.": "talking heads (CaiT)",
    r"norm_pre\b": "a norm before the first block (CLIP)",
    r"patch_embed\.(proj\.\d|backbone)": "a convolutional stem",
    r"blocks\.\d+\.((attn|norm1|norm2|mlp)1\.|(attn|ffn)s\.|in_proj|attn_out_proj)": "parallel "
    "blocks",
    r"pos_embed_": "position tables in several parts (Hiera)",
    r"(blocks|patch_embed|embeddings|encoder)\.": "weights that FLSLViT has no place for",
}
_SUPPORTED = re.compile(
    r"patch_embed\.proj\.(weight|bias)$"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)$"
    r"|blocks\.\d+\.(ls[12]\.gamma|attn\.rel_pos_[hw])$"
)


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's tensors by the names of ``FLSLViT``, with what is known about them.

    Attributes:
        source: name of the layout.
        tensors: name in ``FLSLViT``: tensor.
        dropped: name in the file: reason for leaving it out.
        architecture: arguments of ``FLSLViT``, as far as file and source tell them.
        file_names: name in ``FLSLViT``: name or names in the file.
        unused: names in the file that no rule accounts for.
        unsupported: name in the file: the part that ``FLSLViT`` does not compute.
        note: advice to users of such a file.
        location: containers and prefix of the tensors in the file.
        other_sets: labels of further sets of weights in the file.
    """

    source: str
    tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)
    file_names: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    unsupported: dict[str, str] = field(default_factory=dict)
    note: str = ""
    location: str = ""
    other_sets: tuple[str, ...] = ()


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the head (``norm.``) or the tail (``.gamma_1``) of a dotted name.

    Args:
        pairs: old and new heads (which end with a dot) and tails (which start with one).
    """
    for old, new in pairs:
        if old.endswith(".") and name.startswith(old):
            return new + name[len(old) :]
        if old.startswith(".") and name.endswith(old):
            return name[: -len(old)] + new
    return name


def align(
    source: Source,
    architecture: dict[str, Any],
    chosen: WeightSet,
    renamed: Renamed,
    other_sets: tuple[str, ...],
) -> EncoderWeights:
    """Sort every tensor of a set into the encoder's, those dropped, and those unused."""
    tensors: dict[str, Tensor] = {}
    file_names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for name, (tensor, original) in renamed.items():
        reason = _reason(name, {**source.dropped, **_DROPPED})
        if reason:
            dropped[original] = reason
        else:
            own = rename(name, _NAMES)
            tensors[own], file_names[own] = tensor, original
    unused = []
    for name, original in chosen.outside.items():
        reason = _reason_outside(name, source, chosen, other_sets)
        if reason:
            dropped[original] = reason
        else:
            unused.append(original)
    _fold_prefix_tokens(tensors, file_names, dropped)
    unsupported = {
        file_names.get(name, name): part for name, part in _unsupported_parts(tensors).items()
    }
    if source.refusal:
        unsupported[file_names.get("blocks.0.norm1.weight", "")] = source.refusal
    return EncoderWeights(
        source.name,
        tensors,
        dropped,
        architecture,
        file_names,
        tuple(unused),
        unsupported,
        source.note,
        chosen.location,
        other_sets,
    )


def _reason(name: str, reasons: Mapping[str, str]) -> str:
    return next((reason for pattern, reason in reasons.items() if re.match(pattern, name)), "")


def _reason_outside(
    name: str, source: Source, chosen: WeightSet, other_sets: tuple[str, ...]
) -> str:
    parts = name.split(".")
    others = [other for other in other_sets if set(other.split(".")) & set(parts)]
    if others:
        return f"belongs to the set {others[0]!r}"
    return _reason(name, source.dropped_outside) or _reason(name, _DROPPED_OUTSIDE)


def _fold_prefix_tokens(
    tensors: dict[str, Tensor], file_names: dict[str, str], dropped: dict[str, str]
) -> None:
    """Make one tensor of class tokens and registers, each with its position if it has one."""
    names = [n for n in _PREFIX_TOKENS if n in tensors and tensors[n].dim() == 3]
    tokens = [tensors.pop(name) for name in names]
    count = sum(token.shape[1] for token in tokens)
    table = tensors.get("pos_embed")
    leading = 0
    if table is not None and table.dim() == 3:
        leading = num_leading_positions(table.shape[1], max(count, 1))
        tensors["pos_embed"] = table[:, leading:]
    if tokens:
        prefix = torch.cat(tokens, dim=1).clone()
        if table is not None and leading:
            prefix[:, :leading] += table[:, :leading]
        tensors["prefix_tokens"] = prefix
        file_names["prefix_tokens"] = ", ".join(file_names.pop(name) for name in names)
    elif leading:
        dropped[f"{file_names['pos_embed']}[:, 0]"] = (
            "the position of a class token that the file does not hold"
        )


def _unsupported_parts(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    found = {
        name: _reason(name, _UNSUPPORTED)
        for name in tensors
        if not _SUPPORTED.match(name) and _reason(name, _UNSUPPORTED)
    }
    first, second = (tensors.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:
        found["blocks.0.mlp.fc1.weight"] = _SWIGLU  # timm packs its two parts into one layer
    if "blocks.0.norm1.weight" in tensors and "blocks.0.norm1.bias" not in tensors:
        found["blocks.0.norm1.weight"] = "RMSNorm, or norms without bias,"
    if "pos_embed" not in tensors and "blocks.0.attn.qkv.weight" in tensors and not found:
        found["pos_embed"] = f"no position table ({_ROTARY}, relative ones or none)"
    return found
