"""How step time and memory grow with batch, resolution, number of local crops and centroids."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from pretrain.studies.benchmark.measuring import print_table, time_in_turn, write_json
from pretrain.studies.benchmark.step import Step

__all__ = ["benchmark_scaling"]

AXES = {
    "batch": ("images a step", None),
    "views.global_size": ("pixels of the global views", (112, 160, 224, 288)),
    "views.num_local": ("local views", (0, 2, 4, 8)),
    "model.head.num_centroids": ("centroids K", (1024, 4096, 16384, 65536)),
}


def benchmark_scaling(args: argparse.Namespace) -> None:
    """Measure one axis at a time, print a table and draw a plot."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = [("batch", batch) for batch in args.batches]
    plan += [(key, value) for key, (_, values) in AXES.items() if values for value in values]
    rows = []
    for key, value in tqdm(plan, desc="scaling", disable=None):
        batch = value if key == "batch" else args.batch_size
        overrides = args.opts if key == "batch" else [*args.opts, f"{key}={value}"]
        make = partial(Step, args.config_file, overrides, batch, device, args.precision)
        timing = time_in_turn({"step": make}, args.repeats, args.warmup, device)["step"]
        step = timing.function
        rows.append(
            {
                "what": key,
                "value": value,
                "s/step": timing.median,
                "images/s": timing.rate(batch),
                "peak GiB": timing.peak_gib,
                "MiB kept for backward": step and step.stored_bytes() / 2**20,
                "GFLOP/image": step and step.flops_per_image / 1e9,
            }
        )
        del step, timing
    print_table(rows)
    _draw(rows, args.plot)
    print(f"plot: {args.plot}")
    write_json(args.json, device, rows=rows)


def _draw(rows: list[dict], path: str) -> None:
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, len(AXES))
    for column, (key, (label, _)) in enumerate(AXES.items()):
        of_key = [row for row in rows if row["what"] == key]
        values = [row["value"] for row in of_key]
        for line, (name, unit) in enumerate(
            (("s/step", "seconds a step"), ("MiB kept for backward", "MiB kept for backward"))
        ):
            axis = axes[line, column]
            axis.plot(values, [row[name] for row in of_key], marker="o", color="#3b6fb6")
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
            axis.set_ylabel(unit if column == 0 else "")
            axis.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
