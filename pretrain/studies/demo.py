"""Demo on a data set made on the spot: ``python -m pretrain.studies.demo`` in the checkout.

FLSL pre-trains on the images; its frozen features are measured beside those of untrained weights,
and Mask R-CNN is fine-tuned from both. All runs use the modules and configs that a user runs; each
command is printed before it starts and can be repeated by hand.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from flsl_d2.annotations import register_scenes
from flsl_d2.engine.command_line import add_defaults, add_option, described_parser, run_tool
from flsl_d2.engine.gpus import usable_cores
from flsl_d2.errors import InputError
from flsl_d2.evaluation import extract_tokens
from flsl_d2.evaluation.measures import measure_features
from flsl_d2.images.reader import read_rgb
from flsl_d2.modeling import FLSLViT
from flsl_d2.scenes import make_scenes
from flsl_d2.visualization import (
    detections_beside_ground_truth,
    encoder_figure,
    loss_curves,
    token_at,
)
from flsl_d2.visualization.curves import read_metrics
from flsl_d2.visualization.detections import (
    choose_records,
    draw_objects,
    found_objects,
    read_results,
)
from flsl_d2.visualization.figures import Panel, enlarge, picture_table
from flsl_d2.visualization.maps import cluster_labels, cluster_overlay
from flsl_d2.weights import build_encoder

DESCRIPTION = "Pre-train, fine-tune and compare on a small data set: no download, no GPU."
ROOT = Path(__file__).resolve().parents[2]
IMAGE_SIZE = (96, 96)
PRETRAIN_CONFIG = "configs/demo/flsl_vit_scenes.py"
DETECTION_CONFIG = "configs/demo/mask_rcnn_flsl_vit_scenes.py"
# Scale of the mean-shift in the pictures, times sqrt(D). With the smaller scale of training, all
# tokens of these small images have one mode.
DRAWN_SCALE = 1.0
STARTS = {"random weights": "random", "FLSL": "flsl"}
# Scores of frozen features in the table, and the seeds of the untrained weights and of what the
# measures draw.
SCORES = {
    "patch k-NN, mIoU": "knn_segmentation/mIoU",
    "linear probe, mIoU": "linear_segmentation/mIoU",
    "clusters, boundary F": "cluster_quality/boundary_f_mean_shift",
}
SEEDS = (0, 1, 2)
MEASURED_IMAGES = 100


def run_demo(
    output: Path,
    num_train: int = 600,
    num_val: int = 100,
    pretrain_iters: int = 0,
    detection_iters: int = 0,
) -> None:
    """Make the scenes, pre-train, measure, fine-tune twice, and leave tables and pictures.

    Args:
        pretrain_iters: steps of pre-training; 0 for the config's.
        detection_iters: steps of each fine-tuning; 0 for the config's.

    Raises:
        InputError: a run failed.
    """
    start, folder = time.monotonic(), output.resolve()
    print(f"1/6  {num_train} + {num_val} scenes", flush=True)
    make_scenes(folder / "datasets" / "flsl_scenes", num_train, num_val, IMAGE_SIZE, seed=0)
    register_scenes(folder / "datasets" / "flsl_scenes")
    print("2/6  FLSL pre-training on their images, without labels", flush=True)
    length = [f"train.max_iter={pretrain_iters}"] if pretrain_iters else []
    _run_module("pretrain", PRETRAIN_CONFIG, folder, "pretrain", length)
    weights = folder / "pretrain" / "teacher_backbone.pth"
    print("3/6  Frozen features, untrained and of FLSL", flush=True)
    features = _feature_table(weights)
    print(features, flush=True)
    for step, (name, run) in enumerate(STARTS.items(), start=4):
        print(f"{step}/6  Mask R-CNN from {name}", flush=True)
        overrides = [f"train.max_iter={detection_iters}"] if detection_iters else []
        if run == "flsl":
            overrides.append(f"train.init_checkpoint={weights}")
        _run_module("flsl_d2.detection", DETECTION_CONFIG, folder, run, overrides)
    print("6/6  pictures", flush=True)
    _draw(folder, weights)
    table = f"{features}\n{_table(folder, num_val)}"
    (folder / "results.md").write_text(table)
    print(f"\n{table}\npictures and logs: {folder}")
    print(f"took {(time.monotonic() - start) / 60:.1f} minutes")


def _run_module(module: str, config: str, folder: Path, run: str, overrides: list[str]) -> None:
    """Run a module as a user would: progress lines go to the console, everything to a log."""
    processes = min(usable_cores(), 2)
    arguments = ["-m", module, "--config-file", config, "--num-gpus", str(processes)]
    arguments += ["--overwrite", f"train.output_dir={folder / run}", *overrides]
    settings = {
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        # The tensors are too small to share among threads, and waiting threads keep the cores busy.
        "OMP_NUM_THREADS": "1",
    }
    shown = " ".join(f"{key}={shlex.quote(value)}" for key, value in settings.items())
    print(f"     {shown} python {shlex.join(arguments)}", flush=True)
    log = folder / f"{run}_console.txt"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            if "eta" in line or "encoder weights:" in line:
                print(f"     {line.rstrip()[:230]}", flush=True)
    if process.returncode:
        end = "".join(log.read_text().splitlines(keepends=True)[-8:])
        raise InputError(f"{module} failed with status {process.returncode}; see {log}:\n{end}")


def _feature_table(weights: Path) -> str:
    """Table of the scores of frozen features, mean and standard deviation over the seeds."""
    trained = build_encoder(str(weights))
    lines = [f"| frozen features | {' | '.join(SCORES)} |", "| --- " * (len(SCORES) + 1) + "|"]
    for name in STARTS:
        columns: dict[str, list[float]] = {score: [] for score in SCORES.values()}
        for seed in SEEDS:
            torch.manual_seed(seed)
            encoder = trained if name == "FLSL" else FLSLViT(**trained.architecture)
            results = measure_features(
                encoder.eval().requires_grad_(False),
                "flsl_scenes_train",
                "flsl_scenes_val",
                sorted({score.partition("/")[0] for score in SCORES.values()}),
                seed=seed,
                max_images=MEASURED_IMAGES,
                short_side=IMAGE_SIZE[0],
            )
            for score, values in columns.items():
                values.append(results[score])
        cells = [
            f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            for values in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"\nMean and standard deviation over {len(SEEDS)} seeds of the measures and of the "
        "untrained weights; one run of pre-training.\n"
    )
    return "\n".join(lines)


def _table(folder: Path, num_val: int) -> str:
    columns = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")
    lines = ["| start | box AP | box AP50 | mask AP | mask AP50 |", "| --- " * 5 + "|"]
    steps = 0
    for name, run in STARTS.items():
        series, _ = read_metrics(folder / run / "metrics.json")
        steps = series["bbox/AP"][0][-1]  # the evaluation follows the last step
        values = [series[column][1][-1] if column in series else float("nan") for column in columns]
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    lines.append(
        f"\nMask R-CNN, {steps} steps each, same data and seed; {num_val} images, one "
        "run each: differences of a few points are noise.\n"
    )
    return "\n".join(lines)


def _draw(folder: Path, weights: Path) -> None:
    loss_curves(folder / "pretrain" / "metrics.json", folder / "pretraining_curves.png")
    trained = build_encoder(str(weights)).eval()
    torch.manual_seed(0)
    untrained = FLSLViT(**trained.architecture).eval()
    for encoder, name in ((trained, "FLSL"), (untrained, "random weights")):
        _draw_encoder(encoder, name, folder)
    _draw_overview(trained, folder)
    for run in STARTS.values():
        loss_curves(folder / run / "metrics.json", folder / f"detection_curves_{run}.png")
        detections_beside_ground_truth(
            "flsl_scenes_val",
            str(folder / run / "inference" / "coco_instances_results.json"),
            folder / f"detections_{run}.png",
        )


def _draw_encoder(encoder: FLSLViT, name: str, folder: Path) -> None:
    """Draw modes and clusters of some validation images, seen from the middle of an object."""
    records = [r for r in DatasetCatalog.get("flsl_scenes_val") if r["annotations"]][:5]
    features, tokens = [], []
    for record in records:
        features.append(extract_tokens(encoder, read_rgb(record["file_name"]), IMAGE_SIZE[0]))
        boxes = [annotation["bbox"] for annotation in record["annotations"]]
        x, y, w, h = max(boxes, key=lambda box: box[2] * box[3])
        tokens.append(token_at(x + w / 2, y + h / 2, IMAGE_SIZE, features[-1].grid))
    encoder_figure(
        features,
        folder / f"clusters_{name.replace(' ', '_').lower()}.png",
        tokens=tokens,
        scale=DRAWN_SCALE / encoder.embed_dim**0.5,
        title=f"What the encoder's tokens group: {name}",
    )


def _draw_overview(encoder: FLSLViT, folder: Path) -> None:
    """Draw validation images above their clusters and the detections in them."""
    metadata = MetadataCatalog.get("flsl_scenes_val")
    results = read_results(folder / "flsl" / "inference" / "coco_instances_results.json")
    columns = []
    for record in choose_records(DatasetCatalog.get("flsl_scenes_val"), 6):
        image = read_rgb(record["file_name"])
        features = extract_tokens(encoder, image, IMAGE_SIZE[0])
        clusters = cluster_labels(features, DRAWN_SCALE / encoder.embed_dim**0.5)
        large, _ = enlarge(image)
        found = found_objects(results, record, 0.5, metadata.thing_dataset_id_to_contiguous_id)
        drawn = draw_objects(image, found, metadata.thing_classes)
        columns.append([Panel(large), Panel(cluster_overlay(large, clusters)), Panel(drawn)])
    picture_table(
        folder / "overview.png",
        "Images, mean-shift clusters of the pre-trained encoder, and detections",
        [list(row) for row in zip(*columns, strict=True)],
        width=1.6,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo with the sizes that a command line gives."""
    parser = described_parser(DESCRIPTION)
    add_option(parser, "--output", default=Path("output/demo"))
    add_defaults(
        parser,
        ("--train-scenes", 600, "scenes to train on"),
        ("--val-scenes", 100, "scenes to evaluate on"),
        ("--pretrain-iters", 0, "steps of pre-training; 0: as the config says"),
        ("--detection-iters", 0, "steps of each fine-tuning; 0: as the config says"),
    )
    run_tool(_run, parser.parse_args(arguments))


def _run(args: argparse.Namespace) -> None:
    run_demo(
        args.output, args.train_scenes, args.val_scenes, args.pretrain_iters, args.detection_iters
    )


if __name__ == "__main__":
    main()
