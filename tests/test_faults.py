"""Signals, damaged files, full disks and bad numbers, on real runs of the pre-training tool."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import soak
import torch
from forked import ForkedJob, run_forked

LENGTH = ["train.max_iter=25", "train.checkpoint_period=5", "dataloader.num_workers=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, and a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("faults")
    soak.make_images(folder / "images")
    status, text = run(folder, "whole", *LENGTH)
    assert status == 0, text
    return folder


def run(folder: Path, output: str, *arguments: str, **options) -> tuple[int, str]:
    command = soak.command(folder / "images", folder / output, *arguments)
    done = run_forked(command, env={"OMP_NUM_THREADS": "1"}, **options)
    return done.returncode, done.stdout + done.stderr


def start_and_wait_for(folder: Path, output: str, checkpoint: str, *arguments: str):
    """Start a run and wait until it has written a checkpoint; return it and its log file."""
    log = folder / f"{output}.log"
    command = soak.command(folder / "images", folder / output, *arguments)
    with log.open("ab") as file:
        process = ForkedJob(command, stdout=file, env={"OMP_NUM_THREADS": "1"}, cwd=soak.ROOT)
    deadline = time.monotonic() + 200
    while not (folder / output / checkpoint).exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    return process, log


def test_killed_and_damaged_and_still_equal_to_the_bit(folder):
    process, log = start_and_wait_for(folder, "parts", "model_0000009.pth", *LENGTH)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, log.read_text()
    output = folder / "parts"
    newest = output / (output / "last_checkpoint").read_text()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    newest.write_bytes(content)
    with (output / "metrics.json").open("a") as file:
        file.write('{"iteration": 999, "loss": 0.0}\n{"iterati')
    for name in ("model_0000099.pth", "last_checkpoint"):
        (output / f"{name}.0123cdef.part").write_bytes(b"half")

    other = ("schedules.base_lr=1.0", "train.log_period=1")
    refused, text = run(folder, "parts", "--resume", *LENGTH, *other)
    assert refused == 2
    assert "schedules.base_lr: 0.0005 -> 1.0" in text
    assert "--allow-changes" in text
    assert "Traceback" not in text

    status, text = run(folder, "parts", "--resume", *LENGTH, "train.checkpoint_keep=3")
    assert status == 0, text
    assert f"{newest.name} is damaged" in text
    assert "Falling back" in text
    assert not list(output.glob("*.part"))
    assert soak.differences(folder / "whole", output) == []


def test_two_processes_stop_when_asked_and_one_goes_on(folder, forked_workers):
    long = ["train.max_iter=100000", *LENGTH[1:]]
    process, log = start_and_wait_for(
        folder, "stopped", "model_0000004.pth", "--num-gpus", "2", *long
    )
    process.send_signal(signal.SIGUSR1)  # to the parent alone, which passes it on
    assert process.wait(100) == soak.STOPPED, log.read_text()
    assert "it goes on with:" in log.read_text()
    assert "Traceback" not in log.read_text()
    output = folder / "stopped"
    last = (output / "last_checkpoint").read_text()
    iteration = torch.load(output / last, weights_only=True)["iteration"]
    assert last == f"model_{iteration:07d}.pth"
    rows = [row["iteration"] for row in soak.logged(output)]
    assert rows == list(range(2, iteration + 1, 3))  # log_period=3

    started, log = start_and_wait_for(
        folder, "stopped", f"model_{(iteration // 5 + 2) * 5 - 1:07d}.pth", "--resume", *long
    )
    os.killpg(started.pid, signal.SIGTERM)
    time.sleep(1)
    started.send_signal(signal.SIGTERM)  # ends at once what still runs
    assert started.wait(30) in (soak.STOPPED, 128 + signal.SIGTERM)
    assert f"Resumed after step {iteration + 1}" in log.read_text()
    assert "2 process(es) and goes on with 1" in log.read_text()


def test_bad_numbers_name_their_images(folder):
    status, text = run(folder, "bad", *LENGTH, "schedules.base_lr=1e30", "train.clip_mode=none")
    assert status == 3, text
    assert "Traceback" not in text
    assert "not finite" in text
    report = json.loads((folder / "bad" / "bad_numbers.json").read_text())
    assert f"iteration {report['iteration']} " in text
    (rank,) = report["ranks"]
    assert rank["not_finite"]
    assert not any(math.isfinite(float(rank["values"][name])) for name in rank["not_finite"])
    assert len(rank["files"]) == 4
    assert all(Path(name).parent == folder / "images" for name in rank["files"])
    for file in (folder / "bad").glob("model_*.pth"):
        weights = torch.load(file, weights_only=True)["model"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_file_that_cannot_be_written_leaves_the_one_before(folder):
    size = (folder / "whole" / "model_final.pth").stat().st_size

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    (folder / "full").mkdir()
    good = b"the last good one"
    (folder / "full" / "teacher_backbone.pth").write_bytes(good)
    status, text = run(folder, "full", *LENGTH, "train.max_iter=6", before=little_room)
    assert status == 3, text
    assert "Traceback" not in text
    assert "model_0000004.pth cannot be written" in text
    assert "Training goes on" in text
    assert "error: checkpoint model_final.pth cannot be written" in text
    assert not list((folder / "full").glob("model_*"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_soak(processes, tmp_path):
    assert soak.soak(kills=6, steps=200, processes=processes, seed=1, folder=tmp_path) == []
