"""Finding the weights of an encoder in the files of the projects that train one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["EncoderWeights", "find_encoder_weights"]

_PATCHES = "patch_embed.proj.weight"


@dataclass
class EncoderWeights:
    """An encoder's weights, by the names that ``FLSLViT`` has.

    Attributes:
        source: whose layout the file has.
        weights: name to tensor; the encoder itself settles class tokens and position grids.
        dropped: tensors that were left out, and why.
        architecture: constructor arguments of the encoder, where the file states them.
    """

    source: str
    weights: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """Where one project keeps its encoder.

    Attributes:
        source: name for reports.
        place: keys that lead to the state dict; empty for the file itself.
        prefix: what the encoder's names start with there.
        matches: further condition on the file's content.
    """

    source: str
    place: tuple[str, ...]
    prefix: str
    matches: Callable[[dict[str, Any]], bool] = lambda content: True


# The first that fits is taken, so the more particular come first.
_LAYOUTS = (
    _Layout("flsl_d2 encoder", ("model",), "", lambda c: c.get("format") == "flsl_d2 encoder"),
    _Layout("pre-training checkpoint (teacher)", ("model",), "teacher.backbone."),
    _Layout("published FLSL (teacher)", ("teacher",), "backbone."),
    _Layout("published FLSL (teacher)", ("teacher",), "module.backbone."),
    _Layout("model", ("model",), ""),
    _Layout("state_dict", ("state_dict",), ""),
    _Layout("bare state dict", (), ""),
)

# Parts of published encoders that detection has no use for.
_UNUSED = {
    "head.": "a head, not part of the encoder",
    "fc_norm.": "the norm of a classifier",
    "norm_pre.": "the norm of another architecture",
    "mask_token": "only used in pre-training",
}


def find_encoder_weights(content: dict[str, Any]) -> EncoderWeights | None:
    """The encoder in a checkpoint's content; None where it is no encoder's file.

    A detector's checkpoint, whose encoder is one part among others, is none.
    """
    for layout in _LAYOUTS:
        state: Any = content
        for key in layout.place:
            state = state.get(key) if isinstance(state, dict) else None
        if (
            isinstance(state, dict)
            and layout.prefix + _PATCHES in state
            and layout.matches(content)
        ):
            return _taken_from(state, layout, content)
    return None


def _taken_from(state: dict[str, Any], layout: _Layout, content: dict[str, Any]) -> EncoderWeights:
    found = EncoderWeights(layout.source, {}, architecture=dict(content.get("encoder") or {}))
    for name, value in state.items():
        own = name.removeprefix(layout.prefix)
        if not isinstance(value, Tensor):
            continue
        if not name.startswith(layout.prefix):
            found.dropped[name] = "outside of the encoder"
            continue
        reason = next((r for start, r in _UNUSED.items() if own.startswith(start)), None)
        if reason:
            found.dropped[own] = reason
        else:
            found.weights[own] = value
    return found
