"""Fixed sine-cosine positions, and resampling of position tables to other grids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError

__all__ = [
    "grid_of_table",
    "num_leading_positions",
    "resample_positions",
    "sincos_positions",
]


def sincos_positions(embed_dim: int, grid_size: int) -> Tensor:
    """Two-dimensional sine-cosine positions (arXiv 2104.02057, Sec. "position embedding").

    The first half of the channels encodes the column, the second half the row; each half holds
    the sines, then the cosines, of the coordinate times ``10000 ** (-2i / (embed_dim / 2))``.

    Args:
        embed_dim: width, a multiple of 4.
        grid_size: tokens along each side.

    Returns:
        (1, grid_size * grid_size, embed_dim), row-major.
    """
    if embed_dim % 4:
        raise InputError(
            f"embed_dim is {embed_dim}; sine-cosine positions in 2-D need a multiple of 4."
        )
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequency  # (G, D/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, D/2)
    by_column = line[None, :, :].expand(grid_size, -1, -1)
    by_row = line[:, None, :].expand(-1, grid_size, -1)
    table = torch.cat([by_column, by_row], dim=-1)  # (G, G, D)
    return table.reshape(1, grid_size * grid_size, embed_dim).float()


def grid_of_table(num_positions: int) -> int:
    """Return the side of the square grid of a position table with ``num_positions`` rows."""
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        raise InputError(
            f"a position table of {num_positions} tokens is not a square grid; "
            "drop class or register positions before loading it."
        )
    return side


def num_leading_positions(num_positions: int, most: int = 1) -> int:
    """Count the rows of a table before those of a square grid.

    Class tokens and registers have their positions there, in some sources.

    Args:
        num_positions: rows of the table.
        most: largest possible number of such rows.

    Returns:
        The smallest number of rows whose removal leaves a square; 0 where there is none.
    """
    for count in range(most + 1):
        rest = num_positions - count
        if rest > 0 and math.isqrt(rest) ** 2 == rest:
            return count
    return 0


def resample_positions(
    table: Tensor, grid: tuple[int, int], offset: float = 0.1, antialias: bool = False
) -> Tensor:
    """Resample a position table bicubically to another grid.

    Args:
        table: (1, G * G, D), row-major.
        grid: rows and columns of the result.
        offset: 0 makes the new grid cover the table exactly, as Detectron2's ViT does. 0.1 makes
            the step between samples ``G / (n + 0.1)``, as in DINO and the published FLSL code,
            whose weights were trained with it.
        antialias: whether the filter is widened where the table shrinks, as timm does (with
            offset 0).

    Returns:
        (1, rows, columns, D); a view of the table where the grid is the same.
    """
    side = grid_of_table(table.shape[1])
    square = table.reshape(1, side, side, -1)
    if torch.jit.is_tracing():
        # Scale factors are constants of a trace, so it holds for images of its example's size.
        grid = (int(grid[0]), int(grid[1]))
    if grid == (side, side):
        return square
    square = square.permute(0, 3, 1, 2)
    size = grid if offset == 0 else None
    factors = None if offset == 0 else [(n + offset) / side for n in grid]
    out = F.interpolate(
        square,
        size=size,
        scale_factor=factors,
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )[:, :, : grid[0], : grid[1]]
    return out.permute(0, 2, 3, 1).to(table.dtype)
