"""An encoder made for a weight file: its architecture is read off the file."""

from __future__ import annotations

from typing import Any

from flsl_d2.checkpoint.encoder_weights import architecture_from_shapes, load_encoder
from flsl_d2.checkpoint.reading import read_weights
from flsl_d2.checkpoint.sources import SOURCES, find_encoder_weights
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT

__all__ = ["build_encoder"]

# Every published plain ViT but the tiny one of some sources has heads of 64 channels.
_HEAD_CHANNELS = 64


def build_encoder(path: str, **changes: Any) -> FLSLViT:
    """The encoder in a weight file, in evaluation mode on the CPU.

    Args:
        path: file or URL in any layout of :data:`flsl_d2.checkpoint.sources.SOURCES`.
        **changes: arguments of ``FLSLViT`` that differ from what the file says.

    Raises:
        InputError: the file cannot be read, or holds no encoder.
    """
    weights = find_encoder_weights(read_weights(path))
    if weights is None:
        known = ", ".join(dict.fromkeys(source.name for source in SOURCES))
        raise InputError(
            f"weights {path!r} hold no vision transformer in a known layout; known are: {known}."
        )
    arguments = {**architecture_from_shapes(weights.tensors), **weights.architecture}
    arguments.setdefault("num_heads", max(arguments["embed_dim"] // _HEAD_CHANNELS, 1))
    encoder = FLSLViT(**{**arguments, **changes})
    load_encoder(encoder, weights, path)
    return encoder.eval()
