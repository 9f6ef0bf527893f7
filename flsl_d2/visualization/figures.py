"""Figures: tables of pictures, grids of small plots, and what is laid over an image.

Images are (H, W, 3) uint8 RGB. Figures are drawn with Agg and leave ``matplotlib.pyplot`` alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import Formatter, MaxNLocator, NullFormatter, ScalarFormatter

from flsl_d2.files import plain_line
from flsl_d2.visualization.fonts import families, pillow_font

COLOUR_MAP = "turbo"
PANEL_INCHES = 2.5
SHORTER_SIDE = 384
"""Pixels that small images are enlarged to before anything is drawn on them."""

_DPI = 100
_GAP_INCHES = 0.08
_SCALE_INCHES = 0.55
_LINE_INCHES = 0.17
_PLOTS_ACROSS = 3
_TITLE_SIZE = 13
_LONGEST_TITLE = 9.0  # inches, unless the pictures are wider
_FLAT = 1e-4  # range of values, as a share of them, below which a curve is drawn as flat
_MOST_PROPORTION = 2.5  # height by width of a row


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches."""
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, and make the folders on the way to it.

    Every text is drawn as it is, never as a formula, in fonts that have its characters.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log":  # the usual labels are formulas
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())
        elif isinstance(formatter := axis.get_major_formatter(), ScalarFormatter):
            formatter.set_useOffset(False)
            if abs(high - low) < _FLAT * max(abs(low), abs(high)):  # rounding is no curve
                axis.set_view_interval(low - _FLAT * abs(low), high + _FLAT * abs(high), True)
        else:  # labels that a caller has given
            axis.set_major_formatter(_printing(formatter))
        axis.get_ticklabels()  # makes the texts of the ticks
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    fonts = families(text.get_text() for text in texts)
    for text in texts:
        text.set_parse_math(False)
        text.set_text("\n".join(map(plain_line, text.get_text().split("\n"))))
        if len(fonts) > 1:
            text.set_fontfamily(fonts)
    settings: dict[Any, Any] = {"text.parse_math": False, "font.family": fonts}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # families() has named them
        # savefig draws twice, and compresses for longer than it draws.
        FigureCanvasAgg(figure).print_png(path, pil_kwargs={"compress_level": 2})


def _printing(formatter: Formatter) -> Callable[[float, float], str]:
    return lambda value, place: plain_line(formatter(value, int(place)))


class Panel(NamedTuple):
    """One picture of a table, (H, W, 3) uint8, and a note below it.

    ``span`` are the values at the ends of the colour map, where the picture shows values; a colour
    scale beside the picture names them.
    """

    image: np.ndarray
    note: str = ""
    span: tuple[float, float] | None = None


def picture_table(
    path: str | os.PathLike[str],
    title: str,
    rows: Sequence[Sequence[Panel]],
    headings: Sequence[str] = (),
    labels: Sequence[str] = (),
    width: float = PANEL_INCHES,
) -> None:
    """Write a page of pictures in rows and columns, each of a width in inches.

    The tallest gives the height of its row, and each panel keeps the proportions of its picture.
    """
    num_columns = max(len(row) for row in rows)
    scaled = [
        any(len(row) > column and row[column].span for row in rows) for column in range(num_columns)
    ]
    left = 1.2 if labels else _GAP_INCHES
    steps = [width + _GAP_INCHES + _SCALE_INCHES * has_scale for has_scale in scaled]
    x_of = left + np.concatenate([[0.0], np.cumsum(steps)])
    tall = [[width * panel.image.shape[0] / panel.image.shape[1] for panel in row] for row in rows]
    heights = [min(max(row), _MOST_PROPORTION * width) for row in tall]
    title = _fitting(title, max(float(x_of[-1]), _LONGEST_TITLE), _TITLE_SIZE)
    note_inches = _LINE_INCHES + 0.03 if any(panel.note for row in rows for panel in row) else 0.0
    top = 0.25 + 0.22 * _num_lines([title]) + _LINE_INCHES * _num_lines(headings)
    size = (
        max(float(x_of[-1]), _text_inches(title, _TITLE_SIZE) + 0.3),
        top + sum(heights) + (note_inches + _GAP_INCHES) * len(rows),
    )
    figure = new_figure(*size)
    figure.set_layout_engine("none")
    # One axes in inches from the upper left, because hundreds of axes would take many seconds.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    write = partial(axes.text, ha="center")
    write(size[0] / 2, 0.1, title, fontsize=_TITLE_SIZE, va="top")
    for x, heading in zip(x_of, headings, strict=False):
        text = _fitting(heading, width + _GAP_INCHES, 10)
        write(x + width / 2, top - 0.06, text, fontsize=10, va="bottom")
    y = top
    for index, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if labels:
            text, place = _fitting(labels[index], left - 0.2, 8), (left - 0.1, y + height / 2)
            axes.text(*place, text, fontsize=8, ha="right", va="center")
        for x, panel, own in zip(x_of, row, tall[index], strict=False):
            # A very tall picture is drawn narrower.
            wide, high = width * min(1.0, height / own), min(own, height)
            _show(axes, panel.image, x + (width - wide) / 2, y, wide, high)
            note = _fitting(panel.note, width, 8)
            write(x + width / 2, y + high + 0.04, note, fontsize=8, va="top")
            if panel.span:
                _draw_scale(axes, panel.span, x + width + 0.05, y, high)
        y += height + note_inches + _GAP_INCHES
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))  # imshow has set its own limits
    save_figure(figure, path)


def _show(axes: Axes, image: np.ndarray, x: float, y: float, width: float, height: float) -> None:
    extent = (x, x + width, y + height, y)
    axes.imshow(image, extent=extent, interpolation="antialiased", aspect="auto")


def _text_inches(text: str, size: float) -> float:
    """Width of a text in inches."""
    lines = [plain_line(line) for line in text.split("\n")]
    return max(pillow_font(line, 100).getlength(line) * size / 7200 for line in lines)


def _fitting(text: str, inches: float, size: float) -> str:
    """Cut the middle out of each line that is too long."""
    lines = [plain_line(line) for line in text.split("\n")]
    for number, line in enumerate(lines):
        keep = len(line)
        while keep > 4 and _text_inches(lines[number], size) > inches:
            keep = min(keep - 2, int(keep * inches / _text_inches(lines[number], size)))
            lines[number] = f"{line[: -(-keep // 2)]}…{line[-max(keep // 2, 1) :]}"
    return "\n".join(lines)


def _num_lines(texts: Sequence[str]) -> int:
    return max((text.count("\n") + 1 for text in texts), default=0)


def _draw_scale(axes: Axes, span: tuple[float, float], x: float, y: float, height: float) -> None:
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(1, 0, 256))[:, None, :3]
    _show(axes, (255 * colours).astype(np.uint8), x, y, 0.1, height)
    for value, place, alignment in ((span[1], y, "top"), (span[0], y + height, "bottom")):
        text = f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
        axes.text(x + 0.14, place, text, fontsize=7, va=alignment)


def plot_grid(count: int, title: str, num_legend_rows: int = 0) -> tuple[Figure, list[Axes]]:
    """Make a figure with small plots, three in a row; return both.

    Room is left below the plots for a legend of ``num_legend_rows``.
    """
    columns = min(_PLOTS_ACROSS, count)
    rows = -(-count // columns)
    height = 0.8 + 2.7 * rows + 0.25 * num_legend_rows
    figure = new_figure(max(5.0, 4.4 * columns), height)
    figure.suptitle(title, fontsize=14)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def label_plot(axes: Axes, title: str, x_label: str, y_label: str = "") -> None:
    """Give a small plot its texts, a grid, and whole numbers on the horizontal axis."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


# Most colour-blind readers can distinguish the first eight (Okabe and Ito).
_PALETTE = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167),
    (0, 114, 178), (255, 255, 255), (160, 82, 45), (148, 0, 211), (127, 255, 0), (255, 105, 180),
)  # fmt: skip


def palette(count: int) -> np.ndarray:
    """Return ``count`` colours, (count, 3) uint8; they repeat after a dozen."""
    return np.array([_PALETTE[i % len(_PALETTE)] for i in range(count)], np.uint8).reshape(-1, 3)


def enlarge(image: np.ndarray, shorter_side: int = SHORTER_SIDE) -> tuple[np.ndarray, float]:
    """Enlarge a small image, so that text on it can be read; return it and the factor."""
    factor = max(1.0, shorter_side / min(image.shape[:2]))
    if factor == 1.0:
        return image, factor
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), factor


def overlay_masks(
    image: np.ndarray, masks: Sequence[np.ndarray], colours: np.ndarray, opacity: float = 0.45
) -> np.ndarray:
    """Tint each mask, (h, w) bool, in its colour and draw its outline; holes stay clear.

    Masks have the image's aspect ratio and are resized to it; colours are (M, 3) uint8.
    """
    height, width = image.shape[:2]
    out = image.copy()
    for mask, colour in zip(masks, colours, strict=True):
        soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        inside = (soft >= 0.5).astype(np.uint8)
        tinted = (1 - opacity) * out + opacity * colour.astype(np.float32)
        out = np.where(inside[..., None] > 0, tinted, out).astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        thickness = max(1, min(height, width) // 250)
        cv2.drawContours(out, contours, -1, [int(c) for c in colour], thickness)
    return out


def overlay_heat(
    image: np.ndarray, values: np.ndarray, low: float, high: float, colour_map: str = COLOUR_MAP
) -> np.ndarray:
    """Lay values, (h, w) floats, one for each cell, over the greyed image as colours."""
    height, width = image.shape[:2]
    smooth = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    share = np.clip((smooth - low) / max(high - low, 1e-12), 0, 1)
    heat = matplotlib.colormaps[colour_map](share)[..., :3] * 255
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return (0.4 * grey + 0.6 * heat).astype(np.uint8)


def mark_cell(image: np.ndarray, grid: tuple[int, int], cell: int) -> np.ndarray:
    """Mark one cell of a grid over the image with a cross, white on black."""
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
