"""Conversion of other libraries' names and shapes of vision transformers to timm's.

Sources: ``modeling_vit.py``, ``modeling_dinov2.py`` and ``modeling_dinov2_with_registers.py`` of
huggingface/transformers; ``big_vision/models/vit.py`` of google-research/big_vision;
``modeling/image_encoder.py`` of facebookresearch/segment-anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Name in timm: the tensor, and its name or names in the file.
Renamed = dict[str, tuple[Tensor, str]]

_HUGGING_FACE = [
    (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.(weight|bias)$", r"norm.\1"),
]
_HUGGING_FACE_BLOCK = [
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.", "mlp.w3."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
]
_SAM_MARKS = {"neck.0.weight", "blocks.0.attn.rel_pos_h"}
_SAM_BLOCK = [(r"mlp\.lin([12])\.", r"mlp.fc\1.")]

# Networks that are recognised by a name in the file and cannot be read.
_FOREIGN_NETWORKS = {
    r"(.*\.)?_flat_param$": "weights that FSDP has flattened; save them with FULL_STATE_DICT",
    r"(.*\.)?transformer\.resblocks\.": "OpenAI's or OpenCLIP's CLIP",
    r"(.*\.)?embeddings\.(class|patch)_embedding\b": "a CLIP or SigLIP of transformers",
    r"(.*\.)?vision_encoder\.layers\.\d+\.": "a Segment Anything of transformers",
    r"(.*\.)?embeddings\.(rope|register_tokens|patch_embeddings\.weight)": "a DINOv3 of "
    "transformers, which has rotary positions",
    r"(.*\.)?encoder\.layers\.encoder_layer_\d+\.": "a ViT of torchvision",
    r"(.*\.)?stages\.\d+\.": "a network of several stages",
    r"(.*\.)?layers\.\d+\.blocks\.": "a Swin transformer",
    r"(.*\.)?layer1\.\d+\.conv1\.": "a ResNet",
    r"(.*/)?Transformer/": "a transformer of JAX (Flax) that lacks blocks or the patch embedding",
}


def foreign_network(names: list[str]) -> str:
    """Name the network that tensors of these names belong to; empty where it is unknown."""
    for pattern, network in _FOREIGN_NETWORKS.items():
        if any(re.match(pattern, name) for name in names):
            return network
    return ""


def to_timm_names(
    tensors: Mapping[str, Tensor], file_names: Mapping[str, str]
) -> tuple[str, Renamed]:
    """Rename the tensors of one encoder as timm does.

    Names that no rule covers stay as they are.

    Args:
        tensors: name without prefix: tensor.
        file_names: name without prefix: name in the file.

    Returns:
        The library of the layout (``timm``, ``transformers``, ``Flax`` or ``SAM``), and the
        tensors.
    """
    if "embedding/kernel" in tensors:
        return "Flax", _from_flax(tensors, file_names)
    if any(name.startswith("embeddings.patch_embeddings.") for name in tensors):
        renamed = {
            _replaced(name, _HUGGING_FACE, _HUGGING_FACE_BLOCK): (tensor, file_names[name])
            for name, tensor in tensors.items()
        }
        parts = (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
        )
        return "transformers", _stacked(renamed, parts)
    table = tensors.get("pos_embed")
    if table is not None and table.dim() == 4 and _SAM_MARKS & tensors.keys():
        renamed = {
            _replaced(name, [], _SAM_BLOCK): (tensor, file_names[name])
            for name, tensor in tensors.items()
        }
        renamed["pos_embed"] = (table.flatten(1, 2), file_names["pos_embed"])
        return "SAM", renamed
    return "timm", {name: (tensor, file_names[name]) for name, tensor in tensors.items()}


def _replaced(name: str, rules: list[tuple[str, str]], block_rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(f"^{pattern}", replacement, name)
    match = re.match(r"blocks\.\d+\.", name)
    if not match:
        return name
    rest = name[match.end() :]
    for pattern, replacement in block_rules:
        replaced = re.sub(f"^{pattern}", replacement, rest)
        if replaced != rest:
            return match[0] + replaced
    return name


def _stacked(renamed: Renamed, parts: tuple[str, str, str]) -> Renamed:
    """Stack query, key and value of each block, where all three are there."""
    result = dict(renamed)
    for name in renamed:
        block, query, kind = name.partition(parts[0])
        names = [f"{block}{part}{kind}" for part in parts]
        if query and all(each in renamed for each in names):
            tensors, originals = zip(*(result.pop(each) for each in names), strict=True)
            result[f"{block}attn.qkv{kind}"] = (torch.cat(tensors), ", ".join(originals))
    return result


def _from_flax(tensors: Mapping[str, Tensor], file_names: Mapping[str, str]) -> Renamed:
    """Rename and transpose the tensors of a Flax ViT.

    Kernels of linear layers are (in, out), of convolutions (rows, columns, in, out), of the
    projections in attention (in, heads, channels of a head) and (heads, channels, out). Newer
    files stack the blocks along a first dimension.
    """
    state = {name: (tensor.float(), file_names[name]) for name, tensor in tensors.items()}
    stacked = "Transformer/encoderblock/"
    depth = max((len(t) for n, (t, _) in state.items() if n.startswith(stacked)), default=0)
    for name in [name for name in state if name.startswith(stacked)]:
        tensor, original = state.pop(name)
        for i in range(depth):
            part = f"Transformer/encoderblock_{i}/{name.removeprefix(stacked)}"
            state[part] = (tensor[i], f"{original}[{i}]")
    renamed: Renamed = {}
    for name, (tensor, original) in state.items():
        for pattern, replacement, change in _FLAX:
            new = re.sub(f"^{pattern}$", replacement, name)
            if new != name:
                renamed[new] = (change(tensor).contiguous(), original)
                break
        else:
            renamed[name.replace("/", ".")] = (tensor, original)
    return _stacked(renamed, ("attn.query", "attn.key", "attn.value"))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(kernel: Tensor) -> Tensor:
    return kernel.T


_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = _BLOCK + r"MultiHeadDotProductAttention_\d/"
_FLAX: list[tuple[str, str, Callable[[Tensor], Any]]] = [
    (r"embedding/kernel", "patch_embed.proj.weight", lambda kernel: kernel.permute(3, 2, 0, 1)),
    (r"embedding/bias", "patch_embed.proj.bias", _same),
    (r"cls", "cls_token", _same),
    (r"(Transformer/posembed_input/)?pos_embedding", "pos_embed", _same),
    (r"Transformer/encoder_norm/scale", "norm.weight", _same),
    (r"Transformer/encoder_norm/bias", "norm.bias", _same),
    (_BLOCK + r"LayerNorm_0/scale", r"blocks.\1.norm1.weight", _same),
    (_BLOCK + r"LayerNorm_0/bias", r"blocks.\1.norm1.bias", _same),
    (_BLOCK + r"LayerNorm_[12]/scale", r"blocks.\1.norm2.weight", _same),
    (_BLOCK + r"LayerNorm_[12]/bias", r"blocks.\1.norm2.bias", _same),
    (_BLOCK + r"MlpBlock_\d/Dense_0/kernel", r"blocks.\1.mlp.fc1.weight", _transposed),
    (_BLOCK + r"MlpBlock_\d/Dense_0/bias", r"blocks.\1.mlp.fc1.bias", _same),
    (_BLOCK + r"MlpBlock_\d/Dense_1/kernel", r"blocks.\1.mlp.fc2.weight", _transposed),
    (_BLOCK + r"MlpBlock_\d/Dense_1/bias", r"blocks.\1.mlp.fc2.bias", _same),
    (
        _ATTENTION + r"(query|key|value)/kernel",
        r"blocks.\1.attn.\2.weight",
        lambda kernel: kernel.flatten(1).T,
    ),
    (_ATTENTION + r"(query|key|value)/bias", r"blocks.\1.attn.\2.bias", torch.flatten),
    (
        _ATTENTION + r"out/kernel",
        r"blocks.\1.attn.proj.weight",
        lambda kernel: kernel.flatten(0, 1).T,
    ),
    (_ATTENTION + r"out/bias", r"blocks.\1.attn.proj.bias", _same),
]
