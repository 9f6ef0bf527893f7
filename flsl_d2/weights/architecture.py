"""The architecture that weights were made for, compared with an encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.positions import grid_of_table, num_leading_positions
from flsl_d2.weights.alignment import EncoderWeights

# Arguments that shapes tell, or that change the result without changing a shape.
_COMPARED = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")


def architecture_of(weights: EncoderWeights) -> dict[str, Any]:
    """Collect every argument of ``FLSLViT`` that is known of the weights."""
    return {**_from_shapes(weights.tensors), **weights.architecture}


def check_architecture(encoder: FLSLViT, weights: EncoderWeights, path: str) -> None:
    """Compare what the weights were made for with the encoder.

    Raises:
        InputError: values that differ (each named), or parts that no ``FLSLViT`` has.
    """
    refuse_unsupported(weights, path)
    stated = architecture_of(weights)
    own = encoder.architecture
    differing = [key for key in _COMPARED if stated.get(key) not in (None, own[key])]
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
    """Refuse weights of parts that no ``FLSLViT`` has.

    Raises:
        InputError: the first such part by name, with one of its weights.
    """
    if weights.unsupported:
        name, part = next(iter(weights.unsupported.items()))
        raise InputError(
            f"weights {path!r} ({weights.source}) have {part} ({name}), which FLSLViT does not "
            "compute; give weights of a plain ViT."
        )


def _from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
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
        known["mlp_ratio"] = _ratio(*hidden.shape)
    known["layer_scale_init"] = 1.0 if "blocks.0.ls1.gamma" in tensors else None
    known["final_norm"] = any(n.startswith(("final_norm.", "norm.")) for n in tensors)
    prefix = tensors.get("prefix_tokens")
    known["num_prefix_tokens"] = 0 if prefix is None else prefix.shape[1]
    return {**known, **_relative_positions(tensors, known)}


def _ratio(hidden: int, width: int) -> float:
    """Divide so that ``int(width * ratio)`` is ``hidden`` in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _relative_positions(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Read ViTDet's windows: a table has 2 G - 1 rows for G tokens, fewer in windows."""
    tables = [tensors.get(f"blocks.{i}.attn.rel_pos_h") for i in range(known["depth"])]
    present = [table for table in tables if table is not None]
    if len(present) < len(tables) or "patch_size" not in known:
        return {"use_rel_pos": False}
    sizes = [(len(table) + 1) // 2 for table in present]
    found = {
        "use_rel_pos": True,
        "num_heads": known["embed_dim"] // present[0].shape[-1],
        "rel_pos_img_size": max(sizes) * known["patch_size"],
    }
    if min(sizes) < max(sizes):
        found["window_size"] = min(sizes)
        found["global_block_indexes"] = [i for i, size in enumerate(sizes) if size == max(sizes)]
    return found
