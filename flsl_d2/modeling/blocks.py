"""The transformer block: attention and MLP, each under stochastic depth.

Shape suffixes: B images, H x W tokens of an image, T tokens of all images, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

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


class StochasticDepth(nn.Module):
    """Leave a residual branch out, for each image by itself (arXiv 1603.09382).

    What is left out is not computed, as in DINOv2 (arXiv 2304.07193) but with independent draws.

    Args:
        probability: probability of leaving a branch out in training; the other branches are
            scaled up to make up for it.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Branch, tokens: Tensor, shapes: PackedShapes | None) -> Tensor:
        """``tokens + branch(tokens, shapes)``: tokens (B, H, W, D), or packed (T, D)."""
        if not (self.training and self.probability):
            return tokens + branch(tokens, shapes)
        # Draws are made on the CPU, so that a GPU need not be waited for to know how many stay.
        counts = ((len(tokens), 1),) if shapes is None else shapes
        keep = 1 - self.probability
        draws = [torch.bernoulli(torch.full((count,), keep)).bool() for count, _ in counts]
        if not any(kept.any() for kept in draws):
            # Several processes exchange gradients of all weights, so each needs one.
            return tokens + 0 * branch(tokens, shapes)
        kept_images = [kept.nonzero()[:, 0] for kept in draws]
        rows = _rows_of(kept_images, counts, tokens.device)
        kept_shapes = None
        if shapes is not None:
            kept_shapes = tuple(
                (len(kept), length)
                for kept, (_, length) in zip(kept_images, counts, strict=True)
                if len(kept)
            )
        out = branch(tokens.index_select(0, rows), kept_shapes)
        out = (out / keep).to(tokens.dtype)
        # Unlike index_add, scatter_add does not keep what it adds for the backward pass.
        index = rows.view(-1, *[1] * (out.dim() - 1)).expand_as(out)
        return tokens.scatter_add(0, index, out)


def _rows_of(images: list[Tensor], counts: PackedShapes, device: torch.device) -> Tensor:
    """Rows of the tokens of images; their numbers alone are sent to the device.

    Args:
        images: for each size, numbers of images, on the CPU.
        counts: for each size, number of images and of rows of an image.
        device: device of the result.
    """
    starts, first = [], 0
    for chosen, (count, length) in zip(images, counts, strict=True):
        starts.append(first + chosen * length)
        first += count * length
    sent = to_device(torch.cat(starts), device)
    rows = [
        start if length == 1 else (start[:, None] + torch.arange(length, device=device)).flatten()
        for start, (_, length) in zip(sent.split([len(s) for s in starts]), counts, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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

    def forward(self, tokens: Tensor, shapes: PackedShapes | None = None) -> Tensor:
        """Tokens to tokens of the same shape.

        Args:
            tokens: (B, H, W, D); or, packed, (T, D) of images of several sizes.
            shapes: number of images and of tokens of an image, for each size; None if not packed.
        """
        tokens = self.drop_path(self._attention_branch, tokens, shapes)
        return self.drop_path(self._mlp_branch, tokens, shapes)

    def compile_in_place(self, backend: str = "inductor", mode: str = "default") -> None:
        """Compile the block for its present mode (``torch.compile``).

        In training with stochastic depth the two branches are compiled, for any number of images,
        as it leaves images out; otherwise the whole block is, for fixed sizes.

        Args:
            backend: backend of ``torch.compile``.
            mode: mode of ``torch.compile`` for blocks of fixed sizes. CUDA graphs are for fixed
                sizes alone, so branches of any number of images have the default mode.
        """
        # PyTorch takes no mode for the backends that only debug.
        options = {"mode": mode} if mode != "default" else {}
        if not (self.training and self.drop_path.probability):
            self.compile(dynamic=False, backend=backend, **options)
            return
        for name in ("_attention_branch", "_mlp_branch"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True, backend=backend))

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
