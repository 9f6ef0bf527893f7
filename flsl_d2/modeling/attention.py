"""Multi-head self-attention over a token grid: global or windowed, with relative positions.

Numerically the attention of ViTDet (arXiv 2203.16527) as Detectron2 builds it, through PyTorch's
fused kernel instead of an explicit (N, N) matrix.

Shape suffixes: B images (or windows), H x W tokens, N = H * W, h heads, C channels of a head,
S side of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The sizes in one list of tokens of several images: (number of images, tokens of an image), ...
PackedShapes = tuple[tuple[int, int], ...]


def split_into_windows(tokens: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut a token grid into windows, padded with zeros at the bottom and right.

    Args:
        tokens: (B, H, W, D).
        size: side S of a window.

    Returns:
        (B * windows, S, S, D), windows row-major within an image, and the padded (H, W).
    """
    batch, height, width, dim = tokens.shape
    pad_h, pad_w = -height % size, -width % size
    if pad_h or pad_w:
        tokens = F.pad(tokens, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // size, (width + pad_w) // size
    tokens = tokens.view(batch, rows, size, columns, size, dim).transpose(2, 3)
    return tokens.reshape(-1, size, size, dim), (height + pad_h, width + pad_w)


def merge_windows(windows: Tensor, padded: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of :func:`split_into_windows`: (B * windows, S, S, D) to (B, H, W, D)."""
    size, dim = windows.shape[1], windows.shape[-1]
    rows, columns = padded[0] // size, padded[1] // size
    tokens = windows.view(-1, rows, columns, size, size, dim).transpose(2, 3)
    return tokens.reshape(-1, *padded, dim)[:, : grid[0], : grid[1]]


def window_key_mask(batch: int, grid: tuple[int, int], size: int, device: torch.device) -> Tensor:
    """Mask of the real tokens of every window: True = real, False = padding.

    Returns:
        (B * windows, 1, 1, S * S) bool, the form that fused attention broadcasts over heads and
        queries.
    """
    real = torch.ones(batch, *grid, 1, dtype=torch.uint8, device=device)
    windows, _ = split_into_windows(real, size)
    return windows.flatten(1)[:, None, None, :].bool()


class Attention(nn.Module):
    """Self-attention with optional decomposed relative positions.

    Args:
        dim: width of the tokens.
        num_heads: number of heads; divides ``dim``.
        qkv_bias: whether the query, key and value projections have a bias.
        rel_pos_size: side of the token grid that the relative position tables are made for;
            None for no relative positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        rel_pos_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = rel_pos_size is not None
        if rel_pos_size is not None:
            table = (2 * rel_pos_size - 1, dim // num_heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(table))
            self.rel_pos_w = nn.Parameter(torch.zeros(table))

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, H, W, D) to (B, H, W, D).

        Args:
            tokens: (B, H, W, D).
            key_mask: mask of the tokens that count as keys, from :func:`window_key_mask`.
        """
        batch, height, width, dim = tokens.shape
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, C)
        scale = self.scale
        channels = v.shape[-1]
        if self.use_rel_pos:
            q, k = self._append_relative_positions(q, k, (height, width))
            scale = 1.0
            if v.device.type == "cpu":
                # PyTorch's fused attention for CPUs needs values as wide as queries; otherwise the
                # attention matrix is stored.
                v = F.pad(v, (0, q.shape[-1] - channels))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, scale=scale)
        out = out[..., :channels].transpose(1, 2)
        return self.proj(out.reshape(batch, height, width, dim))

    def forward_packed(self, shapes: PackedShapes, tokens: Tensor) -> Tensor:
        """(T, D) to (T, D): one projection of all tokens, attention within each image."""
        sizes = [count * length for count, length in shapes]
        out = []
        for part, (count, length) in zip(self.qkv(tokens).split(sizes), shapes, strict=True):
            qkv = part.view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)  # each (B, h, N, C)
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            # The parts are joined after this projection, because its input is kept for the backward
            # pass and a joined input would be a second copy.
            out.append(self.proj(mixed.transpose(1, 2).reshape(count * length, -1)))
        return torch.cat(out)

    def _append_relative_positions(
        self, q: Tensor, k: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Fold the decomposed bias (MViTv2, arXiv 2112.01526, Eq. 5) into extra channels.

        The logit is ``scale * q.k + q.R_h[row] + q.R_w[column]``. Both biases depend on the key
        only through its row and column, so they are dot products of the query's H + W biases with
        a one-hot code of the key's place. Appending those to q and k gives the same logits from
        a plain attention, and no (N, N) bias is ever stored.
        """
        height, width = grid
        by_place = q.unflatten(2, grid)  # (B, h, H, W, C)
        rows = _relative_table(self.rel_pos_h, height)  # (H, H, C)
        columns = _relative_table(self.rel_pos_w, width)  # (W, W, C)
        biases = [
            torch.einsum("bnhwc,hkc->bnhwk", by_place, rows),
            torch.einsum("bnhwc,wkc->bnhwk", by_place, columns),
        ]
        # Fused attention on GPUs takes multiples of 8 channels in half precision.
        spare = -(q.shape[-1] + height + width) % 8
        biases.append(by_place.new_zeros(*by_place.shape[:-1], spare))
        q = torch.cat([q * self.scale, torch.cat(biases, dim=-1).flatten(2, 3)], dim=-1)
        row_code = torch.eye(height, dtype=k.dtype, device=k.device)[:, None].expand(-1, width, -1)
        column_code = torch.eye(width, dtype=k.dtype, device=k.device).expand(height, -1, -1)
        code = torch.cat([row_code, column_code], dim=-1).flatten(0, 1)  # (N, H + W)
        code = F.pad(code, (0, spare))
        k = torch.cat([k, code.expand(*k.shape[:2], -1, -1)], dim=-1)
        return q, k


def _relative_table(table: Tensor, size: int) -> Tensor:
    """Rows (size, size, C) of a table (2 G - 1, C) for every (query, key) offset along one axis."""
    wanted = 2 * size - 1
    if len(table) != wanted:
        table = F.interpolate(table.T[None], size=wanted, mode="linear")[0].T
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place[None, :] + size - 1]
