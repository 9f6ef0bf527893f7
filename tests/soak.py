"""Kill and resume a pre-training run at random moments, and compare with an uninterrupted run.

    make soak        or        python tests/soak.py --kills 25 --num-processes 2

Each start of the tool is ended by SIGKILL (all of its processes) or, one time in four, by SIGTERM
after a random time, and is then resumed. At the end the weights, the optimiser's state and every
logged loss must be equal to the bit to those of an uninterrupted run; otherwise the exit status is
1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
STOPPED = 75
TINY = """
    train.device=cpu train.log_period=3 train.checkpoint_keep=2 dataloader.num_workers=1
    dataloader.total_batch_size=4 views.global_size=64 views.local_size=32 views.flip=0.5
    model.backbone.embed_dim=48 model.backbone.depth=2 model.backbone.num_heads=3
    model.backbone.drop_path_rate=0.3 model.head.num_centroids=32 model.head.hidden_dim=64
    model.head.bottleneck_dim=16 model.loss.sinkhorn_steps=3 model.partner=place
    model.position_drop=0.5
""".split()
# Logged values that depend on time; all others must be equal.
TIMINGS = {"time", "data_time", "eta_seconds", "images_per_second"}


def make_images(folder: Path, number: int = 10) -> None:
    """Write small images of coarse noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.jpg"), cv2.resize(coarse, (120, 90)))


def command(images: Path, output: Path, *arguments: str) -> list[str]:
    """Return the command of the tool on tiny images and a tiny model."""
    config = "configs/pretrain/flsl_vit_small_p16_in1k.py"
    tool = [sys.executable, "tools/pretrain_net.py", "--config-file", config]
    return [*tool, *TINY, f"dataset.root={images}", f"train.output_dir={output}", *arguments]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, so that all its processes can be killed."""
    with log.open("ab") as file:
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def logged(output: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.json without timings."""
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in TIMINGS} for row in rows]


def differences(one: Path, other: Path) -> list[str]:
    """Name the differences between final checkpoints, exported teachers and logs of two runs."""
    found: list[str] = []
    for name in ("model_final.pth", "teacher_backbone.pth"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        found += _differences(a, b, name)
    if logged(one) != logged(other):
        found.append("metrics.json")
    return found


def _differences(a: Any, b: Any, name: str) -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in _differences(a[key], b[key], f"{name}/{key}")]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (x, y) in pairs for found in _differences(x, y, f"{name}/{i}")]
    else:
        same = a == b
    return [] if same else [name]


def soak(kills: int, steps: int, processes: int, seed: int, folder: Path) -> list[str]:
    """Run both runs, and name their differences at the end."""
    images, whole, parts = folder / "images", folder / "whole", folder / "parts"
    make_images(images)
    length = [f"train.max_iter={steps}", "train.checkpoint_period=5"]
    length += ["--num-gpus", str(processes)]
    begun, first_row = time.monotonic(), 0.0
    process = start(command(images, whole, *length), folder / "whole.log")
    while process.poll() is None:
        metrics = whole / "metrics.json"
        if not first_row and metrics.is_file() and metrics.stat().st_size:
            first_row = time.monotonic() - begun
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the uninterrupted run failed; see {folder / 'whole.log'}")
    duration = time.monotonic() - begun
    print(f"uninterrupted: {steps} steps in {duration:.0f} s", flush=True)

    rng, log, done = random.Random(seed), folder / "parts.log", 0
    resumed = command(images, parts, "--resume", *length)
    while done < kills:
        process = start(resumed, log)
        moment = rng.uniform(0.7 * first_row, duration)  # seldom while the run still starts
        number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
        try:
            status = process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
            status = process.wait(120)
            by_itself = {STOPPED, 128 + number, 0} if number == signal.SIGTERM else set()
            if status not in {-number, *by_itself}:
                raise SystemExit(f"status {status} after {number.name}; see {log}") from None
            done += 1
            last = parts / "last_checkpoint"
            progress = last.read_text() if last.exists() else "no checkpoint yet"
            print(f"{done:3d}  {number.name} after {moment:5.1f} s: {progress}", flush=True)
        else:
            # The run ended before it got enough signals, so it is compared and starts again.
            found = [f"status {status} without a signal"] if status else differences(whole, parts)
            if found:
                return found
            print(f"     finished and equal; again, {kills - done} to go", flush=True)
            shutil.rmtree(parts)
    if start(resumed, log).wait():
        raise SystemExit(f"the last resumption failed; see {log}")
    return differences(whole, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=600, help="length of the run")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--folder", type=Path, help="folder to keep (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as temporary:
        folder = args.folder or Path(temporary)
        found = soak(args.kills, args.steps, args.num_processes, args.seed, folder)
    print(f"{args.kills} kills: " + (f"DIFFERENT in {', '.join(found)}" if found else "equal"))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
