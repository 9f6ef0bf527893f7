"""The one entrance for weights: encoders from files, for tools, configs and checkpointers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, InputFormat
from flsl_d2.modeling.encoder_state import LoadReport, architecture_of, fit_encoder_state
from flsl_d2.weights.encoder_weights import EncoderWeights, find_encoder_weights, unknown_layout
from flsl_d2.weights.reading import local_weights_path, read_weights, split_weights_path
from flsl_d2.weights.sources import USUAL_HEADS

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2.checkpoint")


def build_encoder(path: str, which: str | None = None, **changes: Any) -> FLSLViT:
    """Build the encoder in a weight file, in evaluation mode on the CPU.

    It computes what the file's own model computes: class tokens and registers take part in
    attention, and positions are resampled as the source does it.

    Args:
        path: file or URL in any layout of :data:`flsl_d2.weights.sources.SOURCES`; it may end in
            ``?which=NAME``.
        which: name of a set of weights (``student``, ``state_dict_ema``); None takes the one that
            the file's own project evaluates.
        **changes: arguments of ``FLSLViT`` that differ from what the file says.

    Raises:
        InputError: the file cannot be read, or holds no encoder that ``FLSLViT`` can be.
    """
    return open_encoder(path, which, **changes)[0]


def open_encoder(path: str, which: str | None = None, **changes: Any) -> tuple[FLSLViT, LoadReport]:
    """Build the encoder as :func:`build_encoder` does, with the account of every weight."""
    arguments, stated_input, weights = _described(path, which, changes)
    if "num_heads" in changes:  # a number that is given wins over the source's usual one
        weights.stated.pop("num_heads", None)
    encoder = FLSLViT(**arguments)
    encoder.input_format = stated_input
    return encoder.eval(), load_encoder(encoder, weights)


def encoder_arguments(path: str) -> tuple[dict[str, Any], InputFormat]:
    """Return the arguments of ``FLSLViT`` for a file's encoder, and the pixels that it takes."""
    return _described(path, None, {})[:2]


def input_format(path: str) -> InputFormat:
    """Return the pixels that a file's encoder takes, or the default for its channels."""
    return encoder_arguments(path)[1]


def _described(
    path: str, which: str | None, changes: Mapping[str, Any]
) -> tuple[dict[str, Any], InputFormat, EncoderWeights]:
    content, local = read_weights(path), local_weights_path(path)
    which = which or split_weights_path(path)[1]
    weights = find_encoder_weights(content, which, path, local, changes)
    if weights is None:
        raise InputError(unknown_layout(content, path))
    arguments = {**architecture_of(weights.tensors), **weights.stated, **changes}
    subject = f"{weights.report.subject} ({weights.report.source})"
    missing = [key for key in ("embed_dim", "img_size", "depth") if key not in arguments]
    if missing:
        raise InputError(
            f"{subject} have no usable patch embedding or positions, so {', '.join(missing)} "
            "cannot be read off them; give a complete encoder."
        )
    arguments["num_heads"] = arguments.get("num_heads", USUAL_HEADS.get(arguments["embed_dim"]))
    if arguments["num_heads"] is None:
        raise InputError(
            f"{subject} do not tell their number of attention heads, and models of width "
            f"{arguments['embed_dim']} differ in it; give num_heads."
        )
    return arguments, _stated_input(content, local, arguments["in_chans"], subject), weights


def _stated_input(
    content: Mapping[str, Any], local: str, channels: int, subject: str
) -> InputFormat:
    """Return the pixels that a file, or transformers' preprocessor config beside it, states."""
    stated = content.get("input")
    if not isinstance(stated, Mapping) or "channels" not in stated:
        try:
            text = Path(local).with_name("preprocessor_config.json").read_text("utf-8-sig")
            config = json.loads(text)
            mean, std = ([255 * x for x in config[f"image_{key}"]] for key in ("mean", "std"))
            return InputFormat.from_dict({"channels": 3, "bits": 8, "mean": mean, "std": std})
        except (OSError, ValueError, KeyError, TypeError):
            return InputFormat.default(channels)
    try:
        return InputFormat.from_dict(stated)
    except ValueError as error:
        raise InputError(
            f"{subject} state an input format that is incomplete ({error}); export the encoder "
            "again."
        ) from error


def encoders_of(model: nn.Module) -> list[tuple[str, FLSLViT]]:
    """List every ``FLSLViT`` in a model with the prefix of its weights (``backbone.net.``)."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, FLSLViT)]
    return [(f"{name}." if name else "", module) for name, module in found]


def load_encoder(encoder: FLSLViT, weights: EncoderWeights) -> LoadReport:
    """Load weights into an encoder, only if everything fits, and log how many matched.

    Raises:
        InputError: the weights do not cover the encoder, or were made for another architecture.
    """
    state, names = dict(weights.tensors), weights.file_names
    report = fit_encoder_state(encoder, state, "", deepcopy(weights.report), weights.stated)
    report.matched = {own: names.get(own, own) for own in report.matched}
    report.dropped = {names.get(name, name): why for name, why in report.dropped.items()}
    report.unused = sorted(names.get(name, name) for name in report.unused)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            tensor.copy_(state[name])
    logger.log(logging.WARNING if report.unused else logging.INFO, report.line())
    own, stated = encoder.architecture, weights.stated
    keys = [key for key in ("position_offset", "position_antialias") if key in stated]
    if any(stated[key] != own[key] for key in keys):
        logger.info(
            "encoder weights: the source resamples positions with %s, this encoder with %s; at "
            "other image sizes than %d features differ a little.",
            ", ".join(f"{key}={stated[key]}" for key in keys),
            ", ".join(f"{key}={own[key]}" for key in keys),
            own["img_size"],
        )
    return report
