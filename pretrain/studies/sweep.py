"""Pre-training over a grid of settings: ``python -m pretrain.studies.sweep`` in the checkout.

A sweep is a comparison whose encoders are pre-trained first.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from flsl_d2.engine.command_line import (
    add_option,
    add_overrides,
    described_parser,
    parse_tool_arguments,
    run_tool,
)
from flsl_d2.engine.config_files import apply_lazy_overrides, load_lazy_config
from flsl_d2.engine.run_folder import PRETRAINING_KEYS
from flsl_d2.errors import InputError
from flsl_d2.files import file_sha256, write_text
from flsl_d2.images.store import ImageStore, open_images
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
from flsl_d2.studies.identity import result_settings, sha256_of
from flsl_d2.studies.jobs import Job, Outcome, Record
from flsl_d2.studies.plots import draw_measures, overlaid_curves, plot_file
from flsl_d2.studies.table import Subject, Table, results_table
from flsl_d2.visualization.curves import read_metrics
from pretrain.schedules import set_run_length
from pretrain.trainer import resolve_precision

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
_MOST_SIZES = 200_000


class Axis(NamedTuple):
    """Key and its values as typed."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """Setting of the grid with one seed: values as typed, and the overrides that make it.

    ``images`` is the identity of the images by content: names, and sizes where that is quick.
    """

    values: dict[str, str]
    seed: int
    overrides: tuple[str, ...]
    cfg: DictConfig
    total_iters: int = 0
    images: str = ""


def parse_axis(text: str) -> Axis:
    """Read ``key=v1,v2``; commas inside brackets belong to a value.

    Raises:
        InputError: the text is not of that form, or has a value twice.
    """
    key, equals, raw = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[\](){}]*[\])}])", raw)]
    if not equals or not key.strip() or not all(values):
        raise InputError(
            f"--grid {text!r} is not of the form key=value,value; write for example "
            "schedules.intra_weight=0.01,0.03."
        )
    if len(set(values)) < len(values):
        raise InputError(f"--grid {text!r} has a value twice; name each value once.")
    return Axis(key.strip(), tuple(values))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name each key by its last part, or in full where two keys end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {k: name if last.count(name) == 1 else k for k, name in zip(keys, last, strict=True)}


def grid_points(
    config_file: str, axes: Sequence[Axis], overrides: Sequence[str], seeds: Sequence[int]
) -> list[Point]:
    """Combine all values of the axes with all seeds; without seeds, with the config's own.

    A single number for a pair of ``schedules`` (start and end) stands for both.

    Raises:
        InputError: a key is unknown, set twice or set by the sweep itself, or a value does not
            suit its key or the run.
    """
    base = load_lazy_config(config_file, overrides)
    keys = [axis.key for axis in axes]
    _check_keys(base, config_file, keys, [text.partition("=")[0] for text in overrides], seeds)
    points = []
    for values in itertools.product(*(axis.values for axis in axes)):
        changes = [_override(base, *pair) for pair in zip(keys, values, strict=True)]
        for seed in seeds or [base.train.seed]:
            own = (*changes, f"train.seed={seed}")
            cfg = apply_lazy_overrides(copy.deepcopy(base), own)
            chosen = dict(zip(keys, values, strict=True))
            points.append(Point(chosen, seed, (*overrides, *own), cfg))
    return [_checked(point) for point in points]


def _check_keys(
    cfg: DictConfig, config_file: str, keys: list[str], fixed: list[str], seeds: Sequence[int]
) -> None:
    lacking = [group for group in ("model", "views", "schedules", "train") if group not in cfg]
    if lacking:
        raise InputError(
            f"config file {config_file!r} has no {', '.join(lacking)}, so it is not a pre-training "
            "config; name one such as configs/pretrain/flsl_vit_small_p16_in1k.py."
        )
    if "train.output_dir" in keys + fixed:
        raise InputError("train.output_dir is chosen by the sweep; name its folder with --output.")
    if "train.seed" in keys or (seeds and "train.seed" in fixed):
        raise InputError("train.seed is set by the sweep; give --seeds 0,1.")
    repeated = [key for i, key in enumerate(keys) if key in keys[:i] or key in fixed]
    if repeated:
        raise InputError(
            f"{repeated[0]} is set twice; give it once, with --grid or as an override."
        )


def _override(cfg: DictConfig, key: str, value: str) -> str:
    """Return the override of one value; a number for a schedule's pair becomes a pair."""
    old = OmegaConf.select(cfg, key)
    pair = key.startswith("schedules.") and isinstance(old, ListConfig) and len(old) == 2
    if pair and re.fullmatch(r"[-+.\deE]+", value):
        value = f"[{value},{value}]"
    return f"{key}={value}"


def _checked(point: Point) -> Point:
    """Build all that a run builds, without its memory, and return the point with its length."""
    cfg = copy.deepcopy(point.cfg)
    try:
        files = open_images(**{key: cfg.dataset[key] for key in ("root", "name")})
        total_iters = set_run_length(cfg, len(files))
        resolve_precision(cfg.train.precision, cfg.train.device)
        with torch.device("meta"), warnings.catch_warnings():
            # Weights of a previous stage are read only to check them, so they go nowhere.
            warnings.filterwarnings("ignore", r"for .*: copying from a non-meta parameter")
            for part in (cfg.schedules, cfg.views, cfg.model):
                instantiate(part)
    except InputError as error:
        values = ", ".join(f"{key}={value}" for key, value in point.values.items())
        raise InputError(f"{values}: {error}" if values else str(error)) from error
    return replace(point, total_iters=total_iters, images=_images_identity(files))


def _images_identity(files: ImageStore) -> str:
    """Return the digest of the names, and of the sizes of up to 200,000 files of this machine."""
    if len(files) > _MOST_SIZES:
        return files.names.digest
    sizes = (str(os.path.getsize(file)) if os.path.isfile(file) else "" for file in files)
    return f"{files.names.digest}, {sha256_of(f'{size},'.encode() for size in sizes)[:16]}"


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
    settings = _settings(runs, Path(args.config_file).stem)
    args.seeds = list(dict.fromkeys(point.seed for point in points))
    encoders = read_encoders(args.weights) if args.weights else []
    if encoders and not evaluations:
        raise InputError("--weights needs an evaluation; give --train and --val, or --detection.")
    # Encoders that are not pre-trained here are named in the first column.
    column, *others = settings[0].labels
    labels = [{column: each.name, **dict.fromkeys(others, "")} for each in encoders]
    rows = [
        *settings,
        *(
            each.subject(own, evaluations, args.seeds, args.output)
            for each, own in zip(encoders, labels, strict=True)
        ),
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
        return results_table(rows, records, stages, timed=("pretrain",))

    records, table = run_study(args.output, place, rows, stages, make_table, by_row=True)
    jobs = {run.jobs["pretrain"][0].key: run.jobs["pretrain"][0] for run in runs}
    curves = plot_file(args.output / "plots", "loss_curves")
    files = {job.label: args.output / "jobs" / key / "metrics.json" for key, job in jobs.items()}
    titles = {key: title for key, (_, title) in _COLUMNS.items() if key != "feature_std"}
    overlaid_curves(files, titles, curves, "Pre-training")
    grid = replace(table, rows=table.rows[: len(settings)])
    varied = [name for name in grid.label_names if len({r.labels[name] for r in grid.rows}) > 1]
    plots = draw_measures(grid, args.output / "plots", varied if axes else ())
    shown = "; ".join(f"{a.key} = {', '.join(a.values)}" for a in axes) or "one setting"
    finish(
        args.output,
        table,
        records,
        rows,
        title=f"Sweep of {Path(args.config_file).stem}",
        intro=[
            f"Grid: {shown}. Common overrides: {' '.join(args.opts) or 'none'}. "
            f"Seeds: {', '.join(map(str, args.seeds))}.",
            "Losses and collapse indicators are means over the last tenth of a run's log.",
        ],
        sections=[
            section("Measures over the grid", plots, 460),
            section("Curves", {"all runs": curves}, 1150),
            *sections_of(args.output, args.pictures, evaluations, rows, records, table),
        ],
        columns=[*runs[0].labels, "folder", "seconds", "status"],
        rows=[
            [
                *run.labels.values(),
                f"jobs/{key}",
                f"{records[key].seconds:.0f}",
                records[key].status,
            ]
            for run in runs
            for key in [run.jobs["pretrain"][0].key]
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
    unseeded = names and len(args.seeds) < 2
    label = ", ".join(f"{k}={v}" for k, v in labels.items() if not (unseeded and k == "seed"))
    log_period = point.cfg.train.log_period
    # A checkpoint at least every tenth of a run, in whole logging periods: a resumed run then logs
    # the same as an uninterrupted one.
    tenth = max(point.total_iters // (10 * log_period), 1) * log_period

    def command(folder: Path, num_processes: int) -> list[str]:
        return [
            *("-m", "pretrain", "--config-file", args.config_file, "--resume"),
            *("--num-gpus", str(num_processes)),
            f"train.checkpoint_period={min(point.cfg.train.checkpoint_period, tenth)}",
            "train.checkpoint_keep=1",
            *point.overrides,  # behind these two, which they may change
            f"train.output_dir={folder}",
        ]

    job = Job("pretrain", label, _run_settings(point), command, _pretraining_outcome)
    folder = f"jobs/{job.key}"
    teacher = args.output / folder / "teacher_backbone.pth"
    encoder = EncoderFile(label, str(teacher), {"pretrain": job.key}, job, point.seed)
    jobs = {"pretrain": [job]} | {e.name: [e.job(encoder)] for e in evaluations}
    return Subject(labels, jobs, {"folder": folder, "config": args.config_file})


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


def _pretraining_outcome(folder: Path) -> Outcome:
    series, _ = read_metrics(folder / "metrics.json")
    values = {}
    for key, (name, _) in _COLUMNS.items():
        steps, numbers = series.get(key, ([], []))
        late = [n for step, n in zip(steps, numbers, strict=True) if step >= 0.9 * steps[-1]]
        if late:
            values[name] = mean(late)
    if "images_per_second" in series:
        values["images/s"] = median(series["images_per_second"][1])
    return Outcome(values)


def _settings(runs: Sequence[Subject], config: str) -> list[Subject]:
    """Merge the runs of each setting: one row with the jobs of all seeds."""
    merged: dict[tuple[str, ...], Subject] = {}
    for run in runs:
        labels = {name: value for name, value in run.labels.items() if name != "seed"}
        labels = labels or {"config": config}
        before = merged.setdefault(tuple(labels.values()), Subject(labels, {}))
        jobs = {stage: [*before.jobs.get(stage, ()), *more] for stage, more in run.jobs.items()}
        merged[tuple(labels.values())] = replace(before, jobs=jobs)
    return list(merged.values())


if __name__ == "__main__":
    main()
