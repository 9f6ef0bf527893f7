"""Plots of studies: bars, a measure over a grid or over labels, and the curves of several runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from flsl_d2.errors import InputError
from flsl_d2.studies.table import Cell, Measure, Row, Table
from flsl_d2.visualization.curves import read_metrics
from flsl_d2.visualization.figures import label_plot, new_figure, plot_grid, save_figure

_COLOUR, _BEST_COLOUR = "#0072b2", "#d55e00"
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1)), (0, (8, 2, 2, 2)))


def plot_file(folder: Path, name: str) -> Path:
    """Return the PNG file of a measure in a folder."""
    return folder / f"{name.replace('/', '_').replace(' ', '_')}.png"


def draw_measures(table: Table, folder: Path, axes: Sequence[str] = ()) -> dict[str, Path]:
    """Draw each measure but durations and what is 0 in all rows; return the files by measure.

    ``axes`` are the label columns of a grid: from two on, heat maps are drawn instead of bars.
    """
    drawn = {}
    for measure in table.measures:
        timing = measure.name == "images/s" or measure.name.endswith(" seconds")
        if timing or not any(any(row.cell(measure).values) for row in table.rows):
            continue
        path = drawn[measure.name] = plot_file(folder, measure.name)
        if len(axes) >= 2:
            heat_maps(table, measure, axes[0], axes[1], path)
        else:
            bars(table, measure, path)
    return drawn


def bars(table: Table, measure: Measure, path: Path) -> None:
    """Draw a bar with its spread for each row that has the measure; the best are orange."""
    best = table.best(measure)
    shown = [(i, row) for i, row in enumerate(table.rows) if row.cell(measure).values]
    figure = new_figure(7.5, 0.9 + 0.42 * len(shown))
    axes = figure.subplots()
    axes.set_title(_heading(measure), fontsize=11)
    axes.barh(
        range(len(shown)),
        [mean(row.cell(measure).values) for _, row in shown],
        xerr=[row.cell(measure).std or 0.0 for _, row in shown],
        color=[_BEST_COLOUR if i in best else _COLOUR for i, _ in shown],
        capsize=3,
        height=0.66,
    )
    names = [", ".join(row.labels.values()) for _, row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=9)
    axes.set_ylabel(", ".join(table.label_names), fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    save_figure(figure, path)


def _line(axes: Axes, points: Sequence[tuple[float, Cell]], title: str) -> None:
    means = [mean(cell.values) for _, cell in points]
    spreads = [cell.std or 0.0 for _, cell in points]
    axes.errorbar([x for x, _ in points], means, spreads, marker="o", capsize=3, label=title)


def label_curves(
    table: Table, detectors: Sequence[tuple[str, str, int]], folder: Path
) -> tuple[list[list[object]], dict[str, Path]]:
    """Draw AP against the number of labelled images: a curve for each row of the table.

    Args:
        detectors: for each share, the detector, the start of its columns' names, number of images.

    Returns:
        Rows (encoder, detector, images, measure, mean, spread, seeds), and figures by measure.
    """
    kinds: defaultdict[str, defaultdict[str, list[tuple[int, Measure]]]]
    kinds = defaultdict(lambda: defaultdict(list))
    for detector, name, count in detectors:
        for measure in table.measures:
            if (kind := measure.name.removeprefix(f"{name}/")) != measure.name:
                kinds[kind][detector].append((count, measure))
    values: list[list[object]] = []
    drawn = {}
    for kind, by_detector in kinds.items():
        figure = new_figure(5.0 * len(by_detector), 4.2)
        panels = figure.subplots(1, len(by_detector), sharey=True, squeeze=False)[0]
        for axes, (detector, columns) in zip(panels, by_detector.items(), strict=True):
            columns.sort(key=lambda column: column[0])
            for row in table.rows:
                cells = [(n, cell) for n, m in columns if (cell := row.cell(m)).values]
                name = ", ".join(row.labels.values())
                values += [
                    [name, detector, count, kind, cell.mean, cell.std, len(cell.values)]
                    for count, cell in cells
                ]
                _line(axes, cells, name)
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([count for count, _ in columns], [str(count) for count, _ in columns])
            axes.set_xlabel("labelled images")
            axes.set_title(f"{detector}: {kind}", fontsize=11)
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
        path = drawn[kind] = plot_file(folder, f"labels_{kind}")
        save_figure(figure, path)
    return values, drawn


def heat_maps(table: Table, measure: Measure, down: str, across: str, path: Path) -> None:
    """Draw a measure over two keys of the grid, a map for each setting of the other keys.

    The best cells are framed. The colours span at least four mean standard deviations, so that
    noise has hardly any contrast.
    """
    groups = _groups(table, [down, across])
    rows_of, columns_of = _values_of(table.rows, down), _values_of(table.rows, across)
    cells = [row.cell(measure) for row in table.rows if row.cell(measure).values]
    means = [mean(cell.values) for cell in cells]
    noise = 4 * mean(cell.std or 0.0 for cell in cells)
    span = max(max(means) - min(means), noise, 0.02 * abs(mean(means)), 10.0**-measure.digits)
    low = (max(means) + min(means) - span) / 2
    width, height = 1.6 + 1.1 * len(columns_of), 1.7 + 0.6 * len(rows_of)
    figure = new_figure(max(width * len(groups), 5.5), height)
    figure.suptitle(_heading(measure), fontsize=11)
    best = [table.rows[i] for i in table.best(measure)]
    plots = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, group) in zip(plots, groups.items(), strict=True):
        grid = np.full((len(rows_of), len(columns_of)), np.nan)
        for row in group:
            y, x = rows_of.index(row.labels[down]), columns_of.index(row.labels[across])
            cell = row.cell(measure)
            grid[y, x] = np.nan if cell.mean is None else cell.mean
            bright = not grid[y, x] <= low + 0.6 * span  # or there is no number
            text = cell.text(measure.digits).replace(" ± ", "\n± ")
            colour = "black" if bright else "white"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
            if row in best:
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, linewidth=4)
                frame.set_edgecolor(_BEST_COLOUR)
                axes.add_patch(frame)
        axes.imshow(grid, "viridis", vmin=low, vmax=low + span, aspect="auto")
        axes.set_xticks(range(len(columns_of)), columns_of)
        axes.set_yticks(range(len(rows_of)), rows_of)
        axes.set(xlabel=across, ylabel=down)
        axes.set_title(title, fontsize=9)
    save_figure(figure, path)


def overlaid_curves(
    files: Mapping[str, Path], keys: Mapping[str, str], path: Path, title: str
) -> bool:
    """Draw the curves of several runs, metrics.json by label, in one plot for each key.

    Files that cannot be read are left out; false is returned if there is nothing to draw.
    """
    series = {}
    for label, file in files.items():
        try:
            series[label] = read_metrics(file)[0]
        except InputError:
            continue
    keys = {key: name for key, name in keys.items() if any(key in s for s in series.values())}
    if not keys:
        return False
    legend_columns = min(3, len(series))
    figure, plots = plot_grid(len(keys), title, -(-len(series) // legend_columns))
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, len(series)))
    for axes, (key, name) in zip(plots, keys.items(), strict=True):
        for i, (label, run) in enumerate(series.items()):
            steps, values = run.get(key, ([], []))
            # Dashes of different lengths keep curves apart that lie on one another.
            style = {"color": colours[i], "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.5}
            axes.plot(steps, values, marker="o" * (len(steps) == 1), label=label, **style)
        label_plot(axes, name, "step")
    handles = plots[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=8, ncols=legend_columns)
    save_figure(figure, path)
    return True


def _heading(measure: Measure) -> str:
    return f"{measure.name} ({measure.better} is better)" if measure.better else measure.name


def _values_of(rows: Sequence[Row], name: str) -> list[str]:
    """Return the values of a label in the order of the rows."""
    return list(dict.fromkeys(row.labels[name] for row in rows))


def _groups(table: Table, without: Sequence[str]) -> dict[str, list[Row]]:
    """Return the rows that have all labels in common but some, by these labels as text."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in table.rows:
        shared = [f"{name}={value}" for name, value in row.labels.items() if name not in without]
        groups[", ".join(shared)].append(row)
    return groups
