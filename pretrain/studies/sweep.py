"""Pre-training over a grid of settings: ``python -m pretrain.studies.sweep`` in the checkout.

A sweep is a comparison whose encoders are pre-trained first.
"""

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
from flsl_d2.engine.run_folder import PRETRAINING_KEYS
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.studies.compare import (
    ENCODERS,
    add_study_options,
    finish,
    place_of,
    run_study,
    section,
    sections_of,
    write_draws,
)
from flsl_d2.studies.encoders import read_encoders
from flsl_d2.studies.evaluations import EncoderFile, Evaluation, chosen_evaluations
from flsl_d2.studies.identity import file_sha256, result_settings
from flsl_d2.studies.jobs import Job, Outcome, Record
from flsl_d2.studies.plots import draw_measures, overlaid_curves, plot_file
from flsl_d2.studies.table import Subject, Table, results_table
from flsl_d2.visualization.curves import read_metrics
from pretrain.studies.grid import Point, grid_points, parse_axis, short_names

DESCRIPTION = (
    "Pre-train over a grid of settings, evaluate each teacher, and write a table and a page."
)
EXAMPLES = """examples:
  v (weight of the intra-view loss) against gamma (of volume maximisation), on the CPU:
    tools/sweep.py --config-file configs/demo/flsl_vit_scenes.py --output output/sweep \\
      --grid schedules.intra_weight=0.01,0.03 --grid model.loss.volume_weight=1,5 \\
      --train pennfudan_train --val pennfudan_val \\
      dataset.name= dataset.root=photos train.max_iter=100
  the same beside a model of timm and an untrained encoder, which are evaluated alike:
    tools/sweep.py ... --weights timm:vit_small_patch16_dinov3 --weights random
  three seeds of each, two runs at a time on eight GPUs, and Mask R-CNN from each teacher:
    tools/sweep.py --config-file configs/pretrain/flsl_vit_small_p16_in1k.py \\
      --grid model.head.num_centroids=2048,4096 --seeds 0,1,2 --num-gpus 8 --gpus-per-job 4 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --output output/centroids

Interrupted (Ctrl-C, SIGTERM, power), the same command goes on: what is done stays, a run that was
cut off resumes from its last checkpoint, what failed is tried again. A changed grid uses the runs
that it has in common with the earlier one. docs/SWEEP.md explains the table."""

# Columns for keys of metrics.json, as means over the last tenth of a run, and titles of the curves.
_COLUMNS = {
    "loss": ("loss", "total loss"),
    "loss_intra": ("loss_intra", "intra-view loss"),
    "loss_inter": ("loss_inter", "inter-view loss"),
    "loss_volume": ("loss_volume", "volume maximisation"),
    "centroids_in_use": ("centroids_in_use", "centroids in use"),
    "assignment_entropy": ("entropy", "assignment entropy (nats)"),
    "feature_std": ("feature_std", "standard deviation of features"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep that a command line describes."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_option(parser, "--config-file", help="pre-training config of all runs")
    grid = (
        "a config key and its values; several --grid are combined. One number for a pair of "
        "schedules.* stands for start and end"
    )
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help=grid)
    text = "values of train.seed (default: that of the config)"
    add_option(parser, "--seeds", default=[], help=text)
    add_study_options(parser, f"{ENCODERS}; evaluated as the teachers are")
    add_overrides(parser, "changes to the config of all runs")
    run_tool(run_sweep, parse_tool_arguments(parser, arguments))


def run_sweep(args: argparse.Namespace) -> None:
    """Run the jobs that are not done yet, and write the tables, plots and the page.

    Writes below ``output`` what a comparison writes, with a row for each setting (mean and spread
    over seeds), and ``runs.csv`` with a row for each run.

    Raises:
        InputError: a part of the grid or the evaluations cannot work; nothing has run then.
        WorkerError: some jobs failed; everything else is done and written.
    """
    device = load_lazy_config(args.config_file, args.opts).train.device
    axes, evaluations = [parse_axis(text) for text in args.grid], chosen_evaluations(args, device)
    points = grid_points(args.config_file, axes, args.opts, args.seeds)
    place = place_of(args, device)
    names = short_names([axis.key for axis in axes])
    runs = [_run_of(args, evaluations, point, names) for point in points]
    settings = _settings(runs)
    shown, args.seeds = args.seeds, list(dict.fromkeys(point.seed for point in points))
    encoders = read_encoders(args.weights) if args.weights else []
    if encoders and not evaluations:
        raise InputError("--weights needs an evaluation; give --train and --val, or --detection.")
    # Encoders that are not pre-trained here are named in the first column.
    column, *others = settings[0].labels
    references = [
        encoder.subject(
            {column: encoder.name, **dict.fromkeys(others, "")},
            evaluations,
            args.seeds,
            args.output,
        )
        for encoder in encoders
    ]
    write_draws(evaluations, args.seeds, args.output)
    stages = ["pretrain", *(evaluation.name for evaluation in evaluations)]
    lengths = sorted({point.total_iters for point in points})
    print(
        f"{len(points)} runs of {' to '.join(map(str, {lengths[0]: 0, lengths[-1]: 0}))} steps: "
        f"{len(settings)} setting(s), {len(args.seeds)} seed(s)",
        flush=True,
    )

    def make_table(records: dict[str, Record]) -> Table:
        runs_table = results_table(runs, records, stages, timed=("pretrain",))
        write_text(args.output / "runs.csv", runs_table.csv())
        return results_table([*settings, *references], records, stages, timed=("pretrain",))

    rows = [*settings, *references]
    records, table = run_study(args.output, place, rows, stages, make_table, by_row=True)
    jobs = {run.jobs["pretrain"][0].key: run.jobs["pretrain"][0] for run in runs}
    curves = plot_file(args.output / "plots", "loss_curves")
    files = {job.label: args.output / "jobs" / key / "metrics.json" for key, job in jobs.items()}
    titles = {key: title for key, (_, title) in _COLUMNS.items() if key != "feature_std"}
    overlaid_curves(files, titles, curves, "Pre-training")
    grid = replace(table, rows=table.rows[: len(settings)])
    varied = [name for name in grid.label_names if len({r.labels[name] for r in grid.rows}) > 1]
    plots = draw_measures(grid, args.output / "plots", varied if axes else ())
    finish(
        args.output,
        table,
        records,
        rows,
        title=f"Sweep of {Path(args.config_file).stem}",
        intro=[
            "Grid: "
            + ("; ".join(f"{a.key} = {', '.join(a.values)}" for a in axes) or "one setting")
            + f". Common overrides: {' '.join(args.opts) or 'none'}. "
            f"Seeds: {', '.join(map(str, shown or args.seeds))}.",
            "Losses and collapse indicators are means over the last tenth of a run's log.",
        ],
        sections=[
            section("Measures over the grid", plots, 460),
            section("Curves", {"all runs": curves}, 1150),
            *sections_of(args.output, args.pictures, evaluations, rows, records, table),
        ],
        columns=[*runs[0].labels, "folder", "seconds", "status"],
        rows=[
            [*run.labels.values(), run.about["folder"], f"{record.seconds:.0f}", record.status]
            for run in runs
            for record in [records[run.jobs["pretrain"][0].key]]
        ],
    )


def _run_of(
    args: argparse.Namespace,
    evaluations: Sequence[Evaluation],
    point: Point,
    names: Mapping[str, str],
) -> Subject:
    """Make the jobs of one point of the grid."""
    labels = {names[key]: value for key, value in point.values.items()} | {"seed": str(point.seed)}
    shown = labels if len(args.seeds) > 1 or not names else {**labels, "seed": ""}
    label = ", ".join(f"{name}={value}" for name, value in shown.items() if value)

    def command(folder: Path, num_processes: int) -> list[str]:
        return [
            *("-m", "pretrain", "--config-file", args.config_file, "--resume"),
            *("--num-gpus", str(num_processes)),
            f"train.checkpoint_period={_checkpoint_period(point)}",
            "train.checkpoint_keep=1",
            *point.overrides,  # behind these two, which they may change
            f"train.output_dir={folder}",
        ]

    job = Job("pretrain", label, _run_settings(point), command, _pretraining_outcome)
    teacher = args.output / "jobs" / job.key / "teacher_backbone.pth"
    encoder = EncoderFile(label, str(teacher), {"pretrain": job.key}, job, point.seed)
    jobs = {"pretrain": [job]}
    jobs |= {evaluation.name: [evaluation.job(encoder)] for evaluation in evaluations}
    return Subject(labels, jobs, {"folder": f"jobs/{job.key}", "config": args.config_file})


def _run_settings(point: Point) -> dict[str, object]:
    """Return what decides a run: its config, its list of images, and the weights it reads."""
    config = result_settings(
        point.cfg, (*PRETRAINING_KEYS.no_effect, "dataset.root", "dataset.name")
    )
    contents = {
        key: file_sha256(value)
        for key, value in config.items()
        if key.endswith("weights") and Path(value).is_file()
    }
    return {"config": {**config, **contents}, "images": point.images}


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
    for key, (name, _) in _COLUMNS.items():
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


if __name__ == "__main__":
    main()
