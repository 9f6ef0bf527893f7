"""Fixed sine-cosine positions, and resampling of position tables to other grids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError


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
    place = torch.arange(grid_size, dtype=torch.float64)
    return sincos_at(place, place, embed_dim).reshape(1, grid_size**2, embed_dim).float()


def sincos_at(rows: Tensor, columns: Tensor, embed_dim: int) -> Tensor:
    """Sine-cosine positions (..., H, W, D) of :func:`sincos_positions` at any coordinates.

    ``rows`` (..., H) and ``columns`` (..., W) are in steps of the grid.
    """
    quarter = embed_dim // 4
    exponent = torch.arange(quarter, dtype=rows.dtype, device=rows.device) / quarter
    frequency = 10000.0**-exponent

    def encode(coordinates: Tensor) -> Tensor:
        angle = coordinates[..., None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (..., n, D / 2)

    shape = (*rows.shape, columns.shape[-1], embed_dim // 2)
    by_column = encode(columns)[..., None, :, :].expand(shape)
    by_row = encode(rows)[..., :, None, :].expand(shape)
    return torch.cat([by_column, by_row], dim=-1)


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
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
        if not antialias:
            return _bicubic_by_matrices(square, grid, offset)
        grid = (int(grid[0]), int(grid[1]))  # a graph for images of its example's size
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


def _bicubic_by_matrices(square: Tensor, grid: tuple[int, int], offset: float) -> Tensor:
    """:func:`resample_positions` of (1, G, G, D) as two matrix products, for exported graphs.

    Where ``F.interpolate`` needs numbers, the sizes may be symbols here.
    """
    samples = [torch.arange(n, device=square.device, dtype=torch.float32) for n in grid]
    counts = [each[-1] + 1 for each in samples]
    side = square.shape[1]
    is_same = (counts[0] == side) & (counts[1] == side)  # the table is taken as it is
    steps = [side / (count + offset * (~is_same).float()) for count in counts]
    rows, columns = (
        _bicubic_weights((each + 0.5) * step - 0.5, side)
        for each, step in zip(samples, steps, strict=True)
    )
    return torch.einsum("rg,bghd,ch->brcd", rows, square.float(), columns).to(square.dtype)


def _bicubic_weights(places: Tensor, side: int) -> Tensor:
    """Weights (n, G) of the G cells of a table at n places, in cells.

    The cubic convolution of Keys (1981) with a = -0.75, which PyTorch uses; samples beyond the
    border take the cell at the border.
    """
    first = places.floor()
    cells = torch.arange(side, device=places.device, dtype=torch.float32)
    weights = torch.zeros((), device=places.device)
    for tap in (-1, 0, 1, 2):
        distance = (places - first - tap).abs()
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        weight = torch.where(distance <= 1, near, far)
        cell = (first + tap).clamp(0, side - 1)
        weights = weights + weight[:, None] * (cell[:, None] == cells).float()
    return weights
