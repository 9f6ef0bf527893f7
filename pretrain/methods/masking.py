"""Masked and dropped tokens: what is masked, masked inputs of the encoder, and a small decoder.

Shape suffixes: B images, N tokens of an image, M tokens that are masked, D width, P side of a
patch. All draws come from generators of the CPU that are seeded for each step.
"""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.positions import sincos_at
from flsl_d2.modeling.transfer import to_device
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods.base import Networks


class MaskedNetworks(Networks):
    """Networks whose encoder takes masked patches, each replaced by one learned token."""

    def __init__(self, backbone: FLSLViT, head: nn.Module | None = None) -> None:
        super().__init__(backbone, head)
        self.mask_token = nn.Parameter(torch.empty(backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def masked_tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to (B, N, D); masked patches keep their positions.

        The mask (B, rows, columns) is True where a patch is masked.
        """
        patches = self.backbone.embed(images, "none")
        # A gradient reaches the token even where nothing is masked, which several processes need.
        patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        tokens = patches + self.backbone.positions_of((patches.shape[1], patches.shape[2]))
        return self.backbone.forward_embedded(tokens.flatten(1, 2))


class TokenDecoder(nn.Module):
    """Small transformer over the tokens of the encoder, with its own width.

    Args:
        in_dim: width of the encoder.
        dim: width; a multiple of 4 and of ``num_heads``.
    """

    def __init__(
        self, in_dim: int, num_outputs: int, dim: int = 512, depth: int = 8, num_heads: int = 16
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise InputError(
                f"the decoder's width is {dim}; use a multiple of 4 and of its {num_heads} heads."
            )
        self.dim = dim
        self.embed = nn.Linear(in_dim, dim)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, dim) that are embedded already to (B, N, num_outputs)."""
        return self.predict(self.norm(self.blocks(tokens)))

    def predict_masked(
        self, tokens: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor
    ) -> Tensor:
        """Predict masked tokens (B, M, num_outputs) from the visible ones (B, N - M, in_dim).

        Args:
            mask_token: (dim,), which stands for every masked token.
            visible: (B, N - M) int64, indexes of the visible tokens in a square grid of N.
            masked: (B, M) int64, those of the masked ones.
        """
        embedded = self.embed(tokens)
        num_tokens = visible.shape[1] + masked.shape[1]
        everywhere = mask_token.to(embedded.dtype).expand(len(tokens), num_tokens, -1)
        full = everywhere.scatter(1, visible[..., None].expand_as(embedded), embedded)
        return gather_tokens(self(full + self.positions(num_tokens, tokens.device)), masked)

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return fixed sine-cosine positions (1, N, dim) of a square grid."""
        place = torch.arange(math.isqrt(num_tokens), device=device, dtype=torch.float32)
        return sincos_at(place, place, self.dim).view(1, num_tokens, self.dim)


def block_mask(side: int, most: float, least_block: float) -> Tensor:
    """Draw a mask made of rectangles (BEiT, arXiv 2106.08254, algorithm 1).

    Rectangles are added until they cover ``most`` tokens, or until none of 10 in a row fits. The
    draws are the authors' (Python's ``random``), in their order.

    Args:
        side: number of tokens along each side of a view.
        most: number of tokens that the mask may cover.
        least_block: smallest area that is drawn for a rectangle, before rounding.

    Returns:
        (side, side) bool on the CPU, True = masked.
    """
    mask = np.zeros((side, side), dtype=bool)
    while mask.sum() < most:
        room, before = most - mask.sum(), mask.sum()
        for _ in range(10):
            area = random.uniform(least_block, room)
            ratio = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= side or width >= side:
                continue
            top, left = random.randint(0, side - height), random.randint(0, side - width)
            block = mask[top : top + height, left : left + width]
            if 0 < block.size - block.sum() <= room:
                block[:] = True
                break
        if mask.sum() == before:
            break
    return torch.from_numpy(mask)


def masks_of_share(num_images: int, side: int, share: float) -> Tensor:
    """Draw a mask of at most ``share`` of the tokens for each image: (B, side, side) bool.

    Raises:
        InputError: the share is less than a token.
    """
    most = round(share * side**2)
    if most < 1:
        raise InputError(
            f"model.mask_share is {share:g} of a view of {side * side} tokens, which is less than "
            "one; use larger views or a larger share."
        )
    # Blocks of at least 16 tokens are BEiT's and MaskFeat's, on views of 14 x 14.
    return torch.stack([block_mask(side, most, min(16, most)) for _ in range(num_images)])


def random_split(
    num_images: int, num_tokens: int, share: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split the tokens of each image at random.

    Args:
        num_tokens: N.
        share: share of the tokens in the second part.

    Returns:
        Indexes (B, N - M) and (B, M); each part has at least one token.
    """
    count = min(max(round(share * num_tokens), 1), num_tokens - 1)
    order = to_device(torch.rand(num_images, num_tokens).argsort(dim=1), device)
    return order[:, : num_tokens - count], order[:, num_tokens - count :]


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """Pixels (B, N, 3 * P * P) of the patches of images (B, 3, H, W), channel by channel."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
