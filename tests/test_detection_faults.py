"""Signals on real detection runs: they stop with a checkpoint."""

from __future__ import annotations

import json
import signal
import sys
import time

import pytest
import torch
from forked import ForkedJob
from test_train_net import PY, TINY_PY, TINY_YAML, YAML

STOPPED = 75
LONG_PY = [*TINY_PY, "train.max_iter=100000", "train.checkpointer.period=2", "train.log_period=1"]
LONG_YAML = [*TINY_YAML, "SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "2"]


@pytest.mark.parametrize("kind", ["py", pytest.param("yaml", marks=pytest.mark.slow)])
def test_stops_with_a_checkpoint(kind, few_images, tmp_path, forked_workers):
    """tests/test_train_net.py goes on from one."""
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = (
        [PY, *LONG_PY, f"train.output_dir={output}", "--num-gpus", "2"]
        if kind == "py"
        else [YAML, *LONG_YAML, "OUTPUT_DIR", str(output)]
    )
    datasets = few_images("pennfudan", "coco")
    with log.open("wb") as file:
        process = ForkedJob(
            [sys.executable, "-m", "flsl_d2.detection", "--config-file", *arguments],
            env={"DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
            stdout=file,
        )
    deadline = time.monotonic() + 200
    while not (output / "model_0000001.pth").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == STOPPED, log.read_text()
    assert "Traceback" not in log.read_text()
    last = (output / "last_checkpoint").read_text()
    iteration = torch.load(output / last, weights_only=True)["iteration"]
    assert last == f"model_{iteration:07d}.pth"
    if kind == "py":
        rows = [json.loads(row)["iteration"] for row in (output / "metrics.json").open()]
        assert sorted(set(rows)) == rows
        assert rows[-1] == iteration
