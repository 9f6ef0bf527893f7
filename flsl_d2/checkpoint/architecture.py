"""What weights say about the encoder that they were made for, compared with the one at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flsl_d2.checkpoint.layout import EncoderWeights
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.positions import grid_of_table, num_leading_positions

__all__ = [
    "architecture_from_shapes",
    "architecture_of",
    "check_architecture",
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
