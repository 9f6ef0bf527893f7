"""Images, (H, W, 3) uint8 RGB, with something laid over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, drawn with Agg."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def show_image(axes: Axes, image: np.ndarray, note: str = "") -> None:
    """Show an image (H, W, 3) uint8 in its axes, without ticks, with a note below it."""
    axes.imshow(image, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    if note:
        axes.set_xlabel(note, fontsize=9)


class Sheet:
    """A page of many pictures and notes at places in inches, from the upper left corner.

    They share one axes: hundreds of axes would take many seconds.

    Args:
        width, height: of the page in inches.
        title: at its top.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.figure = new_figure(width, height)
        self.figure.set_layout_engine("none")
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._size = (width, height)
        self.write(title, width / 2, 0.1, 13, va="top")

    def show(self, image: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        """Show an image (H, W, 3) uint8 with its upper left corner at (x, y)."""
        extent = (x, x + width, y + height, y)
        self._axes.imshow(image, extent=extent, interpolation="antialiased", aspect="auto")

    def write(self, text: str, x: float, y: float, size: float, **alignment: Any) -> None:
        """Write a text, centred at x unless `ha` says otherwise."""
        self._axes.text(x, y, text, fontsize=size, **{"ha": "center", **alignment})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page as PNG."""
        width, height = self._size
        self._axes.set(xlim=(0, width), ylim=(height, 0))  # after imshow, which sets its own
        save_figure(self.figure, path)


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
