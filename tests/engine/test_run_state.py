"""Folders that hold a run already, the rows of its metrics, and its best weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyCall
from detectron2.engine import TrainerBase, hooks
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from flsl_d2.engine.checkpoints import BEST_FILE, Checkpoints, EndedEarly, KeepBest, StopEarly
from flsl_d2.engine.run_folder import (
    NeutralKeys,
    ResumeOptions,
    check_and_keep_run,
    flat_config,
    trim_metrics,
)
from flsl_d2.errors import InputError
from flsl_d2.weights.checkpointer import SafeCheckpointer, checkpoint_files


def config(**train):
    cfg = OmegaConf.create({"train": {"lr": 0.1, "betas": [0.9, 0.99], **train}})
    cfg.model = LazyCall(nn.Linear)(in_features="${train.width}", out_features=2)
    cfg.train.width = 3
    return cfg


def keep(folder, cfg, *options, **also):
    neutral = NeutralKeys((), ("train.log*",))
    check_and_keep_run(cfg, folder, "train.output_dir", ResumeOptions(*options), neutral, also)


def test_every_key_by_its_full_name():
    assert flat_config(config()) == {
        "train.lr": "0.1",
        "train.betas": "[0.9, 0.99]",
        "train.width": "3",
        "model._target_": "torch.nn.modules.linear.Linear",
        "model.in_features": "3",
        "model.out_features": "2",
    }
    assert flat_config(CfgNode({"A": {"B": (1, 2), "C": None}})) == {"A.B": "[1, 2]", "A.C": "None"}


def test_values_without_a_text_of_their_own_do_not_differ_from_process_to_process():
    first, second = ({"x": {"f": lambda: 1, "o": object()}} for _ in range(2))
    flags = {"allow_objects": True}
    assert flat_config(OmegaConf.create(first, flags=flags)) == flat_config(
        OmegaConf.create(second, flags=flags)
    )


def test_the_same_run_is_continued_and_another_is_not(tmp_path, caplog):
    keep(tmp_path, config(), images="10")
    keep(tmp_path, config(lr=0.2), images="10")  # no checkpoint: nothing to lose
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    keep(tmp_path, config(lr=0.2, log_period=3), True, images="10")
    with pytest.raises(InputError, match=r"images: 10 -> 9; train\.lr: 0\.2 -> 0\.1"):
        keep(tmp_path, config(), True, images="9")
    with pytest.raises(InputError, match=r"--resume.*--overwrite"):
        keep(tmp_path, config(lr=0.2), images="10")
    # What is refused leaves no trace: the run's own settings still fit.
    keep(tmp_path, config(lr=0.2), True, images="10")
    keep(tmp_path, config(), True, True, images="10")
    assert "train.lr: 0.2 -> 0.1" in caplog.text
    keep(tmp_path, config(), True, images="10")
    keep(tmp_path, config(lr=5), False, False, True, images="10")
    assert not list(tmp_path.glob("model_*"))
    assert "lr: 5" in (tmp_path / "config.yaml").read_text()


def test_keys_of_a_newer_version_are_no_change_where_off_or_at_their_default(tmp_path):
    keep(tmp_path, config())
    (tmp_path / "model_0000009.pth").write_bytes(b"")
    before = (tmp_path / "run.json").read_text()

    def go_on(cfg):
        (tmp_path / "run.json").write_text(before)
        keep(tmp_path, cfg, True)

    for value in (0, 0.0, "", None, False, []):
        go_on(config(new=value))
    cfg = config()
    cfg.model.bias = True  # the default of torch.nn.Linear
    go_on(cfg)
    cfg.model.device = "meta"
    with pytest.raises(InputError, match=r"model\.device: absent -> meta"):
        go_on(cfg)
    with pytest.raises(InputError, match=r"train\.new: absent -> 1"):
        go_on(config(new=1))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": 3}'])
def test_a_lost_record_is_said(content, tmp_path, caplog):
    (tmp_path / "model_final.pth").write_bytes(b"")
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    keep(tmp_path, config(), True)
    assert "run.json" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["train.lr"] == "0.1"


@given(
    rows=st.lists(st.integers(0, 30), unique=True).map(sorted),
    steps=st.integers(0, 40),
    cut=st.integers(0, 30),
)
def test_rows_beyond_the_checkpoint_and_half_rows_go(tmp_path_factory, rows, steps, cut):
    path = tmp_path_factory.mktemp("rows") / "metrics.json"
    text = "".join(json.dumps({"iteration": row, "loss": row / 3}) + "\n" for row in rows)
    torn = text[: len(text) - cut]
    path.write_text(torn)
    trim_metrics(path, steps)
    whole = [row for row in torn.splitlines(keepends=True) if row.endswith("\n")]
    kept = [row for row in whole if json.loads(row)["iteration"] < steps]
    assert path.read_text() == "".join(kept)


def test_no_metrics_to_trim(tmp_path):
    assert trim_metrics(tmp_path / "metrics.json", 5) == 0


class Counter(TrainerBase):
    """A trainer whose one weight is the number of steps done."""

    def __init__(self, folder: Path, values: list[float], patience: int) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        checkpointer = SafeCheckpointer(self.model, str(folder))
        checkpoints = Checkpoints(checkpointer, period=100)
        best = KeepBest(1, checkpointer, "bbox/AP")
        evaluate = hooks.EvalHook(1, lambda: {"bbox": {"AP": values[self.iter_done - 1]}})
        stop = StopEarly(checkpoints, best, patience, 1)
        self.register_hooks([checkpoints, evaluate, best, stop])
        self.best = best

    @property
    def iter_done(self) -> int:
        return int(self.model.weight.item())

    def run_step(self) -> None:
        with torch.no_grad():
            self.model.weight.fill_(self.iter + 1)


def saved(folder: Path, name: str) -> int:
    return int(torch.load(folder / f"{name}.pth", weights_only=True)["model"]["weight"].item())


def test_the_best_is_kept_and_patience_ends_training(tmp_path):
    values = [1.0, 3.0, 2.0, math.nan, 2.5, 9.0, 9.0]
    with pytest.raises(EndedEarly):
        Counter(tmp_path, values, patience=3).train(0, 7)
    assert saved(tmp_path, "model_best") == 2
    assert saved(tmp_path, "model_final") == 5
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert [file.name for file in checkpoint_files(tmp_path)] == ["model_final.pth"]
    kept = json.loads((tmp_path / BEST_FILE).read_text())
    assert (kept["value"], kept["iteration"], kept["evaluations_without_gain"]) == (3.0, 1, 3)
    # A run that goes on knows the best value so far; more patience lets it find the next one.
    Counter(tmp_path, values, patience=4).train(5, 7)
    assert saved(tmp_path, "model_best") == 6


def test_a_new_run_forgets_the_best_of_another(tmp_path):
    Counter(tmp_path, [5.0, 4.0], patience=9).train(0, 2)
    trainer = Counter(tmp_path, [1.0, 2.0], patience=9)
    trainer.train(0, 2)
    assert trainer.best.best_metric == 2.0
    assert saved(tmp_path, "model_best") == 2
