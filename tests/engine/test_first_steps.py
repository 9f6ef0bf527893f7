"""What training shows of itself: progress, the expected duration, why no batch comes."""

from __future__ import annotations

import logging
import multiprocessing
import time
from types import SimpleNamespace

import pytest

from flsl_d2.engine import first_steps, gpus
from flsl_d2.engine.first_steps import FirstSteps

LOGGER = logging.getLogger("test_first_steps")


def trained(hook: FirstSteps, steps: int, **before) -> None:
    median = SimpleNamespace(median=lambda _: 2.0)
    storage = SimpleNamespace(history=lambda _: median)
    hook.trainer = SimpleNamespace(start_iter=0, max_iter=100, storage=storage)
    hook.before_train()
    for hook.trainer.iter in range(steps):
        hook.after_step()
    hook.after_train()


def test_progress_then_the_writers_lines_then_the_duration(caplog):
    caplog.set_level(logging.INFO)
    trained(FirstSteps(8, "pictures", LOGGER, log_period=6), 20)
    progress, duration = caplog.messages
    assert progress.startswith("training: 5 of 100 done")
    assert duration.startswith("After 8 steps: 2 s a step, so 0:03:04 remain")


def test_a_first_batch_that_does_not_come_is_explained(caplog, monkeypatch):
    monkeypatch.setattr(first_steps, "_PATIENCE_SECONDS", 0.1)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    hook = FirstSteps(8, "pictures", LOGGER)
    hook.trainer = SimpleNamespace(start_iter=0, max_iter=100)
    hook.before_train()
    deadline = time.monotonic() + 30
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.kill()
    worker.join()
    assert f"data worker {worker.pid} waits" in caplog.text
    assert __file__ in caplog.text


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "150000 100000"}, 1.5),
        ("0::/job\n", {"job/cpu.max": "max 100000", "cpu.max": "200000 100000"}, 2.0),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 0.0),
        ("0::/../other\n", {}, 0.0),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a/b\n",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "3:cpu:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            0.0,
        ),
    ],
)
def test_quota_of_control_groups(group, files, cores, tmp_path):
    own = tmp_path / "own"
    own.write_text(group)
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert gpus._cpu_quota(str(tmp_path / "root"), str(own)) == cores
