"""Stochastic depth for each image by itself, of one size or packed, without computing in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flsl_d2.modeling.attention import PackedShapes

__all__ = ["StochasticDepth"]

Branch: TypeAlias = Callable[[Tensor, PackedShapes | None], Tensor]


class StochasticDepth(nn.Module):
    """Leaves a residual branch out, for each image by itself (arXiv 1603.09382).

    Blocks that are compiled whole read the probability from a tensor, to share their code.

    Args:
        probability: of leaving a branch out in training; the others are scaled up to make up.
        skip_dropped: do not compute what is left out (as DINOv2 does, arXiv 2304.07193, but with
            independent draws). Blocks that are compiled whole compute it, as they want the same
            sizes each time.
    """

    def __init__(self, probability: float, skip_dropped: bool) -> None:
        super().__init__()
        self.probability, self.skip_dropped = probability, skip_dropped
        self.drops = probability > 0  # compiled blocks are compiled anew for every number they read
        self.register_buffer("keep", torch.tensor(1.0 - probability), persistent=False)

    @property
    def skips(self) -> bool:
        """Whether branches see fewer images in training than there are."""
        return self.skip_dropped and self.drops

    def forward(
        self,
        branch: Branch,
        tokens: Tensor,
        shapes: PackedShapes | None,
    ) -> Tensor:
        """``tokens + branch(tokens, shapes)``: tokens (B, H, W, D), or packed (T, D)."""
        if not (self.training and self.drops):
            return tokens + branch(tokens, shapes)
        if self.skips and not torch.compiler.is_compiling():
            return self._of_kept(branch, tokens, shapes)
        counts = [(len(tokens), 1)] if shapes is None else shapes
        keep = self.keep.float()
        factors = [
            (torch.bernoulli(keep.expand(count)) / keep).repeat_interleave(length)
            for count, length in counts
        ]
        out = branch(tokens, shapes)
        return tokens + out * torch.cat(factors).view(-1, *[1] * (out.dim() - 1)).to(out.dtype)

    def _of_kept(
        self,
        branch: Branch,
        tokens: Tensor,
        shapes: PackedShapes | None,
    ) -> Tensor:
        # Drawn on the CPU, so that a GPU need not be waited for to know how many are kept.
        counts = [(len(tokens), 1)] if shapes is None else shapes
        keep = 1 - self.probability
        draws = [torch.bernoulli(torch.full((count,), keep)).bool() for count, _ in counts]
        if not any(kept.any() for kept in draws):
            # Without a gradient for the branch, several processes would wait for it in vain.
            return tokens + 0 * branch(tokens, shapes)
        lengths = [length for _, length in counts]
        rows = [kept.repeat_interleave(n) for kept, n in zip(draws, lengths, strict=True)]
        rows = torch.cat(rows).nonzero()[:, 0].to(tokens.device, non_blocking=True)
        kept_shapes = None
        if shapes is not None:
            sums = [int(kept.sum()) for kept in draws]
            kept_shapes = tuple((k, n) for k, n in zip(sums, lengths, strict=True) if k)
        out = branch(tokens.index_select(0, rows), kept_shapes)
        return _AddToRows.apply(tokens, rows, out, 1 / keep)


class _AddToRows(torch.autograd.Function):
    """``tokens.index_add(0, rows, branch, alpha=scale)``, which would keep ``branch``."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, branch: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.scale, ctx.dtype = scale, branch.dtype
        return tokens.index_add(0, rows, branch.to(tokens.dtype), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        of_branch = gradient.index_select(0, rows).to(ctx.dtype).mul_(ctx.scale)
        return gradient, None, of_branch, None
