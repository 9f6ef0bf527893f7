"""The page of a sweep: table, plots over the grid, curves of all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flsl_d2.experiments.evaluations import Evaluation
from flsl_d2.experiments.jobs import Record, versions
from flsl_d2.experiments.page import Page
from flsl_d2.experiments.plots import bars, heat_maps, lines, overlaid_curves
from flsl_d2.experiments.tables import Subject, Table
from pretrain.studies.grid import Axis

__all__ = ["Sweep", "write_sweep_page"]

_CURVES = {
    "loss": "total loss",
    "loss_intra": "intra-view loss",
    "loss_inter": "inter-view loss",
    "loss_volume": "volume maximisation",
    "centroids_in_use": "centroids in use",
    "assignment_entropy": "assignment entropy (nats)",
}


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        tools: folder of the command lines.
        config_file: a pre-training config.
        axes: of the grid.
        overrides: of all runs.
        seeds: values of ``train.seed``; empty for the config's.
        output: folder of everything.
        evaluations: of each run's teacher.
        num_gpus: to use; on the CPU, processes.
        gpus_per_job: for each of the runs.
    """

    tools: Path
    config_file: str
    axes: Sequence[Axis]
    overrides: Sequence[str]
    seeds: Sequence[int]
    output: Path
    evaluations: Sequence[Evaluation] = ()
    num_gpus: int = 1
    gpus_per_job: int = 1


def write_sweep_page(
    sweep: Sweep,
    table: Table,
    runs: Sequence[Subject],
    records: dict[str, Record],
    names: Sequence[str],
) -> None:
    """Write the plots and ``index.html``: table, measures over the grid, and loss curves."""
    plots = sweep.output / "plots"
    drawn = _draw_measures(table, plots, [name for name in names if _varies(table, name)])
    metrics = {
        run.jobs["pretrain"][0].label: sweep.output / run.about["folder"] / "metrics.json"
        for run in runs
    }
    curves = plots / "loss_curves.png"
    overlaid_curves(metrics, _CURVES, curves, "Pre-training")
    page = Page(f"Sweep of {Path(sweep.config_file).stem}")
    grid = "; ".join(f"{axis.key} = {', '.join(axis.values)}" for axis in sweep.axes)
    page.text(f"Grid: {grid or 'one setting'}. Common overrides: {' '.join(sweep.overrides)}")
    page.text("Losses and collapse indicators are means over the last tenth of a run's log.")
    page.table(table)
    page.heading("Measures over the grid")
    page.pictures(drawn, width=460)
    page.heading("Curves")
    page.pictures({"all runs": curves}, width=1150)
    page.heading("What was run")
    columns = list(runs[0].labels)
    page.records(
        [*columns, "folder", "seconds", "status"],
        [
            [*run.labels.values(), run.about["folder"], f"{record.seconds:.0f}", record.status]
            for run in runs
            for record in [records[run.jobs["pretrain"][0].key]]
        ],
    )
    page.text(", ".join(f"{name} {version}" for name, version in versions().items()))
    for run in runs:
        job = run.jobs["pretrain"][0]
        page.details(f"Config: {job.label}", json.dumps(job.settings["config"], indent=1))
    page.write(sweep.output / "index.html")


def _varies(table: Table, name: str) -> bool:
    return len({row.labels[name] for row in table.rows}) > 1


def _draw_measures(table: Table, folder: Path, axes: Sequence[str]) -> dict[str, Path]:
    """A plot of each measure that any setting has; the file by the measure's name."""
    drawn = {}
    for measure in table.measures:
        timing = measure.name == "images/s" or measure.name.endswith(" seconds")
        if timing or not any(row.cell(measure).values for row in table.rows):
            continue
        path = folder / f"{measure.name.replace('/', '_').replace(' ', '_')}.png"
        if len(axes) >= 2:
            heat_maps(table, measure, axes[0], axes[1], path)
        elif axes:
            lines(table, measure, axes[0], path)
        else:
            bars(table, measure, path)
        drawn[measure.name] = path
    return drawn
