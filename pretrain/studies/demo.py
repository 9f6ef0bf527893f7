"""Demo on a data set made on the spot: ``python -m pretrain.studies.demo`` in the checkout.

The encoder of the package looks at a photograph; FLSL pre-trains another one on generated scenes;
a comparison measures it beside untrained weights. All runs use the modules and configs that a user
runs; each command is printed and can be repeated by hand.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from matplotlib import get_data_path

from flsl_d2.annotations import register_scenes
from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    described_parser,
    parse_tool_arguments,
    run_tool,
)
from flsl_d2.engine.gpus import usable_cores
from flsl_d2.errors import InputError
from flsl_d2.evaluation import extract_tokens
from flsl_d2.images.reader import read_rgb
from flsl_d2.scenes import make_scenes
from flsl_d2.studies.compare import comparison_parser, run_comparison, section
from flsl_d2.visualization import encoder_figure, loss_curves, token_at
from flsl_d2.weights import build_encoder

DESCRIPTION = "Pre-train, measure and compare on a small data set: no download, no GPU, minutes."
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = "flsl_d2://flsl_vit_mini_p8_small_data.safetensors"
PRETRAIN_CONFIG = "configs/demo/flsl_vit_scenes.py"
DETECTION_CONFIG = "configs/demo/mask_rcnn_flsl_vit_scenes.py"
IMAGE_SIZE, SEEDS = (96, 96), "0,1"
# Scale of the mean-shift in the pictures, times sqrt(D). With the smaller scale of training, all
# tokens of these small images have one mode.
DRAWN_SCALE = 1.0
NEXT = (
    "Pre-train on your own images: python tools/pretrain_net.py --images FOLDER",
    "Make a detector from your own annotations: python tools/finetune.py --annotations FILE "
    "--images FOLDER --weights output/pretrain/teacher_backbone.pth --output output/detector",
    "Compare encoders on your own data: python tools/compare.py --help",
    "Read docs/GETTING_STARTED.md, which goes through these steps.",
)


def run_demo(
    output: Path, num_train: int, num_val: int, pretrain_iters: int, detection_iters: int
) -> None:
    """Draw, pre-train, compare, and leave ``index.html``.

    Detectors take ``detection_iters`` steps each, around a frozen encoder.

    Raises:
        InputError: a run failed.
        WorkerError: a cell of the comparison failed.
    """
    start, folder = time.monotonic(), output.resolve()

    def stage(text: str) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {text}", flush=True)

    stage("1/4 The encoder in this package on a photograph, and the scenes of the demo")
    picture = folder / "photograph.png"
    _draw_photograph(picture)
    stage(f"    {picture}")
    scenes = folder / "datasets" / "flsl_scenes"
    make_scenes(scenes, num_train, num_val, IMAGE_SIZE, seed=0)
    register_scenes(scenes)
    # Tensors are too small to share among threads, and waiting threads keep the cores busy.
    os.environ |= {"DETECTRON2_DATASETS": str(scenes.parent), "OMP_NUM_THREADS": "1"}
    stage(f"2/4 FLSL pre-training on {num_train} scenes, without labels")
    processes = min(usable_cores(), 2)
    _pretrain(folder, processes, pretrain_iters)
    weights = folder / "pretrain" / "teacher_backbone.pth"
    curves, clusters = folder / "pretraining_curves.png", folder / "clusters.png"
    loss_curves(folder / "pretrain" / "metrics.json", curves)
    _draw_scenes(weights, clusters)
    stage("3/4 Frozen features, and detectors around the frozen encoder; untrained and of FLSL")
    command = [
        *("--weights", "untrained=random", "--weights", f"FLSL={weights}", "--seeds", SEEDS),
        *("--train", "flsl_scenes_train", "--val", "flsl_scenes_val", "--max-images", "100"),
        *("--measures", "knn_segmentation", "--short-side", str(IMAGE_SIZE[0]), "--device", "cpu"),
        *("--frozen-detection", DETECTION_CONFIG, f"train.max_iter={detection_iters}"),
        "dataloader.train.total_batch_size=4",
        *("--num-gpus", str(processes), "--output", str(folder)),
    ]
    _show("flsl_d2.studies.compare", command)
    run_comparison(
        parse_tool_arguments(comparison_parser(), command),
        title="FLSL on generated scenes",
        intro=[
            "Two encoders of the same architecture, frozen: untrained weights, and weights that "
            f"FLSL learned from {num_train} generated scenes without their labels."
        ],
        first=[
            section("The encoder in this package on a photograph", {"": picture}, 1150),
            section(
                "What the pre-trained encoder groups in scenes",
                {"mode and clusters": clusters, "pre-training": curves},
                1150,
            ),
        ],
        last=[section("What to do next", {}, texts=NEXT)],
    )
    stage(f"4/4 Done. All of it as a page: {folder / 'index.html'}")
    print("\n".join(["", "What to do next:", *(f"- {text}" for text in NEXT)]))


def _show(module: str, arguments: Sequence[str]) -> None:
    names = ("DETECTRON2_DATASETS", "OMP_NUM_THREADS")
    settings = " ".join(f"{key}={shlex.quote(os.environ[key])}" for key in names)
    print(f"      {settings} python -m {module} {shlex.join(arguments)}", flush=True)


def _pretrain(folder: Path, processes: int, steps: int) -> None:
    """Pre-train as a user would: progress goes to the console, everything to a log."""
    arguments = ["--config-file", PRETRAIN_CONFIG, "--num-gpus", str(processes), "--overwrite"]
    arguments += [f"train.output_dir={folder / 'pretrain'}", f"train.max_iter={steps}"]
    _show("pretrain", arguments)
    log, command = folder / "pretrain_console.txt", [sys.executable, "-m", "pretrain", *arguments]
    pipe = subprocess.PIPE
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ, stdout=pipe, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            if "eta" in line:
                print(f"      {line.rstrip()[:150]}", flush=True)
    if process.returncode:
        end = "".join(log.read_text().splitlines(keepends=True)[-8:])
        raise InputError(f"pre-training failed with status {process.returncode}; see {log}:\n{end}")


def _draw_photograph(path: Path) -> None:
    """Draw what the encoder of the package groups in a photograph that Matplotlib ships."""
    image = read_rgb(str(Path(get_data_path(), "sample_data", "grace_hopper.jpg")))
    height, width = image.shape[:2]
    title = "What the tokens of a photograph group: the encoder in this package"
    _draw(SHIPPED, [(image, width / 2, height / 4)], 256, path, title)


def _draw_scenes(weights: Path, path: Path) -> None:
    """Draw modes and clusters of some validation images, seen from the middle of an object."""
    views = []
    for record in [r for r in DatasetCatalog.get("flsl_scenes_val") if r["annotations"]][:4]:
        boxes = [annotation["bbox"] for annotation in record["annotations"]]
        x, y, w, h = max(boxes, key=lambda box: box[2] * box[3])
        views.append((read_rgb(record["file_name"]), x + w / 2, y + h / 2))
    title = "What the pre-trained encoder's tokens group"
    _draw(str(weights), views, IMAGE_SIZE[0], path, title)


def _draw(
    weights: str, views: Sequence[tuple[Any, float, float]], side: int, path: Path, title: str
) -> None:
    encoder = build_encoder(weights).eval()
    features = [extract_tokens(encoder, image, side) for image, _, _ in views]
    tokens = [
        token_at(x, y, image.shape[:2], found.grid)
        for (image, x, y), found in zip(views, features, strict=True)
    ]
    scale = DRAWN_SCALE / encoder.embed_dim**0.5
    encoder_figure(features, path, tokens=tokens, scale=scale, title=title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo with the sizes that a command line gives."""
    parser = described_parser(DESCRIPTION)
    add_option(parser, "--output", default=Path("output/demo"))
    add_defaults(
        parser,
        ("--train-scenes", 600, "scenes to train on"),
        ("--val-scenes", 50, "scenes to evaluate on"),
        ("--pretrain-iters", 140, "steps of pre-training"),
        ("--detection-iters", 90, "steps of each detector"),
    )
    args = parser.parse_args(arguments)
    sizes = (args.train_scenes, args.val_scenes, args.pretrain_iters, args.detection_iters)
    run_tool(run_demo, args.output, *sizes)


if __name__ == "__main__":
    main()
