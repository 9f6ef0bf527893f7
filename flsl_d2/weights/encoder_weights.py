"""The encoder in the content of a file: its tensors by the names of ``FLSLViT``, and an account."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flsl_d2.errors import InputError
from flsl_d2.modeling.encoder_state import LoadReport, check_values, listed
from flsl_d2.modeling.positions import num_leading_positions
from flsl_d2.weights.names import foreign_network, to_timm_names
from flsl_d2.weights.sources import KNOWN_LAYOUTS, Source, recognise
from flsl_d2.weights.weight_sets import (
    WeightSet,
    choose_set,
    find_weight_sets,
    tensor_dicts,
)

# The name of the last norm in timm, and the one here; reversed, the pair exports.
TIMM_NAMES = (("norm.", "final_norm."),)
_NAMES = (*TIMM_NAMES, (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))

# Tokens beside those of the patches, in the order in which every source puts them.
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens")

# Reasons for leaving tensors out, by their names under the encoder's prefix.
_DROPPED = {
    r"(head|head_dist|pre_logits|((cls|distillation)_)?classifier)\.": "the classifier is not part "
    "of the encoder",
    r"(fc_norm|attn_pool|pooler|MAPHead_0)\.": "it pools the tokens for a classifier",
    r"(mask_token|masked_embed)$": "masks patches in pre-training only",
    r"decoder": "the decoder serves pre-training only",
}
# The same for names outside the prefix.
_DROPPED_OUTSIDE = {
    r"(.*\.)?(dino_head|ibot_head|ca_head|c_head|p_head|head|predictor|projector)\.": "the "
    "projection head serves pre-training only",
    **_DROPPED,
}
# Parts that FLSLViT does not compute, by the names of their weights.
_UNSUPPORTED = {
    r".*(lora_|base_layer\.)": "LoRA's factors (merge them into the weights first)",
    r"rope": "rotary positions",
    r"blocks\.\d+\.mlp\.(w12|w3|w1|w2|fc1_g|fc1_x)\b": "SwiGLU instead of an MLP",
    r"blocks\.\d+\.attn\.([qk]_norm|norm_[qk])\b": "normalised queries and keys",
    r"blocks\.\d+\.attn\.(relative_position|rel_pos\.)": "relative position biases",
    r"norm_pre\b|pre_norm\b": "a norm before the first block (CLIP)",
    r"(blocks|patch_embed|pos_embed_|embeddings|encoder|layers)": "weights that a plain ViT lacks",
}
_SUPPORTED = re.compile(
    r"patch_embed\.proj\.(weight|bias)$"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)$"
    r"|blocks\.\d+\.(ls[12]\.gamma|attn\.rel_pos_[hw])$"
)
_LAST_NORMS = ("norm.weight", "final_norm.weight", "fc_norm.weight", "attn_pool.norm.weight")
# Least similarity of neighbours that tells the shape of a grid of learned positions.
_CLEAR_SIMILARITY = 0.3


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's tensors by the names of ``FLSLViT``, with what is known about them.

    Attributes:
        tensors: name in ``FLSLViT``: tensor.
        file_names: name in ``FLSLViT``: name or names in the file.
        stated: arguments of ``FLSLViT`` that file and source tell beyond shapes.
        report: account of the file, so far.
    """

    tensors: dict[str, Tensor]
    file_names: dict[str, str]
    stated: dict[str, Any]
    report: LoadReport


def find_encoder_weights(
    content: Mapping[str, Any],
    which: str | None = None,
    path: str = "",
    local: str = "",
    given: Mapping[str, Any] | None = None,
) -> EncoderWeights | None:
    """Find an encoder in the content of a file; None where no set of weights is a transformer's.

    Args:
        which: name of a set of weights, None for the default.
        path: name of the file, for messages.
        local: file on this machine; a ``config.json`` of transformers beside it is read.
        given: arguments of ``FLSLViT`` that the user knows better than the file.

    Raises:
        InputError: there is no set of the name, nothing says which of several to take, or the set
            is a part of an encoder or has a part that ``FLSLViT`` does not compute.
    """
    sets = find_weight_sets(content)
    if not sets:
        return None
    chosen, given = choose_set(sets, which, path), given or {}
    layout, renamed = to_timm_names(chosen.tensors, chosen.file_names)
    if not any(name.startswith("blocks.") for name in renamed):
        return None
    file = replace(
        chosen,
        layout=layout,
        tensors={name: tensor for name, (tensor, _) in renamed.items()},
        file_names={name: original for name, (_, original) in renamed.items()},
    )
    source, stated = recognise(file)
    others = [each.label for each in sets if each is not chosen]
    report = LoadReport(path, source.name, file.location, note=source.note, other_sets=others)
    options = list(_options(file, local))
    heads = next((o["num_attention_heads"] for o in options if "num_attention_heads" in o), None)
    if isinstance(heads, int):
        stated["num_heads"] = heads
    needs_norm = source.norm and not source.refusal and given.get("final_norm") is not False
    depths = [o.get(key) for o in options for key in ("num_hidden_layers", "depth", "num_layers")]
    depth = max((each for each in depths if isinstance(each, int)), default=0)
    _check_whole(file.tensors, 0 if "depth" in given else depth, bool(needs_norm), report)
    grid = _stated_grid(file, options)
    weights = EncoderWeights(*_sorted(file, source, report), stated, report)
    _fold_prefix_tokens(weights, grid)
    _refuse_unsupported(weights, source.refusal)
    table = weights.tensors.get("pos_embed")
    if not source.architecture_key and "img_size" not in given and table is not None:
        _check_grid(table, grid, report)
    return weights


def unknown_layout(content: Mapping[str, Any], path: str) -> str:
    """Say what was found in a file without a known encoder, and which layouts are known."""
    dicts = list(tensor_dicts(content))
    network = foreign_network([name for _, tensors in dicts for name in tensors])
    found = f"no tensors; keys: {', '.join(str(key) for key in list(content)[:5]) or 'none'}"
    if dicts:
        containers, tensors = max(dicts, key=lambda item: len(item[1]))
        inside = f" under {' / '.join(containers)!r}" if containers else ""
        shown = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
        found = f"{len(tensors)} tensors{inside}: {shown}"
    of = f" but {network}" if network else ""
    return (
        f"weights {path!r} hold no vision transformer in a known layout{of} ({found}); known are "
        f"{KNOWN_LAYOUTS}."
    )


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace a dotted name's head (old and new end with a dot) or tail (they start with one)."""
    for old, new in pairs:
        if old.endswith(".") and name.startswith(old):
            return new + name[len(old) :]
        if old.startswith(".") and name.endswith(old):
            return name[: -len(old)] + new
    return name


def _options(file: WeightSet, local: str) -> Iterator[Mapping[str, Any]]:
    """Yield the options of a training script in a file, and transformers' config beside it."""
    for key in ("args", "config", "cfg", "hyper_parameters", "model_args"):
        if isinstance(file.content.get(key), Mapping):
            yield file.content[key]
    try:
        config = json.loads(Path(local).with_name("config.json").read_text("utf-8-sig"))
    except (OSError, ValueError):
        return
    patches = file.tensors.get("patch_embed.proj.weight")
    width = None if patches is None else patches.shape[0]
    if isinstance(config, dict) and config.get("hidden_size") == width:
        yield config


def _check_whole(
    state: Mapping[str, Tensor], depth: int, needs_norm: bool, report: LoadReport
) -> None:
    """Refuse a part of an encoder, by evidence other than the shapes that are read off it."""
    empty = [name for name, tensor in state.items() if not tensor.numel()]
    if empty:
        raise InputError(
            f"{report.subject} hold empty tensors ({len(empty)}, first {empty[0]}), as DeepSpeed "
            "and FSDP write where each process keeps a share; gather the whole weights first."
        )
    patches = state.get("patch_embed.proj.weight")
    if patches is not None and patches.dim() == 4 and patches.shape[2] != patches.shape[3]:
        size = " x ".join(map(str, patches.shape[2:]))
        raise InputError(
            f"{report.subject} have patches of {size} pixels, and FLSLViT has square ones; give "
            "other weights, or use the model as timm:NAME."
        )
    numbers = {int(match[1]) for n in state if (match := re.match(r"blocks\.(\d+)\.", n))}
    depth = max(max(numbers, default=-1) + 1, depth)
    missing = sorted(set(range(depth)) - numbers)
    if missing:
        raise InputError(
            f"{report.subject} lack the blocks {listed(map(str, missing))} of {depth}, so they are "
            "a part of an encoder; give all parts, by their index if there is one, or depth=N for "
            "an encoder that ends there."
        )
    if needs_norm and not any(name in state for name in _LAST_NORMS):
        raise InputError(
            f"{report.subject} ({report.source}) end after block {depth - 1} without a last norm, "
            "so they are a part of an encoder; give all parts, by their index if there is one, or "
            "final_norm=False for an encoder that has none."
        )


def _stated_grid(file: WeightSet, options: list[Mapping[str, Any]]) -> tuple[int, int, int] | None:
    """Find rows, columns and further rows of the position table by an image size in the options."""
    table, patches = file.positions, file.tensors.get("patch_embed.proj.weight")
    if table is None or patches is None or patches.dim() != 4:
        return None
    keys = ("img_size", "input_size", "image_size", "crop_size")
    for size in (option[key] for option in options for key in keys if key in option):
        sides = [size, size] if isinstance(size, int) else size
        sides = sides[-2:] if isinstance(sides, list | tuple) else ()
        if len(sides) == 2 and all(isinstance(side, int) for side in sides):
            rows, columns = (side // patches.shape[2] for side in sides)
            leading = table.shape[1] - rows * columns
            if rows and columns and 0 <= leading <= 16:
                return rows, columns, leading
    return None


def _check_grid(table: Tensor, grid: tuple[int, int, int] | None, report: LoadReport) -> None:
    """Refuse positions of a grid that is not square, or looks as if it were not.

    Without an option that says so, learned positions tell it themselves: those of neighbours in a
    column are alike, and they lie one row apart in the table.
    """
    if table.dim() != 3:
        return
    count = table.shape[1]
    side = math.isqrt(count)
    remedy = "; give img_size=SIDE where the images were square, or other weights."
    if grid is not None and grid[0] != grid[1] and grid[0] * grid[1] == count:
        found = f"{grid[0]} x {grid[1]} patches, as its options say"
    elif side**2 != count:
        found, remedy = f"{count} patches, which make no square", "; give other weights."
    elif grid is None and (likely := _likely_columns(table, side)) != side:
        found = f"{count // likely} x {likely} patches, as neighbours in it show"
    else:
        return
    raise InputError(
        f"{report.subject} have positions of a grid of {found}, and FLSLViT has square "
        f"grids{remedy}"
    )


def _likely_columns(table: Tensor, side: int) -> int:
    """Guess the columns of a grid: ``side``, unless other rows are clearly more alike."""
    if table.is_meta or side < 4:
        return side
    rows = table[0].float()
    rows = normalize(rows - rows.mean(dim=0), dim=1)
    alike = {
        columns: float((rows[columns:] * rows[:-columns]).sum(dim=1).mean())
        for columns in range(4, side * side // 2)
        if side**2 % columns == 0 and side**2 // columns >= 4
    }
    best = max(alike, key=lambda columns: alike[columns])
    clear = alike[best] > _CLEAR_SIMILARITY and alike[side] < alike[best] / 2
    return best if clear else side


def _sorted(
    file: WeightSet, source: Source, report: LoadReport
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the encoder's tensors and their names in the file; enter all others in the report."""
    tensors: dict[str, Tensor] = {}
    file_names: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        if reason := _reason(name, {**source.dropped, **_DROPPED}):
            report.dropped[file.file_names[name]] = reason
        else:
            own = rename(name, _NAMES)
            tensors[own], file_names[own] = tensor, file.file_names[name]
    for name, original in file.outside.items():
        others = [s for s in report.other_sets if set(s.split(".")) & set(name.split("."))]
        reason = f"belongs to the set {others[0]!r}" if others else ""
        if reason := reason or _reason(name, {**source.dropped_outside, **_DROPPED_OUTSIDE}):
            report.dropped[original] = reason
        else:
            report.unused.append(original)
    return tensors, file_names


def _reason(name: str, reasons: Mapping[str, str]) -> str:
    return next((reason for pattern, reason in reasons.items() if re.match(pattern, name)), "")


def _fold_prefix_tokens(weights: EncoderWeights, grid: tuple[int, int, int] | None) -> None:
    """Make one tensor of class tokens and registers, each with its position if it has one."""
    tensors, file_names = weights.tensors, weights.file_names
    names = [n for n in _PREFIX_TOKENS if n in tensors and tensors[n].dim() == 3]
    table, leading = tensors.get("pos_embed"), 0
    added = [name for name in (*names, "pos_embed") if name in tensors]
    for name in added:
        check_values(tensors[name], file_names[name], weights.report)
    if len({tensors[name].shape[-1] for name in added}) > 1:
        raise InputError(
            f"{weights.report.subject} have tokens and positions of several widths, so they are of "
            "several models; give one whole encoder."
        )
    tokens = [tensors.pop(name) for name in names]
    most = max(sum(token.shape[1] for token in tokens), 1)
    if table is not None and table.dim() == 3:
        stated = grid is not None and grid[2] <= most
        leading = grid[2] if grid and stated else num_leading_positions(table.shape[1], most)
        tensors["pos_embed"] = table[:, leading:]
    if tokens:
        prefix = torch.cat(tokens, dim=1).clone()
        if table is not None and leading:
            prefix[:, :leading] += table[:, :leading]
        tensors["prefix_tokens"] = prefix
        file_names["prefix_tokens"] = ", ".join(file_names.pop(name) for name in names)
    elif leading:
        weights.report.dropped[f"{file_names['pos_embed']}[:, 0]"] = (
            "the position of a class token that the file does not hold"
        )


def _refuse_unsupported(weights: EncoderWeights, refusal: str) -> None:
    """Refuse a part that ``FLSLViT`` does not compute, and name one of its weights."""
    tensors = weights.tensors
    strange = [name for name in tensors if not _SUPPORTED.match(name)]
    found = {name: part for name in strange if (part := _reason(name, _UNSUPPORTED))}
    first, second = (tensors.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:
        found["blocks.0.mlp.fc1.weight"] = "SwiGLU instead of an MLP"  # timm packs its two parts
    if "blocks.0.norm1.weight" in tensors and "blocks.0.norm1.bias" not in tensors:
        found["blocks.0.norm1.weight"] = "RMSNorm, or norms without bias,"
    if "pos_embed" not in tensors and "blocks.0.attn.qkv.weight" in tensors and not found:
        found["pos_embed"] = "no position table (rotary positions, relative ones or none)"
    if refusal:
        found = {"blocks.0.norm1.weight": refusal}
    for name, part in found.items():
        raise InputError(
            f"{weights.report.subject} ({weights.report.source}) have {part} "
            f"({weights.file_names.get(name, name)}), which FLSLViT does not compute; give weights "
            "of a plain ViT, or use the model as timm:NAME."
        )
