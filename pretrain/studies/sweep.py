"""Pre-training over a grid of settings: ``python -m pretrain.studies.sweep`` in the checkout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

from flsl_d2.engine.command_line import (
    add_option,
    add_overrides,
    described_parser,
    parse_tool_arguments,
    run_tool,
)
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.launch import WorkerError
from flsl_d2.engine.run_folder import flat_config
from flsl_d2.experiments.evaluations import EncoderFile, add_evaluation_options, chosen_evaluations
from flsl_d2.experiments.jobs import Job, Outcome, Record, make_slots
from flsl_d2.experiments.runner import run_jobs
from flsl_d2.experiments.tables import Subject, Table, results_table
from flsl_d2.files import write_text
from flsl_d2.visualization.curves import read_metrics
from pretrain.studies.grid import Point, grid_points, parse_axis, short_names
from pretrain.studies.sweep_page import Sweep, write_sweep_page

__all__ = ["Sweep", "main", "run_sweep"]

DESCRIPTION = (
    "Pre-train over a grid of settings, evaluate each teacher, and write a table and a page."
)
EXAMPLES = """examples:
  v (weight of the intra-view loss) against gamma (of volume maximisation), on the CPU:
    tools/sweep.py --config-file configs/demo/flsl_vit_scenes.py --output output/sweep \\
      --grid schedules.intra_weight=0.01,0.03 --grid model.loss.volume_weight=1,5 \\
      --train pennfudan_train --val pennfudan_val \\
      dataset.name= dataset.root=photos train.max_iter=100
  three seeds of each, two runs at a time on eight GPUs, and Mask R-CNN from each teacher:
    tools/sweep.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py \\
      --grid model.head.num_centroids=2048,4096 --seeds 0,1,2 --num-gpus 8 --gpus-per-job 4 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --output output/centroids

Interrupted (Ctrl-C, SIGTERM, power), the same command goes on: what is done stays, a run that was
cut off resumes from its last checkpoint, what failed is tried again. A changed grid uses the runs
that it has in common with the earlier one. docs/SWEEP.md explains the table."""

# Keys that change neither the weights nor the logged values.
_NOT_RESULTS = (
    "train.output_dir",
    "train.checkpoint_",
    "train.pictures_period",
    "train.measures.",
    "dataloader.num_workers",
)
# Columns for keys of metrics.json, as means over the last tenth of a run.
_COLUMNS = {
    "loss": "loss",
    "loss_intra": "loss_intra",
    "loss_inter": "loss_inter",
    "loss_volume": "loss_volume",
    "centroids_in_use": "centroids_in_use",
    "assignment_entropy": "entropy",
    "feature_std": "feature_std",
}


def run_sweep(sweep: Sweep) -> None:
    """Run the jobs that are not done yet, and write the tables, plots and the page.

    Writes below ``output``: ``table.csv`` and ``table.md`` with a row for each setting (mean and
    spread over seeds), ``runs.csv`` with a row for each run, ``plots/*.png``, ``index.html``,
    ``jobs/``.

    Raises:
        InputError: a part of the grid or the evaluations cannot work; nothing has run then.
        WorkerError: some jobs failed; everything else is done and written.
    """
    points = grid_points(sweep.config_file, sweep.axes, sweep.overrides, sweep.seeds)
    for evaluation in sweep.evaluations:
        evaluation.check()
    slots = make_slots(points[0].cfg.train.device, sweep.num_gpus, sweep.gpus_per_job)
    names = short_names([axis.key for axis in sweep.axes])
    runs = [_run_of(sweep, point, names) for point in points]
    jobs = [job for run in runs for stage in run.jobs.values() for job in stage]
    settings = _settings(runs)
    _print_plan(sweep, points, jobs)

    def write_tables(records: dict[str, Record]) -> None:
        _table(settings, records).write(sweep.output, "table")
        write_text(sweep.output / "runs.csv", _table(runs, records).csv())

    records = run_jobs(jobs, sweep.output, slots, write_tables)
    write_tables(records)
    table = _table(settings, records)
    write_sweep_page(sweep, table, runs, records, [names[axis.key] for axis in sweep.axes])
    print(f"\n{table.markdown()}\ntables, plots and index.html: {sweep.output}")
    failed = [job for job in jobs if records[job.key].status != "done"]
    if failed:
        raise WorkerError(
            f"{len(failed)} of {len(jobs)} jobs failed, the first is {failed[0].kind} of "
            f"{failed[0].label}: {records[failed[0].key].error} The same command tries them again."
        )


def _run_of(sweep: Sweep, point: Point, names: dict[str, str]) -> Subject:
    """Make the jobs of one point of the grid."""
    labels = {names[key]: value for key, value in point.values.items()} | {"seed": str(point.seed)}
    shown = labels if len(sweep.seeds) > 1 or not names else {**labels, "seed": ""}
    label = ", ".join(f"{name}={value}" for name, value in shown.items() if value)
    job = _pretraining(sweep, point, label)
    teacher = sweep.output / "jobs" / job.key / "teacher_backbone.pth"
    encoder = EncoderFile(label, str(teacher), {"pretrain": job.key}, job, point.seed)
    jobs = {"pretrain": [job]}
    jobs |= {evaluation.name: [evaluation.job(encoder)] for evaluation in sweep.evaluations}
    return Subject(labels, jobs, {"folder": f"jobs/{job.key}", "config": sweep.config_file})


def _pretraining(sweep: Sweep, point: Point, label: str) -> Job:
    def command(folder: Path, num_processes: int) -> list[str]:
        return [
            *("-m", "pretrain", "--config-file", sweep.config_file, "--resume"),
            *("--num-gpus", str(num_processes)),
            f"train.checkpoint_period={_checkpoint_period(point)}",
            "train.checkpoint_keep=1",
            *point.overrides,  # behind these two, which they may change
            f"train.output_dir={folder}",
        ]

    config = {k: v for k, v in flat_config(point.cfg).items() if not k.startswith(_NOT_RESULTS)}
    return Job("pretrain", label, {"config": config}, command, _pretraining_outcome)


def _checkpoint_period(point: Point) -> int:
    """Return the config's period, but at least ten in a run, in whole logging periods.

    A resumed run then logs the same as an uninterrupted one.
    """
    log_period = point.cfg.train.log_period
    tenth = max(point.total_iters // (10 * log_period), 1) * log_period
    return min(point.cfg.train.checkpoint_period, tenth)


def _pretraining_outcome(folder: Path) -> Outcome:
    series, _ = read_metrics(folder / "metrics.json")
    values = {}
    for key, name in _COLUMNS.items():
        steps, numbers = series.get(key, ([], []))
        late = [n for step, n in zip(steps, numbers, strict=True) if step >= 0.9 * steps[-1]]
        if late:
            values[name] = mean(late)
    speeds = series.get("images_per_second", ([], []))[1]
    if speeds:
        values["images/s"] = median(speeds)
    return Outcome(values)


def _settings(runs: Sequence[Subject]) -> list[Subject]:
    """Merge the runs of each setting: one row with the jobs of all seeds."""
    merged: dict[tuple[str, ...], Subject] = {}
    for run in runs:
        labels = {name: value for name, value in run.labels.items() if name != "seed"}
        labels = labels or {"config": Path(run.about["config"]).stem}
        before = merged.setdefault(tuple(labels.values()), Subject(labels, {}))
        jobs = {stage: [*before.jobs.get(stage, ()), *more] for stage, more in run.jobs.items()}
        merged[tuple(labels.values())] = replace(before, jobs=jobs)
    return list(merged.values())


def _table(subjects: Sequence[Subject], records: Mapping[str, Record]) -> Table:
    return results_table(subjects, records, list(subjects[0].jobs), timed=("pretrain",))


def _print_plan(sweep: Sweep, points: Sequence[Point], jobs: Sequence[Job]) -> None:
    grid = " x ".join(str(len(axis.values)) for axis in sweep.axes) or "1"
    seeds = len({point.seed for point in points})
    lengths = sorted({point.total_iters for point in points})
    steps = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    print(
        f"{len(points)} runs of {steps} steps ({grid} settings, {seeds} seed(s)), "
        f"{len({job.key for job in jobs})} jobs with the evaluations, in {sweep.output}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep that a command line describes."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_option(parser, "--config-file", help="pre-training config of all runs")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a config key and its values; several --grid are combined. One number for a pair of "
        "schedules.* stands for start and end",
    )
    add_option(
        parser, "--seeds", default=[], help="values of train.seed (default: that of the config)"
    )
    add_option(parser, "--output", required=True, help="folder of everything that is written")
    add_evaluation_options(parser, old_prefix="eval-")
    add_option(parser, "--num-gpus")
    add_option(parser, "--gpus-per-job")
    add_overrides(parser, "changes to the config of all runs")
    run_tool(_run, parse_tool_arguments(parser, arguments))


def _run(args: argparse.Namespace) -> None:
    device = load_lazy_config(args.config_file, args.opts).train.device
    run_sweep(
        Sweep(
            config_file=args.config_file,
            axes=[parse_axis(text) for text in args.grid],
            overrides=args.opts,
            seeds=args.seeds,
            output=args.output,
            evaluations=chosen_evaluations(args, device),
            num_gpus=args.num_gpus,
            gpus_per_job=args.gpus_per_job,
        )
    )


if __name__ == "__main__":
    main()
