"""Weights & Biases and MLflow without a network: values arrive, and runs are continued."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage
from PIL import Image

from flsl_d2.engine.trackers import IDS_FILE, ScalarWriter, build_trackers
from flsl_d2.errors import InputError


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def write(writer: ScalarWriter, first: int, last: int) -> None:
    with EventStorage(first) as storage:
        for step in range(first, last):
            storage.iter = step
            storage.put_scalars(loss=1.0 + step, lr=0.1 * step, smoothing_hint=False)
            writer.write()
        writer.write()  # nothing is new
    writer.close()


def test_mlflow_has_every_step_and_a_resumed_run_goes_on(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    settings = {"train.max_iter": "6", "long": "x" * 10_000, "model.AP (%)": "1"}
    for first in (0, 3):
        (writer,) = build_trackers(["mlflow"], tmp_path / "run", settings)
        write(writer, first, first + 3)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    (experiment,) = (e for e in client.search_experiments() if e.name == "flsl-d2")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["train.max_iter"] == "6"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(i, 1.0 + i) for i in range(6)]


def test_wandb_writes_offline_and_keeps_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    (writer,) = build_trackers(["wandb"], tmp_path / "run", {"train.max_iter": "6"})
    write(writer, 0, 3)
    kept = json.loads((tmp_path / "run" / IDS_FILE).read_text())
    assert kept == {"wandb": writer.run.id}
    (log,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{writer.run.id}.wandb")
    # A process of wandb writes the file.
    deadline = time.monotonic() + 120
    while b"loss" not in (content := log.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert b"train.max_iter" in content


def test_unknown_and_missing_trackers_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="names neptune; use a list of wandb, mlflow"):
        build_trackers(["neptune"], tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'flsl-d2\[trackers\]'"):
        build_trackers(["wandb"], tmp_path, {})
    assert build_trackers([], tmp_path, {}) == []


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, caplog):
    class Broken(ScalarWriter):
        name = "broken"
        calls = 0

        def send(self, scalars):
            self.calls += 1
            raise OSError("no network")

    broken = Broken(tmp_path)
    with caplog.at_level(logging.WARNING):
        write(broken, 0, 3)
    assert broken.calls == 3
    (message,) = caplog.messages
    assert "broken cannot be written" in message


def test_pretraining_writes_to_the_tracker(tmp_path, run_main):
    pytest.importorskip("mlflow")
    from pretrain.__main__ import main

    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40), (90 * i, 9, 9)).save(tmp_path / f"images/{i}.png")
    small = """
        --config-file demo/flsl_vit_scenes.py train.max_iter=2 train.log_period=1
        dataloader.total_batch_size=2 model.backbone.depth=1 views.global_size=32
        views.local_size=16 train.trackers=[mlflow]
    """
    folders = ("--images", str(tmp_path / "images"), "--output", str(tmp_path / "run"))
    status, _, error = run_main(main, *small.split(), *folders)
    assert status == 0, error
    (metrics,) = Path(tmp_path, "run", "mlruns").glob("*/*/metrics/loss")
    assert len(metrics.read_text().splitlines()) == 2
