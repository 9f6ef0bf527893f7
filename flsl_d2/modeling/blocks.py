"""The transformer block: attention and MLP, each under stochastic depth.

Shape suffixes: B images, H x W tokens of an image, T tokens of all images, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flsl_d2.modeling.attention import (
    Attention,
    PackedShapes,
    merge_windows,
    split_into_windows,
    window_key_mask,
)
from flsl_d2.modeling.transfer import to_device

Branch: TypeAlias = Callable[[Tensor, PackedShapes | None], Tensor]


class Mlp(nn.Module):
    """Linear layer, GELU, linear layer.

    Args:
        dim: width of input and output.
        hidden_dim: width between the two layers.
        recompute: in training, keep the hidden layer once, before the GELU, and compute the GELU
            again in the backward pass. Saves a fifth of a block's memory; the linear layer behind
            the GELU is not computed again, because PyTorch stops as soon as it has what it needs.
    """

    def __init__(self, dim: int, hidden_dim: int, recompute: bool = True) -> None:
        super().__init__()
        self.recompute = recompute
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        hidden = self.fc1(x)
        # A compiler chooses by itself what to compute again.
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(self._activate, hidden, use_reentrant=False, preserve_rng_state=False)
        return self._activate(hidden)

    def _activate(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden))


class KeptImages(NamedTuple):
    """The images for which a residual branch is computed.

    Attributes:
        rows: (R,) int64, their rows among the tokens.
        factors: (R,) float32, what the branch of each row is multiplied by.
        shapes: their numbers and tokens, where tokens are packed; None if not packed.
    """

    rows: Tensor
    factors: Tensor
    shapes: PackedShapes | None


class StochasticDepth(nn.Module):
    """Per-sample stochastic depth (arXiv 1603.09382) of a fixed number of images.

    The block computes ``ceil(B * keep)`` of B images, as DINOv2 does (arXiv 2304.07193), so that no
    shape changes from step to step. One of them counts only sometimes, so that every image keeps
    its branch with exactly the probability ``keep``.

    Args:
        probability: probability of leaving a branch out in training; the other branches are
            scaled up to make up for it.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(
        self,
        branch: Branch,
        tokens: Tensor,
        shapes: PackedShapes | None,
        kept: KeptImages | None = None,
    ) -> Tensor:
        """``tokens + branch(tokens, shapes)``: tokens (B, H, W, D), or packed (T, D).

        ``kept`` are images of :func:`draw_kept_images`; None to draw them here.
        """
        if not (self.training and self.probability):
            return tokens + branch(tokens, shapes)
        if kept is None:
            (kept,) = draw_kept_images([self.probability], len(tokens), shapes, tokens.device)
        out = branch(tokens.index_select(0, kept.rows), kept.shapes)
        out = (out * kept.factors.view(-1, *[1] * (out.dim() - 1))).to(tokens.dtype)
        # Unlike index_add, scatter_add does not keep what it adds for the backward pass.
        index = kept.rows.view(-1, *[1] * (out.dim() - 1)).expand_as(out)
        return tokens.scatter_add(0, index, out)


def draw_kept_images(
    probabilities: Sequence[float],
    num_images: int,
    shapes: PackedShapes | None,
    device: torch.device,
) -> list[KeptImages]:
    """Draw the images of several branches, with one pair of copies to the device.

    Args:
        probabilities: for each branch, the probability of leaving it out; above 0.
        num_images: number of images, where they are not packed.
        shapes: see :class:`Block`.
        device: device of the results.
    """
    counts = ((num_images, 1),) if shapes is None else shapes
    drawn: list[Tensor] = []
    factors: list[Tensor] = []
    lengths: list[Tensor] = []
    kept_shapes: list[PackedShapes] = []
    for probability in probabilities:
        keep, first = 1 - probability, 0
        kept = []
        for count, length in counts:
            number = math.ceil(count * keep - 1e-6)
            chosen = torch.randperm(count)[:number]
            factor = torch.full((number,), 1 / keep)
            # The last one makes up for the rounding.
            factor[-1] *= float(torch.rand(()) < count * keep - (number - 1))
            drawn.append(first + chosen * length)
            factors.append(factor)
            lengths.append(torch.full((number,), length))
            kept.append((number, length))
            first += count * length
        kept_shapes.append(tuple(kept))
    starts, sizes = torch.cat(drawn), torch.cat(lengths)
    totals = [sum(count * length for count, length in kept) for kept in kept_shapes]
    scale = to_device(torch.cat(factors), device)
    if shapes is None:
        rows = to_device(starts, device)
    else:
        total = sum(totals)
        sent = to_device(torch.stack([starts - (sizes.cumsum(0) - sizes), sizes]), device)
        rows = torch.arange(total, device=device)
        rows = rows + sent[0].repeat_interleave(sent[1], output_size=total)
        scale = scale.repeat_interleave(sent[1], output_size=total)
    return [
        KeptImages(each, factor, None if shapes is None else kept)
        for each, factor, kept in zip(
            rows.split(totals), scale.split(totals), kept_shapes, strict=True
        )
    ]


class Block(nn.Module):
    """Pre-norm transformer block whose attention sees the whole grid or windows of it.

    Args:
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias: whether the query, key and value projections have a bias.
        drop_path: probability of leaving a residual branch out in training.
        window_size: side of the attention windows in tokens; 0 for global attention.
        rel_pos_size: side of the token grid of the relative positions; None for none.
        mask_window_padding: whether attention leaves out the padding of windows. False attends to
            the padded zeros as well, as Detectron2's ViT does.
        layer_scale_init: start value of LayerScale (DINOv2); None for no LayerScale.
        recompute_gelu: see ``recompute`` of :class:`Mlp`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        window_size: int,
        rel_pos_size: int | None,
        mask_window_padding: bool,
        layer_scale_init: float | None,
        recompute_gelu: bool,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.mask_window_padding = mask_window_padding
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias,
            window_size if rel_pos_size and window_size else rel_pos_size,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), recompute_gelu)
        self.drop_path = StochasticDepth(drop_path)
        self.ls1: nn.Module = nn.Identity()
        self.ls2: nn.Module = nn.Identity()
        if layer_scale_init is not None:
            self.ls1 = LayerScale(dim, layer_scale_init)
            self.ls2 = LayerScale(dim, layer_scale_init)

    def forward(
        self,
        tokens: Tensor,
        shapes: PackedShapes | None = None,
        kept: Sequence[KeptImages | None] = (None, None),
    ) -> Tensor:
        """Tokens to tokens of the same shape.

        Args:
            tokens: (B, H, W, D); or, packed, (T, D) of images of several sizes.
            shapes: number of images and of tokens of an image, for each size; None if not packed.
            kept: images of stochastic depth for attention and MLP; None to draw them here.
        """
        tokens = self.drop_path(self._attention_branch, tokens, shapes, kept[0])
        return self.drop_path(self._mlp_branch, tokens, shapes, kept[1])

    def compile_in_place(self, backend: str = "inductor", mode: str = "default") -> None:
        """Compile the block for its present mode (``torch.compile``).

        It is compiled once for all blocks, with any number of images where stochastic depth leaves
        another number out in each block.
        """
        # PyTorch takes no mode for the backends that only debug.
        options = {"mode": mode} if mode != "default" else {}
        dynamic = bool(self.training and self.drop_path.probability)
        self.compile(dynamic=dynamic, backend=backend, **options)

    def _attention_branch(self, tokens: Tensor, shapes: PackedShapes | None) -> Tensor:
        tokens = self.norm1(tokens)
        return self.ls1(
            self._attend(tokens) if shapes is None else self.attn.forward_packed(shapes, tokens)
        )

    def _mlp_branch(self, tokens: Tensor, _: PackedShapes | None) -> Tensor:
        return self.ls2(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(tokens)
        batch, height, width, _ = tokens.shape
        windows, padded = split_into_windows(tokens, size)
        key_mask = None
        if self.mask_window_padding and padded != (height, width):
            key_mask = window_key_mask(batch, (height, width), size, tokens.device)
        return merge_windows(self.attn(windows, key_mask), padded, (height, width))
