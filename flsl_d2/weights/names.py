"""Conversion of other libraries' names and shapes of vision transformers to timm's.

Sources: ``modeling_vit.py``, ``modeling_dinov2.py`` and ``modeling_dinov2_with_registers.py`` of
huggingface/transformers; ``vision_transformer.py`` of open-mmlab/mmpretrain and mmsegmentation;
``vision_transformer.py`` of pytorch/vision; ``big_vision/models/vit.py`` of google-research;
``modeling/image_encoder.py`` of facebookresearch/segment-anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Name in timm: the tensor, and its name or names in the file.
Renamed = dict[str, tuple[Tensor, str]]

# For each library the beginning of its patch embedding's name, and replacements in timm's favour.
_LIBRARIES: dict[str, tuple[str, dict[str, str]]] = {
    "transformers": (
        "embeddings.patch_embeddings.",
        {
            r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
            r"^embeddings\.distillation_token$": "dist_token",
            r"^embeddings\.position_embeddings$": "pos_embed",
            r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
            r"^encoder\.layer\.": "blocks.",
            r"^layernorm\.": "norm.",
            r"\.attention\.attention\.(query|key|value)\.": r".attn.\1.",
            r"\.attention\.output\.dense\.": ".attn.proj.",
            r"\.intermediate\.dense\.": ".mlp.fc1.",
            r"^(blocks\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
            r"\.mlp\.weights_in\.": ".mlp.w12.",
            r"\.mlp\.weights_out\.": ".mlp.w3.",
            r"\.layernorm_before\.": ".norm1.",
            r"\.layernorm_after\.": ".norm2.",
            r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
        },
    ),
    "OpenMMLab": (
        "patch_embed.projection.",
        {
            r"^patch_embed\.projection\.": "patch_embed.proj.",
            r"^layers\.": "blocks.",
            r"\.ln([12])\.": r".norm\1.",
            r"^(ln1|norm1)\.": "norm.",
            r"^ln2\.": "fc_norm.",
            r"\.attn\.gamma1\.weight$": ".ls1.gamma",
            r"\.ffn\.gamma2\.weight$": ".ls2.gamma",
            r"\.attn\.attn\.in_proj_": ".attn.qkv.",
            r"\.attn\.attn\.out_proj\.": ".attn.proj.",
            r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
            r"\.ffn\.layers\.1\.": ".mlp.fc2.",
        },
    ),
    "torchvision": (
        "conv_proj.",
        {
            r"^conv_proj\.": "patch_embed.proj.",
            r"^class_token$": "cls_token",
            r"^encoder\.pos_embedding$": "pos_embed",
            r"^encoder\.layers\.encoder_layer_": "blocks.",
            r"^encoder\.ln\.": "norm.",
            r"^heads\.": "head.",
            r"\.ln_([12])\.": r".norm\1.",
            r"\.self_attention\.in_proj_": ".attn.qkv.",
            r"\.self_attention\.out_proj\.": ".attn.proj.",
            r"\.mlp\.(linear_1|0)\.": ".mlp.fc1.",
            r"\.mlp\.(linear_2|3)\.": ".mlp.fc2.",
        },
    ),
}
_SAM_MARKS = {"neck.0.weight", "blocks.0.attn.rel_pos_h"}

# Networks that are recognised by a name in the file and cannot be read.
_FOREIGN_NETWORKS = {
    r"(.*\.)?_flat_param$": "weights that FSDP has flattened; save them with FULL_STATE_DICT",
    r"(.*\.)?transformer\.resblocks\.": "OpenAI's or OpenCLIP's CLIP",
    r"(.*\.)?embeddings\.(class|patch)_embedding\b": "a CLIP or SigLIP of transformers",
    r"(.*\.)?vision_encoder\.layers\.\d+\.": "a Segment Anything of transformers",
    r"(.*\.)?embeddings\.(rope|register_tokens|patch_embeddings\.weight)": "a DINOv3 of "
    "transformers, which has rotary positions",
    r"(.*\.)?stages\.\d+\.": "a network of several stages",
    r"(.*\.)?layers\.\d+\.blocks\.": "a Swin transformer",
    r"(.*\.)?layer1\.\d+\.conv1\.": "a ResNet",
    r"(.*[./])?(blocks|layers?|encoderblock_\d+)[./](\d+[./])?": "a part of a transformer, without "
    "its patch embedding",
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
    """Rename the tensors of one encoder as timm does; names that no rule covers stay as they are.

    Args:
        tensors: name without prefix: tensor.
        file_names: name without prefix: name in the file.

    Returns:
        The library of the layout (``timm``, ``Flax``, ``SAM`` or one of :data:`_LIBRARIES`), and
        the tensors.
    """
    state = {name: (tensor, file_names[name]) for name, tensor in tensors.items()}
    if "embedding/kernel" in tensors:
        return "Flax", _stacked(_from_flax(state))
    for library, (mark, rules) in _LIBRARIES.items():
        if any(name.startswith(mark) for name in tensors):
            renamed = {}
            for name, entry in state.items():
                for pattern, replacement in rules.items():
                    name = re.sub(pattern, replacement, name)
                renamed[name] = entry
            return library, _stacked(renamed)
    table = tensors.get("pos_embed")
    if table is not None and table.dim() == 4 and _SAM_MARKS & tensors.keys():
        renamed = {re.sub(r"\.mlp\.lin([12])\.", r".mlp.fc\1.", n): e for n, e in state.items()}
        renamed["pos_embed"] = (table.flatten(1, 2), file_names["pos_embed"])
        return "SAM", renamed
    return "timm", state


def _stacked(renamed: Renamed) -> Renamed:
    """Stack query, key and value of each block, where all three are there."""
    result = dict(renamed)
    for name in renamed:
        block, query, kind = name.partition(".attn.query.")
        names = [f"{block}.attn.{part}.{kind}" for part in ("query", "key", "value")]
        if query and all(each in renamed for each in names):
            tensors, originals = zip(*(result.pop(each) for each in names), strict=True)
            result[f"{block}.attn.qkv.{kind}"] = (torch.cat(tensors), ", ".join(originals))
    return result


def _from_flax(state: Renamed) -> Renamed:
    """Rename and transpose the tensors of a Flax ViT.

    Kernels of linear layers are (in, out), of convolutions (rows, columns, in, out), of the
    projections in attention (in, heads, channels of a head) and (heads, channels, out). Newer
    files stack the blocks along a first dimension.
    """
    single: Renamed = {}
    for name, (tensor, original) in state.items():
        before, stacked, part = name.partition("Transformer/encoderblock/")
        for i in range(len(tensor) if stacked else 0):
            single[f"{before}Transformer/encoderblock_{i}/{part}"] = (tensor[i], f"{original}[{i}]")
        if not stacked:
            single[name] = (tensor, original)
    renamed: Renamed = {}
    for name, (tensor, original) in single.items():
        for pattern, (replacement, change) in _FLAX.items():
            new = re.sub(f"^{pattern}$", replacement, name)
            if new != name:
                renamed[new] = (change(tensor.float()).contiguous(), original)
                break
        else:
            renamed[name.replace("/", ".")] = (tensor, original)
    return renamed


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(kernel: Tensor) -> Tensor:
    return kernel.T


_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = _BLOCK + r"MultiHeadDotProductAttention_\d/"
_FLAX: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "embedding/kernel": ("patch_embed.proj.weight", lambda kernel: kernel.permute(3, 2, 0, 1)),
    "embedding/bias": ("patch_embed.proj.bias", _same),
    "cls": ("cls_token", _same),
    "(Transformer/posembed_input/)?pos_embedding": ("pos_embed", _same),
    "Transformer/encoder_norm/scale": ("norm.weight", _same),
    "Transformer/encoder_norm/bias": ("norm.bias", _same),
    f"{_BLOCK}LayerNorm_0/scale": (r"blocks.\1.norm1.weight", _same),
    f"{_BLOCK}LayerNorm_0/bias": (r"blocks.\1.norm1.bias", _same),
    f"{_BLOCK}LayerNorm_[12]/scale": (r"blocks.\1.norm2.weight", _same),
    f"{_BLOCK}LayerNorm_[12]/bias": (r"blocks.\1.norm2.bias", _same),
    rf"{_BLOCK}MlpBlock_\d/Dense_0/kernel": (r"blocks.\1.mlp.fc1.weight", _transposed),
    rf"{_BLOCK}MlpBlock_\d/Dense_0/bias": (r"blocks.\1.mlp.fc1.bias", _same),
    rf"{_BLOCK}MlpBlock_\d/Dense_1/kernel": (r"blocks.\1.mlp.fc2.weight", _transposed),
    rf"{_BLOCK}MlpBlock_\d/Dense_1/bias": (r"blocks.\1.mlp.fc2.bias", _same),
    f"{_ATTENTION}(query|key|value)/kernel": (
        r"blocks.\1.attn.\2.weight",
        lambda kernel: kernel.flatten(1).T,
    ),
    f"{_ATTENTION}(query|key|value)/bias": (r"blocks.\1.attn.\2.bias", torch.flatten),
    f"{_ATTENTION}out/kernel": (
        r"blocks.\1.attn.proj.weight",
        lambda kernel: kernel.flatten(0, 1).T,
    ),
    f"{_ATTENTION}out/bias": (r"blocks.\1.attn.proj.bias", _same),
}
