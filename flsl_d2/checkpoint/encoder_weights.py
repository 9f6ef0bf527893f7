"""Loading an encoder's weights by exact name, with an account of every one, or an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from flsl_d2.checkpoint.architecture import check_architecture
from flsl_d2.checkpoint.layout import EncoderWeights
from flsl_d2.checkpoint.report import LoadReport, listed
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.encoder_state import fit_encoder_state

__all__ = ["encoders_of", "fit_encoder_in_detector", "load_encoder"]

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2.checkpoint")


def encoders_of(model: nn.Module) -> list[tuple[str, FLSLViT]]:
    """Every ``FLSLViT`` in a model with the prefix of its weights (``backbone.net.``, ...)."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, FLSLViT)]
    return [(f"{name}." if name else "", module) for name, module in found]


def load_encoder(encoder: FLSLViT, weights: EncoderWeights, path: str) -> LoadReport:
    """Load weights into an encoder and log one line of how many matched.

    Relative position tables that the weights lack keep their start value; at zero, as the encoder
    makes them, they change nothing. Class tokens and registers are left out, with a reason, where
    the encoder has ``num_prefix_tokens=0``.

    Args:
        encoder: changed in place, and only if everything fits.
        weights: from :func:`flsl_d2.checkpoint.sources.find_encoder_weights`.
        path: of the file, for the report.

    Raises:
        InputError: the weights do not cover the encoder, or were made for another architecture.
    """
    check_architecture(encoder, weights, path)
    own = encoder.state_dict()
    state = dict(weights.tensors)
    origin = {name: weights.file_names.get(name, name) for name in state}
    report = LoadReport(path, weights.source, dropped=dict(weights.dropped), note=weights.note)
    if "prefix_tokens" in state and "prefix_tokens" not in own:
        state.pop("prefix_tokens")
        report.dropped[origin["prefix_tokens"]] = (
            "tokens beside the patches, with their positions; the encoder has num_prefix_tokens=0, "
            "as windows require"
        )
    report.new = [name for name in own if name not in state and ".rel_pos_" in name]
    report.unused = sorted(origin[name] for name in set(state) - set(own))
    state.update({name: own[name] for name in report.new})
    loaded = {name: tensor for name, tensor in state.items() if name in own}
    report.matched = {n: origin[n] for n in own if n in loaded and n not in report.new}
    report.resampled = _resampled(loaded, own)
    report.encoder = encoder.architecture
    errors: list[str] = []
    with _quiet_encoder_reports():
        fit_encoder_state(encoder, loaded, "", errors)
        _refuse(errors, own, loaded, path)
        encoder.load_state_dict(loaded)
    logger.log(logging.WARNING if report.unused else logging.INFO, report.line())
    _compare_positions(encoder, weights)
    return report


def _resampled(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    sentences = []
    table = loaded.get("pos_embed")
    if table is not None and table.shape[1] != own["pos_embed"].shape[1]:
        sentences.append(
            f"positions resampled from {table.shape[1]} to {own['pos_embed'].shape[1]}"
        )
    relative = [n for n, t in loaded.items() if ".rel_pos_" in n and t.shape != own[n].shape]
    if relative:
        sentences.append(f"{len(relative)} relative position tables resampled")
    return sentences


def _compare_positions(encoder: FLSLViT, weights: EncoderWeights) -> None:
    """Say when the encoder resamples positions in another way than the source does."""
    own = encoder.architecture
    keys = [key for key in ("position_offset", "position_antialias") if key in weights.architecture]
    if any(weights.architecture[key] != own[key] for key in keys):
        logger.info(
            "encoder weights: the source resamples positions with %s, this encoder with %s; at "
            "other image sizes than %d features differ a little.",
            ", ".join(f"{key}={weights.architecture[key]}" for key in keys),
            ", ".join(f"{key}={own[key]}" for key in keys),
            own["img_size"],
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
        f"unmatched are {listed(bad)}; give weights of the same architecture."
    )


@contextmanager
def _quiet_encoder_reports() -> Iterator[None]:
    """The encoder reports for itself when a stock project loads it; here there is one report."""
    reports = logging.getLogger("detectron2.flsl_d2")
    disabled, reports.disabled = reports.disabled, True
    try:
        yield
    finally:
        reports.disabled = disabled
