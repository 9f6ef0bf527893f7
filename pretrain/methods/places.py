"""Places of student views' patches in the teacher's view, and the teacher's tokens there.

Shape suffixes: B images, Q queries, N tokens of a square grid, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["places_of_queries", "tokens_at"]


def places_of_queries(indexes: Tensor, num_tokens: int, places: Tensor) -> Tensor:
    """Centres of the queries' patches in the teacher's view.

    Token ``n`` of a view of G x G tokens has its centre at ``((n mod G) + 1/2) / G`` of the view's
    width and ``(floor(n / G) + 1/2) / G`` of its height; the view's box takes that into the
    teacher's view.

    Args:
        indexes: (B, Q) int64, the queries among the tokens of a student view.
        num_tokens: number of tokens of that view, G * G.
        places: (B, 4), see :class:`pretrain.methods.protocol.StepInputs`.

    Returns:
        (B, Q, 2): x and y as shares of the teacher's view.
    """
    side = math.isqrt(num_tokens)
    top, left, height, width = places[..., None].unbind(1)  # each (B, 1)
    x = left + (indexes % side + 0.5) / side * width
    y = top + (indexes.div(side, rounding_mode="floor") + 0.5) / side * height
    return torch.stack([x, y], dim=-1)


def tokens_at(tokens: Tensor, xy: Tensor) -> Tensor:
    """Tokens at any places, interpolated bilinearly between the centres of their patches.

    Args:
        tokens: (B, N, D), row-major.
        xy: (B, Q, 2), x and y as shares of the view. Places outside the outermost centres get the
            value at the border.

    Returns:
        (B, Q, D) float32.
    """
    side = math.isqrt(tokens.shape[1])
    grid = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    # Half precision would place the samples up to a patch off.
    with torch.autocast(tokens.device.type, enabled=False):
        out = F.grid_sample(
            grid, 2 * xy.float()[:, None] - 1, padding_mode="border", align_corners=False
        )
    return out[:, :, 0].transpose(1, 2)
