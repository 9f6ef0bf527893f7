"""Other libraries' names and shapes of vision transformers, changed to timm's.

Sources: ``modeling_vit.py``, ``modeling_dinov2.py`` and ``modeling_dinov2_with_registers.py`` of
huggingface/transformers; ``vision_transformer.py`` of open-mmlab/mmpretrain and mmsegmentation;
``vision_transformer.py`` of pytorch/vision; ``big_vision/models/vit.py`` of google-research;
``modeling/image_encoder.py`` of facebookresearch/segment-anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Name in timm: the tensor, and its name or names in the file.
Renamed = dict[str, tuple[Tensor, str]]

# For each library the beginning of its patch embedding's name, and replacements in timm's favour.
_LIBRARIES: dict[str, tuple[str, dict[str, str]]] = {
    "Flax": (
        "embedding/kernel",
        {
            r"^embedding/": "patch_embed.proj/",
            r"^cls$": "cls_token",
            r"^(Transformer/posembed_input/)?pos_embedding$": "pos_embed",
            r"^Transformer/encoder_norm/": "norm/",
            r"^Transformer/encoderblock_": "blocks.",
            r"/LayerNorm_0/": ".norm1/",
            r"/LayerNorm_[12]/": ".norm2/",
            r"/MlpBlock_\d/Dense_0/": ".mlp.fc1/",
            r"/MlpBlock_\d/Dense_1/": ".mlp.fc2/",
            r"/MultiHeadDotProductAttention_\d/out/": ".attn.proj/",
            r"/MultiHeadDotProductAttention_\d/": ".attn.",
            r"/(kernel|scale)$": ".weight",
            r"/": ".",
        },
    ),
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
    for pattern, network in _FOREIGN_NETWORKS.items():
        if any(re.match(pattern, name) for name in names):
            return network
    return ""


def to_timm_names(
    tensors: Mapping[str, Tensor], file_names: Mapping[str, str]
) -> tuple[str, Renamed]:
    """Rename the tensors of one encoder as timm does; names that no rule covers stay as they are.

    Returns:
        The library of the layout (``timm``, ``SAM`` or one of :data:`_LIBRARIES`), and the tensors
        with their names in the file.
    """
    state = {name: (tensor, file_names[name]) for name, tensor in tensors.items()}
    for library, (mark, rules) in _LIBRARIES.items():
        if any(name.startswith(mark) for name in tensors):
            state = _from_flax(state) if library == "Flax" else state
            return library, _stacked({_replaced(name, rules): state[name] for name in state})
    table = tensors.get("pos_embed")
    if table is not None and table.dim() == 4 and _SAM_MARKS & tensors.keys():
        state["pos_embed"] = (table.flatten(1, 2), file_names["pos_embed"])
        rules = {r"\.mlp\.lin([12])\.": r".mlp.fc\1."}
        return "SAM", {_replaced(name, rules): state[name] for name in state}
    return "timm", state


def _replaced(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def _stacked(renamed: Renamed) -> Renamed:
    """Stack query, key and value of each block, where all three are there."""
    result = dict(renamed)
    for name in renamed:
        block, query, kind = name.partition(".attn.query.")
        names = [f"{block}.attn.{part}.{kind}" for part in ("query", "key", "value")]
        if query and block.startswith("blocks.") and all(each in renamed for each in names):
            tensors, originals = zip(*(result.pop(each) for each in names), strict=True)
            result[f"{block}.attn.qkv.{kind}"] = (torch.cat(tensors), ", ".join(originals))
    return result


def _from_flax(state: Renamed) -> Renamed:
    """Bring a Flax ViT's tensors into PyTorch's shapes, and take stacked blocks apart.

    Kernels of linear layers are (in, out), of convolutions (rows, columns, in, out), of the
    projections in attention (in, heads, channels of a head) and (heads, channels, out).
    """
    single: Renamed = {}
    for name, (tensor, original) in state.items():
        before, stacked, part = name.partition("Transformer/encoderblock/")
        for i in range(len(tensor) if stacked else 0):
            single[f"{before}Transformer/encoderblock_{i}/{part}"] = (tensor[i], f"{original}[{i}]")
        if not stacked:
            single[name] = (tensor, original)
    return {name: (_of_pytorch(name, tensor), file) for name, (tensor, file) in single.items()}


def _of_pytorch(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.float()
    if name.endswith("/bias"):
        return tensor.flatten()
    if not name.endswith("/kernel"):
        return tensor
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    return (tensor.flatten(0, 1) if "/out/" in name else tensor.flatten(1)).T.contiguous()
