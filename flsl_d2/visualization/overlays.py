"""Images, (H, W, 3) uint8 RGB, with something laid over them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np

# Told apart by most colour-blind readers (Okabe and Ito), then paler ones for further classes.
_PALETTE = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167),
    (0, 114, 178), (255, 255, 255), (160, 82, 45), (148, 0, 211), (127, 255, 0), (255, 105, 180),
)  # fmt: skip


def palette(count: int) -> np.ndarray:
    """`count` colours, (count, 3) uint8 RGB; they repeat after a dozen."""
    return np.array([_PALETTE[i % len(_PALETTE)] for i in range(count)], np.uint8).reshape(-1, 3)


def enlarge(image: np.ndarray, shorter_side: int) -> tuple[np.ndarray, float]:
    """Enlarge a small image, so that text and lines on it can be read.

    Args:
        image: (H, W, 3) uint8.
        shorter_side: in pixels; images that have it already stay as they are.

    Returns:
        The image and the factor.
    """
    factor = max(1.0, shorter_side / min(image.shape[:2]))
    if factor == 1.0:
        return image, factor
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), factor


def overlay_masks(
    image: np.ndarray, masks: Sequence[np.ndarray], colours: np.ndarray, opacity: float = 0.45
) -> np.ndarray:
    """Tint each mask (h, w), resized to the image, and draw its outline; holes stay clear.

    Args:
        image: (H, W, 3) uint8.
        masks: bool, of any size with the image's aspect.
        colours: (M, 3) uint8, one a mask.
        opacity: of the tint.
    """
    height, width = image.shape[:2]
    out = image.copy()
    for mask, colour in zip(masks, colours, strict=True):
        soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        inside = (soft >= 0.5).astype(np.uint8)
        tinted = (1 - opacity) * out + opacity * colour.astype(np.float32)
        out = np.where(inside[..., None] > 0, tinted, out).astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(
            out, contours, -1, [int(c) for c in colour], max(1, min(height, width) // 250)
        )
    return out


def overlay_heat(
    image: np.ndarray, values: np.ndarray, low: float, high: float, colour_map: str = "turbo"
) -> np.ndarray:
    """Lay a map over the greyed image: the higher a value, the stronger its colour covers.

    Args:
        image: (H, W, 3) uint8.
        values: (h, w) floats, one a cell of the image.
        low, high: the values that the colour map starts and ends with.
    """
    height, width = image.shape[:2]
    smooth = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    share = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)
    heat = matplotlib.colormaps[colour_map](share)[..., :3] * 255
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return (0.4 * grey + 0.6 * heat).astype(np.uint8)


def mark_cell(image: np.ndarray, grid: tuple[int, int], cell: int) -> np.ndarray:
    """Mark one cell of a grid (rows, columns) over the image with a cross, white on black.

    Raises:
        ValueError: `cell` is not a row-major index into the grid.
    """
    rows, columns = grid
    if not 0 <= cell < rows * columns:
        raise ValueError(f"cell {cell} is not one of the grid's {rows} x {columns} cells")
    height, width = image.shape[:2]
    x = round((cell % columns + 0.5) * width / columns)
    y = round((cell // columns + 0.5) * height / rows)
    out = image.copy()
    arm = max(4, min(height, width) // 24)
    for colour, line in (((0, 0, 0), max(3, arm // 2)), ((255, 255, 255), max(1, arm // 5))):
        cv2.drawMarker(out, (x, y), colour, cv2.MARKER_CROSS, 2 * arm, line, cv2.LINE_AA)
    return out
