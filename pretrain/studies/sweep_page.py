"""Page of a sweep: table, plots over the grid, and curves of all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flsl_d2.experiments.evaluations import Evaluation
from flsl_d2.experiments.jobs import Record, versions
from flsl_d2.experiments.plots import bars, heat_maps, lines, overlaid_curves, plot_file
from flsl_d2.experiments.tables import Subject, Table
from flsl_d2.files import write_text
from flsl_d2.visualization.html import render
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
    """Grid, evaluations and resources of a sweep.

    Attributes:
        config_file: pre-training config.
        axes: axes of the grid.
        overrides: changes to the config of all runs.
        seeds: values of ``train.seed``; empty for the config's.
        output: folder of everything that is written.
        evaluations: evaluations of each run's teacher.
        num_gpus: number of GPUs to use; on the CPU, processes.
        gpus_per_job: number of GPUs of each run.
    """

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
    records: Mapping[str, Record],
    names: Sequence[str],
) -> None:
    """Write the plots and ``index.html``.

    Args:
        sweep: settings of the sweep.
        table: a row for each setting.
        runs: a row for each run.
        records: records of the jobs by key.
        names: label columns of the grid's keys.
    """
    varied = [name for name in names if len({row.labels[name] for row in table.rows}) > 1]
    jobs = [run.jobs["pretrain"][0] for run in runs]
    folders = [sweep.output / run.about["folder"] for run in runs]
    curves = plot_file(sweep.output / "plots", "loss_curves")
    files = {job.label: folder / "metrics.json" for job, folder in zip(jobs, folders, strict=True)}
    overlaid_curves(files, _CURVES, curves, "Pre-training")
    page = render(
        "sweep.html.j2",
        title=f"Sweep of {Path(sweep.config_file).stem}",
        axes=sweep.axes,
        overrides=sweep.overrides,
        table=table,
        plots=_draw_measures(table, sweep.output / "plots", varied),
        curves=curves,
        run_columns=[*runs[0].labels, "folder", "seconds", "status"],
        run_rows=[
            [*run.labels.values(), run.about["folder"], f"{record.seconds:.0f}", record.status]
            for run, job in zip(runs, jobs, strict=True)
            for record in [records[job.key]]
        ],
        versions=versions(),
        details=[
            (f"Config: {job.label}", json.dumps(job.settings["config"], indent=1)) for job in jobs
        ],
    )
    write_text(sweep.output / "index.html", page)


def _draw_measures(table: Table, folder: Path, axes: Sequence[str]) -> dict[str, Path]:
    """Draw a plot of each measure that any setting has; return the files by measure."""
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
