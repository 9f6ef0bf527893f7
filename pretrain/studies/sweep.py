"""From the command line of ``tools/sweep.py`` to a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.launch import WorkerError
from flsl_d2.engine.run_folder import PRETRAINING_KEYS
from flsl_d2.errors import InputError
from flsl_d2.experiments.compare import comma_separated, seeds_of
from flsl_d2.experiments.evaluations import (
    DetectionEvaluation,
    EncoderFile,
    Evaluation,
    FeatureEvaluation,
)
from flsl_d2.experiments.jobs import Job, Outcome, Record, config_settings, make_slots
from flsl_d2.experiments.runner import run_jobs
from flsl_d2.experiments.tables import Subject, Table, results_table
from flsl_d2.files import write_text
from flsl_d2.visualization.curves import read_metrics
from pretrain.studies.grid import Point, grid_points, parse_axis, short_names
from pretrain.studies.sweep_page import Sweep, write_sweep_page

__all__ = [
    "Sweep",
    "run_sweep",
    "sweep_command",
]

# Keys of metrics.json, and the columns they become: means over the last tenth of a run.
_LAST = {
    "loss": "loss",
    "loss_intra": "loss_intra",
    "loss_inter": "loss_inter",
    "loss_volume": "loss_volume",
    "centroids_in_use": "centroids_in_use",
    "assignment_entropy": "entropy",
    "feature_std": "feature_std",
}


def run_sweep(sweep: Sweep) -> None:
    """Run what is missing, and write the tables, plots and the page.

    Writes below ``output``: ``table.csv`` and ``table.md`` with a row for each setting (mean and
    spread over seeds), ``runs.csv`` with a row for each run, ``plots/*.png``, ``index.html``,
    ``jobs/``.

    Raises:
        InputError: anything in the grid or the evaluations that cannot work, before any run.
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
    """The jobs of one point of the grid."""
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
        arguments = [str(sweep.tools / "pretrain_net.py"), "--config-file", sweep.config_file]
        arguments += ["--resume", "--num-gpus", str(num_processes), *point.overrides]
        if not any(text.startswith("train.checkpoint_period=") for text in sweep.overrides):
            arguments.append(f"train.checkpoint_period={_checkpoint_period(point)}")
        if not any(text.startswith("train.checkpoint_keep=") for text in sweep.overrides):
            arguments.append("train.checkpoint_keep=1")
        return [*arguments, f"train.output_dir={folder}"]

    settings = {"config": config_settings(point.cfg, PRETRAINING_KEYS.no_effect)}
    return Job("pretrain", label, settings, command, _pretraining_outcome)


def _checkpoint_period(point: Point) -> int:
    """The config's, but at least ten in a run, and whole numbers of logged periods.

    A resumed run then logs what an uninterrupted one does.
    """
    log_period = point.cfg.train.log_period
    tenth = max(point.total_iters // (10 * log_period), 1) * log_period
    return min(point.cfg.train.checkpoint_period, tenth)


def _pretraining_outcome(folder: Path) -> Outcome:
    series, _ = read_metrics(folder / "metrics.json")
    values = {}
    for key, name in _LAST.items():
        steps, numbers = series.get(key, ([], []))
        late = [n for step, n in zip(steps, numbers, strict=True) if step >= 0.9 * steps[-1]]
        if late:
            values[name] = sum(late) / len(late)
    speeds = series.get("images_per_second", ([], []))[1]
    if speeds:
        values["images/s"] = median(speeds)
    return Outcome(values)


def _settings(runs: Sequence[Subject]) -> list[Subject]:
    """One subject for each setting, with the jobs of all seeds."""
    merged: dict[tuple[str, ...], Subject] = {}
    for run in runs:
        labels = {name: value for name, value in run.labels.items() if name != "seed"}
        labels = labels or {"config": Path(run.about["config"]).stem}
        before = merged.setdefault(tuple(labels.values()), Subject(labels, {}))
        jobs = {stage: [*before.jobs.get(stage, ()), *more] for stage, more in run.jobs.items()}
        merged[tuple(labels.values())] = replace(before, jobs=jobs)
    return list(merged.values())


def _table(subjects: Sequence[Subject], records: dict[str, Record]) -> Table:
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


def sweep_command(args: argparse.Namespace, tools: Path) -> None:
    """Run the sweep that a command line asks for.

    Args:
        args: see ``tools/sweep.py --help``.
        tools: folder of the command lines.

    Raises:
        InputError, WorkerError: see :func:`pretrain.studies.sweep.run_sweep`.
    """
    run_sweep(
        Sweep(
            tools=tools,
            config_file=args.config_file,
            axes=[parse_axis(text) for text in args.grid],
            overrides=args.overrides,
            seeds=seeds_of(args.seeds),
            output=args.output,
            evaluations=_evaluations(args, tools),
            num_gpus=args.num_gpus,
            gpus_per_job=args.gpus_per_job,
        )
    )


def _evaluations(args: argparse.Namespace, tools: Path) -> list[Evaluation]:
    if bool(args.eval_train) != bool(args.eval_val):
        raise InputError("--eval-train and --eval-val belong together; give both or neither.")
    device = load_lazy_config(args.config_file, args.overrides).train.device
    names = comma_separated(args.measures) if args.eval_val else []
    found: list[Evaluation] = [
        FeatureEvaluation(
            tools, name, args.eval_train, args.eval_val, device, args.max_images, args.short_side
        )
        for name in names
    ]
    if args.detection:
        found.append(DetectionEvaluation(tools, args.detection, args.detection_override, device))
    elif args.detection_override:
        raise InputError("--detection-override changes --detection, which is not given.")
    return found
