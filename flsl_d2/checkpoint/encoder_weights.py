"""Loading an encoder's weights by exact name, with a count, a list of the rest, or an error."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flsl_d2.checkpoint.sources import EncoderWeights
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.encoder_state import fit_encoder_state
from flsl_d2.modeling.positions import grid_of_table

__all__ = [
    "architecture_from_shapes",
    "check_architecture",
    "encoders_of",
    "fit_encoder_in_detector",
    "load_encoder",
]

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2.checkpoint")

# What the shapes of tensors say, or what changes the result without changing a shape.
_COMPARED = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")


def encoders_of(model: nn.Module) -> list[tuple[str, FLSLViT]]:
    """Every ``FLSLViT`` in a model with the prefix of its weights (``backbone.net.``, ...)."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, FLSLViT)]
    return [(f"{name}." if name else "", module) for name, module in found]


def check_architecture(encoder: FLSLViT, weights: EncoderWeights, path: str) -> None:
    """Compare what the weights were made for with the encoder.

    Raises:
        InputError: naming each value that differs.
    """
    stated = {**architecture_from_shapes(weights.tensors), **weights.architecture}
    own = encoder.architecture
    differing = [k for k in _COMPARED if k in stated and stated[k] != own[k]]
    if differing:
        of_file = ", ".join(f"{key}={stated[key]}" for key in differing)
        of_model = ", ".join(f"{key}={own[key]}" for key in differing)
        raise InputError(
            f"weights {path!r} are of an encoder with {of_file}, but the config's has {of_model}; "
            "change these keys of the config's encoder, or give other weights."
        )


def load_encoder(encoder: FLSLViT, weights: EncoderWeights, path: str) -> None:
    """Load weights into an encoder and log one line of how many matched.

    Relative position tables that the weights lack keep their start value; at zero, as the encoder
    makes them, they change nothing.

    Args:
        encoder: changed in place.
        weights: from :func:`flsl_d2.checkpoint.sources.find_encoder_weights`.
        path: of the file, for the report.

    Raises:
        InputError: the weights do not cover the encoder, or were made for another architecture.
    """
    check_architecture(encoder, weights, path)
    own = encoder.state_dict()
    state = dict(weights.tensors)
    new = [name for name in own if name not in state and ".rel_pos_" in name]
    state.update({name: own[name] for name in new})
    left = sorted(set(state) - set(own))
    loaded = {name: tensor for name, tensor in state.items() if name in own}
    grid = loaded.get("pos_embed")
    notes = []
    if grid is not None and grid.shape[1] != own["pos_embed"].shape[1]:
        notes.append(f"positions resampled from {grid.shape[1]} to {own['pos_embed'].shape[1]}")
    if new:
        notes.append(f"{len(new)} relative position tables are new and start as they are")
    if left:
        notes.append(f"not used: {', '.join(left)}")
    for reason in dict.fromkeys(weights.dropped.values()):
        count = list(weights.dropped.values()).count(reason)
        notes.append(f"{count} left out ({reason})")
    errors: list[str] = []
    with _quiet_encoder_reports():
        fit_encoder_state(encoder, loaded, "", errors)
        _refuse(errors, own, loaded, path)
        encoder.load_state_dict(loaded)
    logger.log(
        logging.WARNING if left else logging.INFO,
        "encoder weights: %d of %d matched (%s)%s",
        len(own) - len(new),
        len(own),
        path,
        "".join(f"; {note}" for note in notes),
    )


def fit_encoder_in_detector(
    encoder: FLSLViT, state: dict[str, Tensor], prefix: str, path: str
) -> None:
    """Adapt a detector's state dict to its encoder in place (position tables of other sizes).

    Raises:
        InputError: the encoder is not covered.
    """
    part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    check_architecture(encoder, EncoderWeights("detector", part, {}, {}), path)
    errors: list[str] = []
    with _quiet_encoder_reports():
        fit_encoder_state(encoder, state, prefix, errors)
    _refuse(errors, encoder.state_dict(), state, path, prefix)


def _refuse(
    errors: list[str],
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    path: str,
    prefix: str = "",
) -> None:
    if not errors:
        return
    bad = [
        prefix + name
        for name, tensor in own.items()
        if getattr(state.get(prefix + name), "shape", None) != tensor.shape
    ]
    raise InputError(
        f"weights {path!r} cover {len(own) - len(bad)} of the encoder's {len(own)} tensors, "
        f"unmatched are {_listed(bad)}; give weights of the same architecture."
    )


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def architecture_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``FLSLViT`` that the shapes of its tensors give away."""
    known: dict[str, Any] = {}
    patches = tensors.get("patch_embed.proj.weight")
    if patches is not None and patches.dim() == 4:
        known["embed_dim"], known["in_chans"], known["patch_size"], _ = patches.shape
    blocks = {int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")}
    if blocks:
        known["depth"] = max(blocks) + 1
    table = tensors.get("pos_embed")
    if table is not None and "patch_size" in known:
        known["img_size"] = grid_of_table(table.shape[1]) * known["patch_size"]
    return known


@contextmanager
def _quiet_encoder_reports() -> Iterator[None]:
    """The encoder reports for itself when a stock project loads it; here there is one report."""
    reports = logging.getLogger("detectron2.flsl_d2")
    disabled, reports.disabled = reports.disabled, True
    try:
        yield
    finally:
        reports.disabled = disabled
