"""Figures without pyplot: no global state, no display, written as PNG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
