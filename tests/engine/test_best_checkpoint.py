"""The best weights are kept, also over a resume, and patience ends a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from torch import nn

from flsl_d2.engine.checkpoints import BEST_FILE, Checkpoints, EndedEarly, KeepBest, StopEarly
from flsl_d2.weights.checkpointer import SafeCheckpointer, checkpoint_files


class Counter(TrainerBase):
    """A trainer whose one weight is the number of steps done."""

    def __init__(self, folder: Path, values: list[float], patience: int) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        checkpointer = SafeCheckpointer(self.model, str(folder))
        checkpoints = Checkpoints(checkpointer, period=100)
        best = KeepBest(1, checkpointer, "bbox/AP")
        evaluate = hooks.EvalHook(1, lambda: {"bbox": {"AP": values[self.iter_done - 1]}})
        self.register_hooks(
            [checkpoints, evaluate, best, StopEarly(checkpoints, best, patience, 1)]
        )
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
