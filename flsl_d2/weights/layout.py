"""How one kind of file stores an encoder, and how its tensors become those of ``FLSLViT``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flsl_d2.modeling.positions import num_leading_positions

__all__ = ["PREFIX_TOKENS", "EncoderWeights", "Source", "rename"]

# Tokens beside those of the patches, in the order in which every source puts them.
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens")

_SWIGLU = "SwiGLU instead of an MLP"
# What an encoder can have that FLSLViT does not compute, by the names of its weights.
_UNSUPPORTED = {
    r"blocks\.\d+\.mlp\.(w12|w3|w1|w2|fc1_g|fc1_x)\b": _SWIGLU,
    r"blocks\.\d+\.attn\.[qk]_norm\b": "normalised queries and keys",
    r"blocks\.\d+\.attn\.(relative_position|[qv]_bias)": "BEiT's relative positions and biases",
    r"norm_pre\b": "a norm before the first block (CLIP)",
    r"patch_embed\.proj\.\d": "a convolutional stem",
    r"blocks\.\d+\.(attn|norm1|norm2|mlp)1\.": "parallel blocks",
    r"(blocks|patch_embed)\.": "weights that FLSLViT has no place for",
}


class EncoderWeights(NamedTuple):
    """An encoder's tensors by the names of ``FLSLViT``, with what is known about them."""

    source: str
    tensors: dict[str, Tensor]
    dropped: dict[str, str]  # name in the file: reason
    architecture: dict[str, Any]  # arguments of FLSLViT, as far as file and source tell them
    file_names: dict[str, str] = {}  # name of FLSLViT: name or names in the file
    unsupported: dict[str, str] = {}  # name in the file: what it is
    note: str = ""  # what a user of such a file should know


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the head (``norm.``) or the tail (``.gamma_1``) of a dotted name.

    Args:
        name: of a tensor.
        pairs: old and new heads (which end with a dot) and tails (which start with one).
    """
    for old, new in pairs:
        if old.endswith(".") and name.startswith(old):
            return new + name[len(old) :]
        if old.startswith(".") and name.endswith(old):
            return name[: -len(old)] + new
    return name


@dataclass(frozen=True)
class Source:
    """The layout of one kind of file.

    Attributes:
        name: how reports call it.
        path: keys that lead from the file's outermost dict to the tensors.
        prefix: what all of the encoder's names start with; it is removed.
        marks: keys that the outermost dict must have, to tell layouts of one shape apart.
        fits: whether the names of the tensors (with prefix) can be of this source.
        which: ``teacher`` or ``student``, where a file holds both.
        renamed: heads or tails of names (without prefix) and their replacement; see
            :func:`rename`.
        dropped: patterns of names (with prefix) that are left out, and the reason.
        architecture: arguments of ``FLSLViT`` that are the source's own and in no file.
        heads: number of heads by width, which no shape tells.
        architecture_key: where the file keeps the arguments of ``FLSLViT``.
        note: what a user of such a file should know.
    """

    name: str
    path: tuple[str, ...] = ()
    prefix: str = ""
    marks: tuple[str, ...] = ()
    fits: Callable[[Mapping[str, Tensor]], bool] | None = None
    which: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[int, int] = field(default_factory=dict)
    architecture_key: str = ""
    note: str = ""

    def tensors_of(self, content: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The file's tensors, without ``module.`` of DDP; None if the layout is another."""
        if any(mark not in content for mark in self.marks):
            return None
        node: Any = content
        for key in self.path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping):
            return None
        state = {
            _plain_name(str(name)): value
            for name, value in node.items()
            if isinstance(value, Tensor)
        }
        if not any(name.startswith(f"{self.prefix}patch_embed.proj.") for name in state):
            return None
        if f"{self.prefix}blocks.0.attn.qkv.weight" not in state:
            return None
        return None if self.fits is not None and not self.fits(state) else state

    def convert(self, state: dict[str, Tensor], content: Mapping[str, Any]) -> EncoderWeights:
        """The encoder's part of what :meth:`tensors_of` gave."""
        tensors, dropped, file_names = {}, {}, {}
        for name, tensor in state.items():
            reason = next((why for what, why in self.dropped.items() if re.match(what, name)), None)
            if reason is not None:
                dropped[name] = reason
                continue
            own = rename(name.removeprefix(self.prefix), self.renamed)
            tensors[own], file_names[own] = tensor, name
        _fold_prefix_tokens(tensors, file_names, dropped)
        unsupported = {
            file_names[own]: reason for own, reason in _unsupported_parts(tensors).items()
        }
        architecture = dict(self.architecture)
        width = tensors["blocks.0.attn.qkv.weight"].shape[-1]
        if width in self.heads:
            architecture["num_heads"] = self.heads[width]
        if self.architecture_key:
            architecture.update(content.get(self.architecture_key) or {})
        return EncoderWeights(
            self.name, tensors, dropped, architecture, file_names, unsupported, self.note
        )


def _plain_name(name: str) -> str:
    """A name without DDP's prefix and without DINOv2's chunks of blocks."""
    name = name.removeprefix("module.")
    return re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)


def _fold_prefix_tokens(
    tensors: dict[str, Tensor], file_names: dict[str, str], dropped: dict[str, str]
) -> None:
    """Make one tensor of class tokens and registers, each with its position if it has one."""
    names = [n for n in PREFIX_TOKENS if n in tensors and tensors[n].dim() == 3]
    tokens = [tensors.pop(name) for name in names]
    count = sum(token.shape[1] for token in tokens)
    table = tensors.get("pos_embed")
    leading = 0
    if table is not None and table.dim() == 3:
        leading = num_leading_positions(table.shape[1], max(count, 1))
        tensors["pos_embed"] = table[:, leading:]
    if tokens:
        prefix = torch.cat(tokens, dim=1).clone()
        if leading:
            prefix[:, :leading] += table[:, :leading]
        tensors["prefix_tokens"] = prefix
        file_names["prefix_tokens"] = ", ".join(file_names.pop(name) for name in names)
    elif leading:
        dropped[f"{file_names['pos_embed']}[:, 0]"] = (
            "the position of a class token that the file does not hold"
        )


_SUPPORTED = re.compile(
    r"patch_embed\.proj\.(weight|bias)$"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)$"
    r"|blocks\.\d+\.(ls[12]\.gamma|attn\.rel_pos_[hw])$"
)


def _unsupported_parts(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    found = {
        name: next(reason for what, reason in _UNSUPPORTED.items() if re.match(what, name))
        for name in tensors
        if not _SUPPORTED.match(name) and any(re.match(what, name) for what in _UNSUPPORTED)
    }
    first, second = (tensors.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:
        found["blocks.0.mlp.fc1.weight"] = _SWIGLU  # timm packs its two parts into one layer
    return found
