"""Growth of step time and memory with batch, resolution, number of local crops and centroids."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from tqdm import tqdm

from flsl_d2.visualization.figures import new_figure, save_figure
from pretrain.studies.benchmark.measuring import prepared_device, report, time_in_turn
from pretrain.studies.benchmark.step import NOT_COMPILED, Step

AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "batch": ("images a step", ()),  # the values of --batches
    "views.global_size": ("pixels of the global views", (112, 160, 224, 288)),
    "views.num_local": ("local views", (0, 2, 4, 8)),
    "model.head.num_centroids": ("centroids K", (1024, 4096, 16384, 65536)),
}


def benchmark_scaling(args: argparse.Namespace) -> None:
    """Measure one axis at a time, print a table and draw a plot."""
    device = prepared_device(args)
    plan = [("batch", batch) for batch in args.batches]
    plan += [(key, value) for key, (_, values) in AXES.items() for value in values]
    rows = []
    for key, value in tqdm(plan, desc="scaling", disable=None):
        batch = value if key == "batch" else args.batch_size
        overrides = [NOT_COMPILED, *args.opts, *([] if key == "batch" else [f"{key}={value}"])]
        make = partial(Step, args.config_file, overrides, batch, device, args.precision)
        timing = time_in_turn({"step": make}, args.repeats, args.warmup, device)["step"]
        step = timing.function if isinstance(timing.function, Step) else None
        rows.append(
            {
                "what": key,
                "value": value,
                "s/step": timing.median,
                "images/s": timing.rate(batch),
                "peak GiB": timing.peak_gib,
                "MiB kept for backward": step.stored_bytes() / 2**20 if step else None,
                "GFLOP/image": step.flops_per_image() / 1e9 if step else None,
            }
        )
        del step, timing
    _draw(rows, args.plot)
    report(f"growth on {device}, drawn in {args.plot}", rows, device, args.json)


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw time and memory over each axis."""
    figure = new_figure(14, 6)
    axes = figure.subplots(2, len(AXES))
    for column, (key, (label, _)) in enumerate(AXES.items()):
        measured = [row for row in rows if row["what"] == key]
        values = [row["value"] for row in measured]
        for line, (name, unit) in enumerate(
            (("s/step", "seconds a step"), ("MiB kept for backward", "MiB kept for backward"))
        ):
            axis = axes[line, column]
            axis.plot(values, [row[name] for row in measured], marker="o", color="#0072b2")
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label)
            axis.set_ylabel(unit if column == 0 else "")
            axis.grid(alpha=0.3)
    save_figure(figure, path)
