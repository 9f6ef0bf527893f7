"""Plots of many runs: bars, a measure over a grid, and the curves of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from flsl_d2.errors import InputError
from flsl_d2.studies.tables import Measure, Row, Table
from flsl_d2.visualization.curves import read_metrics
from flsl_d2.visualization.figures import label_plot, new_figure, plot_grid, save_figure

_COLOUR = "#0072b2"
_BEST_COLOUR = "#d55e00"
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1)), (0, (8, 2, 2, 2)))


def plot_file(folder: Path, name: str) -> Path:
    """Return the PNG file of a measure in a folder."""
    return folder / f"{name.replace('/', '_').replace(' ', '_')}.png"


def draw_measures(table: Table, folder: Path, axes: Sequence[str] = ()) -> dict[str, Path]:
    """Draw each measure that any row has, except durations; return the files by measure.

    ``axes`` are the label columns of a grid: none for bars, one for lines, more for heat maps.
    """
    drawn = {}
    for measure in table.measures:
        timing = measure.name == "images/s" or measure.name.endswith(" seconds")
        if timing or not any(row.cell(measure).values for row in table.rows):
            continue
        path = drawn[measure.name] = plot_file(folder, measure.name)
        if len(axes) >= 2:
            heat_maps(table, measure, axes[0], axes[1], path)
        elif axes:
            lines(table, measure, axes[0], path)
        else:
            bars(table, measure, path)
    return drawn


def bars(table: Table, measure: Measure, path: Path) -> None:
    """Draw a bar with its spread for each row that has the measure; the best are orange."""
    rows = [row for row in table.rows if row.cell(measure).values]
    best = [table.rows[i] for i in table.best(measure)]
    figure = new_figure(7.5, 0.9 + 0.42 * len(rows))
    axes = figure.subplots()
    axes.set_title(_heading(measure), fontsize=11)
    means = [mean(row.cell(measure).values) for row in rows]
    axes.barh(
        range(len(rows)),
        means,
        xerr=[row.cell(measure).std or 0.0 for row in rows],
        color=[_BEST_COLOUR if row in best else _COLOUR for row in rows],
        capsize=3,
        height=0.66,
    )
    axes.set_yticks(range(len(rows)), [", ".join(row.labels.values()) for row in rows], fontsize=9)
    for place, row in enumerate(rows):
        text = row.cell(measure).text(measure.digits)
        axes.annotate(
            text, (0.0, place), xytext=(4, 0), textcoords="offset points", va="center",
            color="white", fontsize=9, fontweight="bold", clip_on=True,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "#00000088", "edgecolor": "none"},
        )  # fmt: skip
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    save_figure(figure, path)


def lines(table: Table, measure: Measure, axis: str, path: Path) -> None:
    """Draw a measure against one key of the grid, a line for each setting of the other keys."""
    figure = new_figure(6.0, 4.2)
    axes = figure.subplots()
    axes.set_title(_heading(measure), fontsize=11)
    values = _values_of(table.rows, axis)
    for title, group in _groups(table, [axis]).items():
        rows = [row for row in group if row.cell(measure).values]
        rows.sort(key=lambda row: values.index(row.labels[axis]))
        axes.errorbar(
            [values.index(row.labels[axis]) for row in rows],
            [mean(row.cell(measure).values) for row in rows],
            yerr=[row.cell(measure).std or 0.0 for row in rows],
            marker="o",
            capsize=3,
            label=title,
        )
    axes.set_xticks(range(len(values)), values)  # evenly spaced, because grids are seldom linear
    axes.set_xlabel(axis)
    axes.grid(alpha=0.3)
    if len(table.label_names) > 1:
        axes.legend(fontsize=8)
    save_figure(figure, path)


def heat_maps(table: Table, measure: Measure, down: str, across: str, path: Path) -> None:
    """Draw a measure over two keys of the grid, a map for each setting of the other keys.

    The best cell is framed.
    """
    groups = _groups(table, [down, across])
    rows_of, columns_of = _values_of(table.rows, down), _values_of(table.rows, across)
    means = [mean(row.cell(measure).values) for row in table.rows if row.cell(measure).values]
    width, height = 1.6 + 1.1 * len(columns_of), 1.7 + 0.6 * len(rows_of)
    figure = new_figure(max(width * len(groups), 5.5), height)
    figure.suptitle(_heading(measure), fontsize=11)
    best = [table.rows[i] for i in table.best(measure)]
    plots = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, group) in zip(plots, groups.items(), strict=True):
        grid = np.full((len(rows_of), len(columns_of)), np.nan)
        places = [
            (rows_of.index(row.labels[down]), columns_of.index(row.labels[across])) for row in group
        ]
        for row, place in zip(group, places, strict=True):
            grid[place] = row.cell(measure).mean if row.cell(measure).values else np.nan
        axes.imshow(grid, "viridis", vmin=min(means), vmax=max(means), aspect="auto")
        low, high = np.nanmin(grid, initial=np.inf), np.nanmax(grid, initial=-np.inf)
        for row, (y, x) in zip(group, places, strict=True):
            bright = not grid[y, x] <= low + 0.6 * (high - low)  # or there is no number
            text = row.cell(measure).text(measure.digits).replace(" ± ", "\n± ")
            colour = "black" if bright else "white"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
            if row in best:
                frame = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, linewidth=4)
                frame.set_edgecolor(_BEST_COLOUR)
                axes.add_patch(frame)
        axes.set_xticks(range(len(columns_of)), columns_of)
        axes.set_yticks(range(len(rows_of)), rows_of)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        axes.set_title(title, fontsize=9)
    save_figure(figure, path)


def overlaid_curves(
    files: Mapping[str, Path], keys: Mapping[str, str], path: Path, title: str
) -> bool:
    """Draw the curves of several runs in one plot for each key.

    Args:
        files: metrics.json of each run by its label; those that cannot be read are left out.
        keys: keys of metrics.json, with the titles of their plots.

    Returns:
        Whether there was anything to draw.
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
        for i, ((label, run), colour) in enumerate(zip(series.items(), colours, strict=True)):
            # Dashes of different lengths keep curves apart that lie on one another.
            dashes = _DASHES[i % len(_DASHES)]
            steps, values = run.get(key, ([], []))
            marker = "o" if len(steps) == 1 else None
            axes.plot(
                steps, values, marker=marker, label=label, color=colour, linewidth=1.5,
                linestyle=dashes,
            )  # fmt: skip
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
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        shared = [f"{name}={value}" for name, value in row.labels.items() if name not in without]
        groups.setdefault(", ".join(shared), []).append(row)
    return groups
