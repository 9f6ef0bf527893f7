"""An encoder made for a weight file: its architecture is read off the file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.encoder_state import fit_encoder_state
from flsl_d2.modeling.positions import grid_of_table, num_leading_positions
from flsl_d2.weights.layout import EncoderWeights
from flsl_d2.weights.reading import read_weights, split_weights_path
from flsl_d2.weights.report import LoadReport, listed
from flsl_d2.weights.sources import KNOWN_LAYOUTS, USUAL_HEADS, find_encoder_weights

__all__ = [
    "architecture_from_shapes",
    "architecture_of",
    "build_encoder",
    "check_architecture",
    "encoders_of",
    "fit_encoder_in_detector",
    "load_encoder",
    "open_encoder",
    "refuse_unsupported",
]

# What the shapes of tensors say, or what changes the result without changing a shape.
_COMPARED = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")


def architecture_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``FLSLViT`` that its tensors give away by their names and shapes."""
    known: dict[str, Any] = {}
    patches = tensors.get("patch_embed.proj.weight")
    if patches is not None and patches.dim() == 4:
        known["embed_dim"], known["in_chans"], known["patch_size"], _ = patches.shape
    table = tensors.get("pos_embed")
    if table is not None and table.dim() == 3 and "patch_size" in known:
        positions = table.shape[1] - num_leading_positions(table.shape[1])
        known["img_size"] = grid_of_table(positions) * known["patch_size"]
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if not blocks:
        return known
    known["depth"] = max(blocks) + 1
    if "blocks.0.attn.qkv.weight" in tensors:
        known["qkv_bias"] = "blocks.0.attn.qkv.bias" in tensors
    hidden = tensors.get("blocks.0.mlp.fc1.weight")
    if hidden is not None:
        known["mlp_ratio"] = hidden.shape[0] / hidden.shape[-1]
    known["layer_scale_init"] = 1.0 if "blocks.0.ls1.gamma" in tensors else None
    known["final_norm"] = any(n.startswith(("final_norm.", "norm.")) for n in tensors)
    prefix = tensors.get("prefix_tokens")
    known["num_prefix_tokens"] = 0 if prefix is None else prefix.shape[1]
    return {**known, **_relative_positions(tensors, known)}


def _relative_positions(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """ViTDet's windows: a table has 2 G - 1 rows for G tokens, fewer in blocks with windows."""
    tables = [tensors.get(f"blocks.{i}.attn.rel_pos_h") for i in range(known["depth"])]
    if any(table is None for table in tables):
        return {"use_rel_pos": False}
    sizes = [(len(table) + 1) // 2 for table in tables]
    found = {
        "use_rel_pos": True,
        "num_heads": known["embed_dim"] // tables[0].shape[-1],
        "rel_pos_img_size": max(sizes) * known["patch_size"],
    }
    if min(sizes) < max(sizes):
        found["window_size"] = min(sizes)
        found["global_block_indexes"] = [i for i, size in enumerate(sizes) if size == max(sizes)]
    return found


def architecture_of(weights: EncoderWeights) -> dict[str, Any]:
    """Every argument of ``FLSLViT`` that is known of the weights."""
    return {**architecture_from_shapes(weights.tensors), **weights.architecture}


def check_architecture(encoder: FLSLViT, weights: EncoderWeights, path: str) -> None:
    """Compare what the weights were made for with the encoder.

    Raises:
        InputError: naming each value that differs, or parts that no ``FLSLViT`` has.
    """
    refuse_unsupported(weights, path)
    stated = architecture_of(weights)
    own = encoder.architecture
    differing = [key for key in _COMPARED if key in stated and stated[key] != own[key]]
    # These add or need weights. The reverse of some is fine: windows cannot hold prefix tokens,
    # new relative positions start at zero, and a last norm may be left out.
    if (stated.get("layer_scale_init") is None) != (own["layer_scale_init"] is None):
        differing += ["layer_scale_init"] if "layer_scale_init" in stated else []
    if stated.get("use_rel_pos") and not own["use_rel_pos"]:
        differing.append("use_rel_pos")
    if own["final_norm"] and not stated.get("final_norm", True):
        differing.append("final_norm")
    if own["num_prefix_tokens"] not in (0, stated.get("num_prefix_tokens", 0)):
        differing.append("num_prefix_tokens")
    if differing:
        of_file = ", ".join(f"{key}={stated.get(key)}" for key in differing)
        of_model = ", ".join(f"{key}={own[key]}" for key in differing)
        raise InputError(
            f"weights {path!r} are of an encoder with {of_file}, but the config's has {of_model}; "
            "change these keys of the config's encoder, or give other weights."
        )


def refuse_unsupported(weights: EncoderWeights, path: str) -> None:
    """Raise an InputError if the weights belong to parts that no ``FLSLViT`` has."""
    if weights.unsupported:
        name, what = next(iter(weights.unsupported.items()))
        raise InputError(
            f"weights {path!r} ({weights.source}) have {what} ({name}), which FLSLViT does not "
            "compute; give weights of a plain ViT."
        )


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
        weights: from :func:`flsl_d2.weights.sources.find_encoder_weights`.
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


def build_encoder(path: str, **changes: Any) -> FLSLViT:
    """The encoder in a weight file, in evaluation mode on the CPU.

    It computes what the file's own model computes: class tokens and registers take part in
    attention, and positions are resampled as the source does it.

    Args:
        path: file or URL in any layout of :data:`flsl_d2.weights.sources.SOURCES`;
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
