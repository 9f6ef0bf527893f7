"""Where an encoder's weights can come from: one entry for each layout of a file.

An entry says where the tensors are, how their names become those of ``FLSLViT``, and which are
left out and why. Whatever an entry does not account for is an unmatched weight and gets listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["SOURCES", "EncoderWeights", "Source", "find_encoder_weights"]


class EncoderWeights(NamedTuple):
    """An encoder's tensors by the names of ``FLSLViT``, with what is known about them."""

    source: str
    tensors: dict[str, Tensor]
    dropped: dict[str, str]  # name in the file: reason
    architecture: dict[str, Any]  # arguments of FLSLViT, as far as the file states them


@dataclass(frozen=True)
class Source:
    """The layout of one kind of file.

    Attributes:
        name: how reports call it.
        path: keys that lead from the file's outermost dict to the tensors.
        prefix: what all of the encoder's names start with; it is removed.
        marks: keys that the outermost dict must have, to tell layouts of one shape apart.
        renamed: patterns of names (without prefix) and their replacement.
        dropped: patterns of names (as in the file) that are left out, and the reason.
        position_tokens: leading rows of ``pos_embed`` that belong to no patch.
        architecture_key: where the file keeps the arguments of ``FLSLViT``.
    """

    name: str
    path: tuple[str, ...] = ()
    prefix: str = ""
    marks: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    position_tokens: int = 0
    architecture_key: str = ""

    def tensors_of(self, content: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The file's tensors, without ``module.`` of DDP; None if the layout is another."""
        if any(mark not in content for mark in self.marks):
            return None
        node: Any = content
        for key in self.path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping):
            return None
        state = {str(k).removeprefix("module."): v for k, v in node.items()}
        if f"{self.prefix}patch_embed.proj.weight" not in state:
            return None
        if f"{self.prefix}blocks.0.attn.qkv.weight" not in state:
            return None
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def convert(self, state: dict[str, Tensor], content: Mapping[str, Any]) -> EncoderWeights:
        """The encoder's part of what :meth:`tensors_of` gave."""
        tensors, dropped = {}, {}
        for name, tensor in state.items():
            reason = next((why for what, why in self.dropped.items() if re.match(what, name)), None)
            if reason is not None:
                dropped[name] = reason
                continue
            bare = name.removeprefix(self.prefix)
            for pattern, replacement in self.renamed.items():
                bare = re.sub(pattern, replacement, bare)
            if bare == "pos_embed" and self.position_tokens:
                tensor = tensor[:, self.position_tokens :]
            tensors[bare] = tensor
        architecture = content.get(self.architecture_key) if self.architecture_key else None
        return EncoderWeights(self.name, tensors, dropped, dict(architecture or {}))


# The first entry that fits is taken, so the more specific ones stand first.
SOURCES = (
    Source(
        "FLSL encoder of this project",
        path=("model",),
        marks=("format", "encoder"),
        architecture_key="encoder",
    ),
    Source(
        "pre-training checkpoint of this project",
        path=("model",),
        prefix="teacher.backbone.",
        dropped={
            r"student\.": "the teacher is used downstream",
            r"teacher\.head\.": "the projection head serves pre-training only",
            r"(?!teacher\.)": "belongs to the pre-training objective",
        },
    ),
    Source(
        "published FLSL checkpoint",
        path=("teacher",),
        prefix="backbone.",
        marks=("flsl_loss",),
        renamed={r"^norm\.": "final_norm."},
        dropped={
            r"head\.": "the projection head serves pre-training only",
            r"backbone\.cls_token$": "stored by the published code, but unused",
        },
    ),
    Source("state dict of an FLSLViT"),
    Source("state dict of an FLSLViT", path=("model",)),
)


def find_encoder_weights(content: Mapping[str, Any]) -> EncoderWeights | None:
    """The encoder in a file that :func:`flsl_d2.checkpoint.read_weights` read.

    Returns:
        None where no entry of :data:`SOURCES` fits.
    """
    for source in SOURCES:
        state = source.tensors_of(content)
        if state is not None:
            return source.convert(state, content)
    return None
