"""The demo: a data set made on the spot, FLSL on its images, Mask R-CNN from it and from random.

Everything goes through the tools and configs that a user runs; each command is printed before it
starts and can be repeated by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog

from flsl_d2.data import register_scenes
from flsl_d2.data.images import read_rgb
from flsl_d2.data.scenes import make_scenes
from flsl_d2.engine.launch import usable_cores
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD
from flsl_d2.visualization import (
    detections_beside_ground_truth,
    encoder_figure,
    loss_curves,
    token_at,
)
from flsl_d2.weights import read_weights

__all__ = ["run_demo"]

ROOT = Path(__file__).resolve().parents[1]
IMAGE_SIZE = (96, 96)
PRETRAIN_CONFIG = "configs/demo/flsl_vit_scenes.py"
DETECTION_CONFIG = "configs/demo/mask_rcnn_flsl_vit_scenes.py"
# Of the mean-shift in the pictures, times sqrt(D). Larger than in training, where the modes of
# these small images all meet in one.
DRAWN_SCALE = 1.0
STARTS = {"random weights": "random", "FLSL": "flsl"}


def run_demo(
    output: str,
    num_train: int = 600,
    num_val: int = 100,
    pretrain_iters: int = 0,
    detection_iters: int = 0,
) -> None:
    """Make the scenes, pre-train, fine-tune twice, and leave a table and pictures.

    Args:
        output: folder of everything.
        num_train: scenes to train on.
        num_val: scenes to evaluate on.
        pretrain_iters: steps of pre-training; 0 for the config's.
        detection_iters: steps of either fine-tuning; 0 for the config's.
    """
    start, folder = time.monotonic(), Path(output).resolve()
    print(f"1/5  {num_train} + {num_val} scenes", flush=True)
    make_scenes(folder / "datasets" / "flsl_scenes", num_train, num_val, IMAGE_SIZE, seed=0)
    register_scenes(folder / "datasets" / "flsl_scenes")
    print("2/5  FLSL pre-training on their images, without labels", flush=True)
    length = [f"train.max_iter={pretrain_iters}"] if pretrain_iters else []
    _run_tool("pretrain_net.py", PRETRAIN_CONFIG, folder, "pretrain", length)
    weights = folder / "pretrain" / "teacher_backbone.pth"
    for place, (name, run) in enumerate(STARTS.items(), start=3):
        print(f"{place}/5  Mask R-CNN from {name}", flush=True)
        overrides = [f"train.max_iter={detection_iters}"] if detection_iters else []
        if run == "flsl":
            overrides.append(f"train.init_checkpoint={weights}")
        _run_tool("train_net.py", DETECTION_CONFIG, folder, run, overrides)
    print("5/5  pictures", flush=True)
    _draw(folder, weights)
    table = _table(folder, num_val)
    (folder / "results.md").write_text(table)
    print(f"\n{table}\npictures and logs: {folder}")
    print(f"took {(time.monotonic() - start) / 60:.1f} minutes")


def _run_tool(tool: str, config: str, folder: Path, run: str, overrides: list[str]) -> None:
    """Run a tool as a user would; its progress lines go to the console, all of it to a log."""
    processes = min(usable_cores(), 2)
    arguments = [f"tools/{tool}", "--config-file", config, "--num-gpus", str(processes)]
    arguments += ["--overwrite", f"train.output_dir={folder / run}", *overrides]
    settings = {
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        # One thread a process: the tensors are too small to share, and threads that wait by
        # spinning slow down whatever else the machine does.
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
        for line in process.stdout:
            file.write(line)
            if "eta" in line or "encoder weights:" in line:
                print(f"     {line.rstrip()[:230]}", flush=True)
    if process.returncode:
        end = "".join(log.read_text().splitlines(keepends=True)[-8:])
        raise InputError(f"tools/{tool} failed with status {process.returncode}; see {log}:\n{end}")


def _results(folder: Path, run: str) -> dict[str, float]:
    """The last evaluation in a run's metrics."""
    rows = [json.loads(line) for line in (folder / run / "metrics.json").read_text().splitlines()]
    return next(row for row in reversed(rows) if "bbox/AP" in row)


def _table(folder: Path, num_val: int) -> str:
    columns = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")
    lines = ["| start | box AP | box AP50 | mask AP | mask AP50 |", "| --- " * 5 + "|"]
    for name, run in STARTS.items():
        result = _results(folder, run)
        values = " | ".join(f"{result.get(column, float('nan')):.1f}" for column in columns)
        lines.append(f"| {name} | {values} |")
    steps = _results(folder, "flsl")["iteration"]  # the evaluation follows the last step
    lines.append(
        f"\nMask R-CNN, {steps} steps each, same data and seed; {num_val} images, one "
        "run each: differences of a few points are noise.\n"
    )
    return "\n".join(lines)


def _draw(folder: Path, weights: Path) -> None:
    loss_curves(folder / "pretrain" / "metrics.json", folder / "pretraining_curves.png")
    content = read_weights(str(weights))
    trained = FLSLViT(**content["encoder"]).eval()
    trained.load_state_dict(content["model"])
    torch.manual_seed(0)
    untrained = FLSLViT(**content["encoder"]).eval()
    for encoder, name in ((trained, "FLSL"), (untrained, "random weights")):
        _draw_encoder(encoder, name, folder)
    for run in STARTS.values():
        loss_curves(folder / run / "metrics.json", folder / f"detection_curves_{run}.png")
        detections_beside_ground_truth(
            "flsl_scenes_val",
            str(folder / run / "inference" / "coco_instances_results.json"),
            folder / f"detections_{run}.png",
        )


def _draw_encoder(encoder: FLSLViT, name: str, folder: Path) -> None:
    """Modes and clusters of some validation images, seen from the middle of an object."""
    records = [r for r in DatasetCatalog.get("flsl_scenes_val") if r["annotations"]][:5]
    images, features, tokens = [], [], []
    side = encoder.patch_size
    for record in records:
        image = read_rgb(record["file_name"])
        grid = (image.shape[0] // side, image.shape[1] // side)
        image = image[: grid[0] * side, : grid[1] * side]
        x, y, w, h = max(
            (a["bbox"] for a in record["annotations"]), key=lambda box: box[2] * box[3]
        )
        images.append(image)
        features.append(_tokens(encoder, image))
        tokens.append(token_at(x + w / 2, y + h / 2, image.shape[:2], grid))
    encoder_figure(
        images,
        features,
        grid,
        folder / f"clusters_{name.replace(' ', '_').lower()}.png",
        tokens=tokens,
        scale=DRAWN_SCALE / encoder.embed_dim**0.5,
        title=f"What the encoder's tokens group: {name}",
    )


@torch.no_grad()
def _tokens(encoder: FLSLViT, image: np.ndarray) -> torch.Tensor:
    pixels = (image - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    return encoder.forward_tokens(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])[0]
