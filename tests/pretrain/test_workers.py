"""Data workers that really die: killed, out of shared memory, out of files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flsl_d2.errors import InputError
from pretrain.workers import (
    WorkerLoader,
    explain_worker_failure,
    keep_quiet_about_lost_trainer,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL_SHARED_MEMORY = (  # a /dev/shm of 1 MiB for one process and its children
    "unshare", "--mount", "sh", "-c",
    'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh",
)  # fmt: skip
SCENARIOS = """
import json, multiprocessing, os, resource, signal, sys, tempfile, time
from flsl_d2.engine.command_line import run_tool
from flsl_d2.data.image_files import find_images
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.views import NestedViews

def batches(batch_size=4, patch_size=8, global_size=32, local_size=16):
    views = NestedViews(patch_size, global_size, local_size)
    return iter(build_pretrain_loader(PretrainDataset(files, views), batch_size, num_workers=2))

def kill(number):
    os.kill(multiprocessing.active_children()[0].pid, number)

def killed_while_batches_are_fetched():
    loader = batches()
    next(loader)
    kill(signal.SIGKILL)
    for _ in range(10000):
        next(loader)

def crashed_while_the_model_computes():
    loader = batches()
    next(loader)
    kill(signal.SIGSEGV)
    time.sleep(60)
    print("not noticed", file=sys.stderr)

def out_of_shared_memory():
    for _, batch in zip(range(10), batches(16, 16, 224, 96)):
        pass

def out_of_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    loader = batches()
    kept = [next(loader) for _ in range(100)]

files, outcomes = find_images(sys.argv[1]), {}
for scenario in sys.argv[2:]:
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            run_tool(globals()[scenario])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        text = said.read().decode().replace("\\0", "")  # the loader's own message ends in one
        outcomes[scenario] = [status, text, time.monotonic() - start]
print(json.dumps(outcomes))
"""


def may_mount() -> bool:
    command = [*SMALL_SHARED_MEMORY, "true"]
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """Of each scenario the exit status, what it said on stderr, and the seconds it took."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    scenarios = ["killed_while_batches_are_fetched", "crashed_while_the_model_computes",
                 "out_of_files"]  # fmt: skip
    before = ()
    if may_mount():
        scenarios.append("out_of_shared_memory")
        before = SMALL_SHARED_MEMORY
    result = subprocess.run(
        [*before, sys.executable, "-c", SCENARIOS, str(folder), *scenarios],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def sentence_of(outcome: tuple[int, str, float]) -> str:
    """What a tool says that stops for a known reason: one line, the last."""
    status, said, seconds = outcome
    assert status == 2, said
    assert seconds < 60
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert said.endswith(lines[0] + "\n")
    return lines[0]


def test_a_worker_keeps_quiet_about_a_lost_trainer_alone(monkeypatch) -> None:
    said = []
    monkeypatch.setattr(sys, "excepthook", lambda *about: said.append(about))
    keep_quiet_about_lost_trainer()
    fault = ValueError("of another kind")
    for error in (ConnectionResetError(104, "reset"), BrokenPipeError(), EOFError(), fault):
        sys.excepthook(type(error), error, None)
    assert said == [(ValueError, fault, None)]


def test_killed_while_batches_are_fetched(outcomes: dict) -> None:
    outcome = outcomes["killed_while_batches_are_fetched"]
    sentence = sentence_of(outcome)
    assert "is killed by signal: Killed" in sentence
    assert "memory" in sentence
    assert "--resume" in sentence
    assert "Traceback" not in outcome[1]


def test_crashed_while_the_model_computes(outcomes: dict) -> None:
    outcome = outcomes["crashed_while_the_model_computes"]
    sentence = sentence_of(outcome)
    assert "Segmentation fault" in sentence
    assert "num_workers=0" in sentence
    assert "not noticed" not in outcome[1]


def test_shared_memory_that_is_too_small(outcomes: dict) -> None:
    if "out_of_shared_memory" not in outcomes:
        pytest.skip("this user may not mount a /dev/shm of its own")
    sentence = sentence_of(outcomes["out_of_shared_memory"])
    assert "ran out of shared memory (/dev/shm has 0.000977 GiB)" in sentence
    assert "--shm-size" in sentence


def test_too_few_open_files(outcomes: dict) -> None:
    assert "ulimit -n" in sentence_of(outcomes["out_of_files"])


class Faulty(torch.utils.data.Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> int:
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
def test_input_errors_of_workers_stay_sentences(workers: int) -> None:
    loader = WorkerLoader(Faulty(InputError("file 'x: y' is wrong; mend it.")), num_workers=workers)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert str(caught.value) == "file 'x: y' is wrong; mend it."


@pytest.mark.parametrize("workers", [0, 1])
def test_defects_keep_their_traceback(workers: int) -> None:
    loader = WorkerLoader(Faulty(RuntimeError("shapes differ")), num_workers=workers)
    with pytest.raises(RuntimeError, match="shapes differ"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
         "dataloader's workers are out of shared memory. Please try to raise your shared memory "
         "limit.", "out of shared memory"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "pid(s) 7, 8"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "memory runs out"),
        ("Pin memory thread exited unexpectedly", "num_workers=0"),
    ],
)  # fmt: skip
def test_messages_of_the_loader_are_explained(message: str, expected: str) -> None:
    assert expected in explain_worker_failure(message)


@pytest.mark.parametrize("message", ["CUDA out of memory", "size mismatch", ""])
def test_other_messages_are_left_alone(message: str) -> None:
    assert explain_worker_failure(message) is None
