"""Curves of a run from Detectron2's metrics.json, which has a JSON object on each line."""

from __future__ import annotations

import json
import math
import os

from flsl_d2.errors import InputError
from flsl_d2.visualization.figures import label_plot, plot_grid, save_figure

Series = dict[str, tuple[list[int], list[float]]]

_LINE, _RESUMED = "#0072b2", "#d55e00"
# Title and unit of the numbers of pre-training and Detectron2, in the order of the plots.
_NAMES = {
    "loss": ("total loss", "loss"),
    "total_loss": ("total loss", "loss"),
    "loss_intra": ("intra-view loss: token to its mode", "loss"),
    "loss_inter": ("inter-view loss: mode to centroids", "cross-entropy in nats"),
    "loss_volume": ("volume maximisation", "KL divergence in nats"),
    "bbox/AP": ("box AP", "AP in percent"),
    "segm/AP": ("mask AP", "AP in percent"),
    "bbox/AP50": ("box AP at IoU 0.5", "AP in percent"),
    "segm/AP50": ("mask AP at IoU 0.5", "AP in percent"),
    "centroids_in_use": ("centroids in use", "number"),
    "assignment_entropy": ("entropy of the mean assignment", "nats"),
    "feature_std": ("standard deviation of features", ""),
    "grad_norm": ("gradient norm", ""),
    "position_r2": ("position R²: what positions predict", ""),
    "lr": ("learning rate", ""),
    "teacher_temp": ("teacher temperature", ""),
    "teacher_momentum": ("teacher momentum", ""),
    "weight_decay": ("weight decay", ""),
    "intra_weight": ("weight of the intra-view loss", ""),
    "images_per_second": ("throughput", "images a second"),
    "time": ("duration of an iteration", "seconds"),
    "data_time": ("waiting for data", "seconds an iteration"),
}
_NOT_SHOWN = ("iteration", "eta_seconds", "progress", "rank_data_time")
# Largest over smallest value above which the axis is logarithmic.
_LOG_FACTOR = 30.0
_FEW_VALUES = 20  # a curve of fewer values gets a dot for each


def read_metrics(metrics_json_path: str | os.PathLike[str]) -> tuple[Series, list[int]]:
    """Read metrics.json.

    A run that was killed leaves a torn last line, and one that resumes from a checkpoint repeats
    iterations: torn lines are skipped, and the later line of a repeated iteration counts. Returned
    are the iterations and values of every key, and the iterations at which a run was resumed.

    Raises:
        InputError: the file does not exist, or has no metrics.
    """
    try:
        with open(metrics_json_path, encoding="utf-8", errors="replace") as stream:
            lines = stream.readlines()
    except OSError as error:
        raise InputError(
            f"{metrics_json_path} cannot be read ({error.strerror}): name the metrics.json in a "
            "run's output folder."
        ) from None
    values: dict[str, dict[int, float]] = {}
    resumed: list[int] = []
    last = -1
    for line in lines:
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        if iteration < last:
            resumed = [start for start in resumed if start < iteration] + [iteration]
            for series in values.values():
                for repeated in [i for i in series if i >= iteration]:
                    del series[repeated]
        last = iteration
        for key, value in record.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key != "iteration" and number and math.isfinite(value):
                values.setdefault(key, {})[iteration] = float(value)
    if not values:
        raise InputError(
            f"{metrics_json_path} has no metrics: expected a JSON object on each line, with "
            '"iteration" and numbers.'
        )
    ordered = {key: sorted(series.items()) for key, series in values.items() if series}
    return {key: ([i for i, _ in p], [v for _, v in p]) for key, p in ordered.items()}, resumed


def _default_keys(series: Series) -> list[str]:
    """Choose keys: those of `_NAMES` in their order, further losses after these, others last.

    Numbers that never change are left out, except AP. Keys of a group (``a/b``) that have no name
    are left out, too: an evaluation writes an AP for each class, dozens of plots of two points.
    """
    order = list(_NAMES)
    last_loss = order.index("loss_volume") + 0.5

    def place(key: str) -> tuple[float, str]:
        if key in order:
            return order.index(key), key
        return last_loss if "loss" in key else len(order), key

    changing = [k for k, (_, values) in series.items() if len(set(values)) > 1 or "/AP" in k]
    shown = [k for k in changing if k in _NAMES or ("/" not in k and k not in _NOT_SHOWN)]
    return sorted(shown, key=place)


def loss_curves(metrics_json_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw a small plot for every key of a metrics.json that changes, losses first, as PNG.

    Raises:
        InputError: the file is missing or empty.
    """
    series, resumed = read_metrics(metrics_json_path)
    keys = _default_keys(series) or sorted(series)
    folder = os.path.basename(os.path.dirname(os.path.abspath(metrics_json_path)))
    figure, plots = plot_grid(len(keys), f"Training curves of {folder}")
    first = min(series[key][0][0] for key in keys)
    last = max(series[key][0][-1] for key in keys)
    margin = max(0.5, 0.03 * (last - first))
    for plot, key in zip(plots, keys, strict=True):
        iterations, values = series[key]
        marker = "o" if len(values) < _FEW_VALUES else ""
        plot.plot(iterations, values, linewidth=1.6, marker=marker, markersize=4, color=_LINE)
        name, unit = _NAMES.get(key, (key, "loss" if "loss" in key else ""))
        label_plot(plot, name, "iteration", unit)
        plot.set_xlim(first - margin, last + margin)
        if min(values) > 0 and max(values) > _LOG_FACTOR * min(values) and key != "lr":
            plot.set_yscale("log")
        elif "/AP" in key:
            plot.set_ylim(0, max(1.0, 1.15 * max(values)))
        for number, start in enumerate(resumed):
            label = "resumed" if number == 0 else None
            plot.axvline(start, color=_RESUMED, linestyle=":", linewidth=1.2, label=label)
    if resumed:
        plots[0].legend(fontsize=8)
    save_figure(figure, path)
