"""Images of several sizes through one pass of the encoder.

All tokens of all images lie in one long list, as NaViT packs patches (arXiv 2307.06304): linear
layers, norms and MLPs run once over the list, and attention runs for each size on its part of it.
Small views alone are too small to keep the hardware busy; together with large ones they are not.

Shape suffixes: B images of one size, N tokens of one of them, T tokens of all images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flsl_d2.errors import InputError
from flsl_d2.modeling.vit import FLSLViT

__all__ = ["packed_tokens"]


def packed_tokens(
    encoder: FLSLViT, batches: Sequence[Tensor], num_blocks: int | None = None
) -> list[Tensor]:
    """``[encoder.forward_tokens(images, num_blocks) for images in batches]`` in one pass.

    Equal up to rounding; stochastic depth draws other images, with the same probability.

    Args:
        encoder: one with global attention only, without relative positions and prefix tokens.
        batches: normalised images (B, 3, H, W), each entry of another size.
        num_blocks: see :meth:`FLSLViT.forward_tokens`.

    Returns:
        (B, N, D) for each entry.

    Raises:
        InputError: an encoder with windows, relative positions or prefix tokens.
    """
    _check_packable(encoder)
    parts = [encoder.embed(images).flatten(1, 2) for images in batches]
    shapes = tuple(tuple(part.shape[:2]) for part in parts)
    tokens = torch.cat([part.flatten(0, 1) for part in parts])  # (T, D)
    for block in encoder.blocks[:num_blocks]:
        if encoder.use_act_checkpoint and encoder.training and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, shapes, use_reentrant=False)
        else:
            tokens = block(tokens, shapes)
    if num_blocks is None:
        tokens = encoder.final_norm(tokens)
    sizes = [count * length for count, length in shapes]
    return [part.view(*shape, -1) for part, shape in zip(tokens.split(sizes), shapes, strict=True)]


def _check_packable(encoder: FLSLViT) -> None:
    first = encoder.blocks[0]
    windows = any(block.window_size for block in encoder.blocks)
    if windows or first.attn.use_rel_pos or encoder.num_prefix_tokens:
        raise InputError(
            "images of several sizes can be packed only for an encoder with window_size=0, "
            "use_rel_pos=False and num_prefix_tokens=0; set those, or encode size by size."
        )
