"""An encoder made for a weight file: its architecture is read off the file."""

from __future__ import annotations

from typing import Any

from flsl_d2.checkpoint.architecture import architecture_of, refuse_unsupported
from flsl_d2.checkpoint.encoder_weights import load_encoder
from flsl_d2.checkpoint.reading import read_weights, split_weights_path
from flsl_d2.checkpoint.report import LoadReport
from flsl_d2.checkpoint.sources import KNOWN_LAYOUTS, USUAL_HEADS, find_encoder_weights
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT

__all__ = ["build_encoder", "open_encoder"]


def build_encoder(path: str, **changes: Any) -> FLSLViT:
    """The encoder in a weight file, in evaluation mode on the CPU.

    It computes what the file's own model computes: class tokens and registers take part in
    attention, and positions are resampled as the source does it.

    Args:
        path: file or URL in any layout of :data:`flsl_d2.checkpoint.sources.SOURCES`;
            ``?which=student`` at its end takes that one of a file with two encoders.
        **changes: arguments of ``FLSLViT`` that differ from what the file says.

    Raises:
        InputError: the file cannot be read, or holds no encoder that ``FLSLViT`` can be.
    """
    return open_encoder(path, **changes)[0]


def open_encoder(path: str, **changes: Any) -> tuple[FLSLViT, LoadReport]:
    """:func:`build_encoder` with the account of what became of every weight."""
    _, which = split_weights_path(path)
    weights = find_encoder_weights(read_weights(path), which)
    if weights is None:
        raise InputError(
            f"weights {path!r} hold no vision transformer in a known layout; known are "
            f"{KNOWN_LAYOUTS}."
        )
    refuse_unsupported(weights, path)
    arguments = {**architecture_of(weights), **changes}
    missing = [key for key in ("embed_dim", "img_size", "depth") if key not in arguments]
    if missing:
        raise InputError(
            f"weights {path!r} ({weights.source}) have no usable patch embedding or positions, "
            f"so {', '.join(missing)} cannot be read off them; give a complete encoder."
        )
    if "num_heads" not in arguments:
        arguments["num_heads"] = _usual_heads(arguments["embed_dim"], path)
    if "num_heads" in changes:  # whoever gives it knows better than the source's usual number
        weights.architecture.pop("num_heads", None)
    encoder = FLSLViT(**arguments)
    return encoder.eval(), load_encoder(encoder, weights, path)


def _usual_heads(embed_dim: int, path: str) -> int:
    if embed_dim not in USUAL_HEADS:
        raise InputError(
            f"weights {path!r} do not tell their number of attention heads, and a width of "
            f"{embed_dim} is none of the usual ones; give num_heads."
        )
    return USUAL_HEADS[embed_dim]
