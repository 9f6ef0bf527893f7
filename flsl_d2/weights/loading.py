"""Encoders from weight files: read, recognise, align, check, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, InputFormat
from flsl_d2.modeling.encoder_state import adapt_encoder_state
from flsl_d2.weights.alignment import EncoderWeights, align
from flsl_d2.weights.architecture import architecture_of, check_architecture, refuse_unsupported
from flsl_d2.weights.foreign_names import foreign_network, to_timm_names
from flsl_d2.weights.reading import read_weights, split_weights_path
from flsl_d2.weights.report import LoadReport
from flsl_d2.weights.sources import KNOWN_LAYOUTS, USUAL_HEADS, recognise
from flsl_d2.weights.weight_sets import choose_set, find_weight_sets, tensor_dicts

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2.checkpoint")


def build_encoder(path: str, which: str | None = None, **changes: Any) -> FLSLViT:
    """Build the encoder in a weight file, in evaluation mode on the CPU.

    It computes what the file's own model computes: class tokens and registers take part in
    attention, and positions are resampled as the source does it.

    Args:
        path: file or URL in any layout of :data:`flsl_d2.weights.sources.SOURCES`; it may end in
            ``?which=NAME``.
        which: name of a set of weights (``student``, ``state_dict_ema``) in a file that has
            several; None takes the one that the file's own project evaluates.
        **changes: arguments of ``FLSLViT`` that differ from what the file says.

    Raises:
        InputError: the file cannot be read, or holds no encoder that ``FLSLViT`` can be.
    """
    return open_encoder(path, which, **changes)[0]


def open_encoder(path: str, which: str | None = None, **changes: Any) -> tuple[FLSLViT, LoadReport]:
    """Build the encoder as :func:`build_encoder` does, with the account of every weight."""
    content = read_weights(path)
    weights = find_encoder_weights(content, which or split_weights_path(path)[1], path)
    if weights is None:
        raise InputError(unknown_layout(content, path))
    refuse_unsupported(weights, path)
    arguments = {**architecture_of(weights), **changes}
    missing = [key for key in ("embed_dim", "img_size", "depth") if key not in arguments]
    if missing:
        raise InputError(
            f"weights {path!r} ({weights.source}) have no usable patch embedding or positions, "
            f"so {', '.join(missing)} cannot be read off them; give a complete encoder."
        )
    arguments["num_heads"] = arguments.get("num_heads", USUAL_HEADS.get(arguments["embed_dim"]))
    if arguments["num_heads"] is None:
        raise InputError(
            f"weights {path!r} ({weights.source}) do not tell their number of attention heads, "
            f"and models of width {arguments['embed_dim']} differ in it; give num_heads."
        )
    if "num_heads" in changes:  # a number that is given wins over the source's usual one
        weights.architecture.pop("num_heads", None)
    encoder = FLSLViT(**arguments)
    if stated := _stated_input(content, path):
        encoder.input_format = stated
    return encoder.eval(), load_encoder(encoder, weights, path)


def input_format(path: str) -> InputFormat:
    """Return the pixels that the encoder in a weight file takes, or the default for its channels.

    Raises:
        InputError: see :func:`build_encoder`.
    """
    return build_encoder(path).input_format


def _stated_input(content: Mapping[str, Any], path: str) -> InputFormat | None:
    if not isinstance(content.get("input"), Mapping):
        return None
    try:
        return InputFormat.from_dict(content["input"])
    except ValueError as error:
        raise InputError(
            f"weights {path!r} state an input format that is incomplete ({error}); export the "
            "encoder again."
        ) from error


def find_encoder_weights(
    content: Mapping[str, Any], which: str | None = None, path: str = ""
) -> EncoderWeights | None:
    """Find an encoder in the content of a file, in the names of ``FLSLViT``.

    Args:
        content: result of :func:`flsl_d2.weights.read_weights`.
        which: name of a set of weights, None for the default.

    Returns:
        None where no set of weights is that of a vision transformer.

    Raises:
        InputError: there is no set of the name, or nothing says which of several to take.
    """
    sets = find_weight_sets(content)
    if not sets:
        return None
    chosen = choose_set(sets, which, path)
    layout, renamed = to_timm_names(chosen.tensors, chosen.file_names)
    source, architecture = recognise(content, chosen, layout, renamed)
    others = tuple(each.label for each in sets if each is not chosen)
    weights = align(source, architecture, chosen, renamed, others)
    is_transformer = any(name.startswith("blocks.") for name in weights.tensors)
    return weights if is_transformer else None


def unknown_layout(content: Mapping[str, Any], path: str) -> str:
    """Say what was found in a file without a known encoder, and which layouts are known."""
    dicts = list(tensor_dicts(content))
    network = foreign_network([name for _, tensors in dicts for name in tensors])
    if dicts:
        containers, tensors = max(dicts, key=lambda item: len(item[1]))
        names = list(tensors)
        inside = f" under {' / '.join(containers)!r}" if containers else ""
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        found = f"{len(names)} tensors{inside}: {shown}"
    else:
        found = f"no tensors; keys: {', '.join(str(key) for key in list(content)[:5]) or 'none'}"
    of = f" but {network}" if network else ""
    return (
        f"weights {path!r} hold no vision transformer in a known layout{of} ({found}); known are "
        f"{KNOWN_LAYOUTS}."
    )


def encoders_of(model: nn.Module) -> list[tuple[str, FLSLViT]]:
    """List every ``FLSLViT`` in a model with the prefix of its weights (``backbone.net.``)."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, FLSLViT)]
    return [(f"{name}." if name else "", module) for name, module in found]


def load_encoder(encoder: FLSLViT, weights: EncoderWeights, path: str) -> LoadReport:
    """Load weights into an encoder and log one line of how many matched.

    Relative position tables that the weights lack keep their start value; at zero, as the encoder
    makes them, they change nothing. Class tokens and registers are left out, with a reason, where
    the encoder has ``num_prefix_tokens=0``.

    Args:
        encoder: changed in place, and only if everything fits.
        weights: result of :func:`find_encoder_weights`.

    Raises:
        InputError: the weights do not cover the encoder, or were made for another architecture.
    """
    check_architecture(encoder, weights, path)
    own = encoder.state_dict()
    state = dict(weights.tensors)
    origin = {name: weights.file_names.get(name, name) for name in state}
    report = LoadReport(
        path,
        weights.source,
        weights.location,
        dropped=dict(weights.dropped),
        note=weights.note,
        other_sets=list(weights.other_sets),
        encoder=encoder.architecture,
    )
    if "prefix_tokens" in state and "prefix_tokens" not in own:
        state.pop("prefix_tokens")
        report.dropped[origin["prefix_tokens"]] = (
            "tokens beside the patches, with their positions; the encoder has num_prefix_tokens=0, "
            "as windows require"
        )
    report.new = [name for name in own if name not in state and ".rel_pos_" in name]
    report.unused = sorted([*weights.unused, *(origin[name] for name in set(state) - set(own))])
    state.update({name: own[name] for name in report.new})
    report.matched = {n: origin[n] for n in own if n in state and n not in report.new}
    report.resampled = _adapt(encoder, state, "", path)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    logger.log(logging.WARNING if report.unused else logging.INFO, report.line())
    _compare_positions(encoder, weights)
    return report


def check_encoder_in_detector(
    encoder: FLSLViT, state: dict[str, Tensor], prefix: str, path: str
) -> None:
    """Adapt a detector's state dict to its encoder in place (position tables of other sizes).

    Raises:
        InputError: the encoder is not covered, or was made for another architecture.
    """
    part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    check_architecture(encoder, EncoderWeights("detector", part), path)
    for note in _adapt(encoder, state, prefix, path):
        logger.info("encoder weights: %s.", note)


def _adapt(encoder: FLSLViT, state: dict[str, Tensor], prefix: str, path: str) -> list[str]:
    try:
        fit = adapt_encoder_state(encoder, state, prefix)
    except InputError as error:
        raise InputError(f"weights {path!r}: {error}") from error
    if fit.unmatched:
        raise InputError(f"weights {path!r} cover {fit.shortfall()}.")
    for name in encoder.state_dict():
        check_values(state[prefix + name], prefix + name, path)
    return fit.notes


def check_values(tensor: Tensor, name: str, path: str) -> None:
    """Check that a tensor of a file can be a trained weight.

    Raises:
        InputError: its values are integers, infinite or NaN.
    """
    if not tensor.is_floating_point():
        raise InputError(
            f"weights {path!r} hold {name} as {tensor.dtype}, as quantised networks do; give the "
            "floating-point weights."
        )
    if not tensor.float().isfinite().all():
        raise InputError(
            f"weights {path!r} hold infinite values or NaN in {name}, as training that diverged "
            "leaves them; give an earlier checkpoint."
        )


def _compare_positions(encoder: FLSLViT, weights: EncoderWeights) -> None:
    """Log that the encoder resamples positions in another way than the source does."""
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
