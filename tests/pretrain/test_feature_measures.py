"""Measuring the teacher while it trains changes nothing but the log."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from test_trainer import batches, small_model

from flsl_d2.errors import InputError
from pretrain.hooks import FeatureMeasures
from pretrain.optimizer import build_adamw
from pretrain.schedules import Schedules
from pretrain.trainer import PretrainTrainer

PENN = ("pennfudan_train", "pennfudan_val")
MEASURES = ("knn_box", "knn_segmentation")


class WriteSteps(FeatureMeasures):
    """Notes the steps after which it measured."""

    def _measure(self, encoder) -> None:
        self.__dict__.setdefault("steps", []).append(self.trainer.iter + 1)
        super()._measure(encoder)


def trained(hooks: list) -> tuple[PretrainTrainer, tuple]:
    model = small_model()
    schedules = Schedules(4, iters_per_epoch=2, total_iters=5, base_lr=0.1)
    trainer = PretrainTrainer(model, batches(5), build_adamw(model), schedules)
    trainer.register_hooks(hooks)
    random.seed(0)
    np.random.seed(0)
    trainer.train(0, 5)
    return trainer, (random.random(), np.random.random(), torch.rand(1).item())


def test_run_is_the_same_with_and_without(datasets_root: Path, caplog) -> None:
    hook = WriteSteps(*PENN, MEASURES, period_iters=2, max_images=3, short_side=48)
    with caplog.at_level(logging.WARNING, logger="pretrain"):
        measured, drawn = trained([hook])
    plain, drawn_without = trained([])
    assert drawn == drawn_without
    for one, other in zip(measured.method.parameters(), plain.method.parameters(), strict=True):
        assert torch.equal(one, other)
    assert hook.steps == [2, 4, 5]
    assert measured.method.student.training
    assert not measured.method.teacher.training
    history = measured.storage.histories()["knn_segmentation/mIoU"].values()
    assert [step for _, step in history] == [1, 3, 4]
    assert all(0 <= value <= 100 for value, _ in history)
    warnings = [r.getMessage() for r in caplog.records if r.name == "pretrain"]
    assert len(warnings) == 3
    assert all("knn_box was not measured: the boxes" in text for text in warnings)


def test_without_a_period_only_the_last_step_is_measured(datasets_root: Path) -> None:
    hook = WriteSteps(*PENN, ["knn_segmentation"], max_images=2, short_side=48)
    trained([hook])
    assert hook.steps == [5]


def test_data_are_checked_before_training() -> None:
    with pytest.raises(InputError, match="not registered"):
        FeatureMeasures("pennfudan_trian", "pennfudan_val")
    with pytest.raises(InputError, match="no measure 'miou'"):
        FeatureMeasures(*PENN, ["miou"])


def test_storage_gets_nothing_where_everything_fails(datasets_root: Path) -> None:
    hook = WriteSteps(*PENN, ["knn_box"], max_images=2, short_side=48)
    trainer, _ = trained([hook])
    assert isinstance(trainer.storage, EventStorage)
    assert not [name for name in trainer.storage.histories() if name.startswith("knn_box")]


def test_published_protocols_are_measured_with_their_options(datasets_root: Path) -> None:
    options = {"side": 48, "fractions": (1,), "num_clusters": 4, "cluster_seeds": 1}
    hook = FeatureMeasures(*PENN, ["in_context", "clustering"], max_images=2, **options)
    trainer, _ = trained([hook])
    assert {"in_context/mIoU", "clustering/foreground_mIoU"} < set(trainer.storage.histories())
