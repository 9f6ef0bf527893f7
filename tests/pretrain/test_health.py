"""Health in words: each state is provoked, and a run that is judged ends as one that is not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from flsl_d2.modeling import FLSLViT
from pretrain.__main__ import main
from pretrain.health import HealthReport, judge_health
from pretrain.monitor import CollapseWatch

K = 16


@pytest.fixture
def files(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (64, 48)))
    return sorted(map(str, folder.iterdir()))


def encoder() -> FLSLViT:
    return FLSLViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()


def run(files, backbone, loss_inter=2.0, assigned=None, feature_std=0.7) -> HealthReport:
    """Judge 100 steps of these values."""
    method = SimpleNamespace(exported_encoder=lambda: backbone, num_centroids=K)
    assigned = torch.full((K,), 5) if assigned is None else assigned
    with EventStorage(0) as storage:
        trainer = SimpleNamespace(method=method, max_iter=100, storage=storage, monitored={
            "assigned": assigned, "feature_std": torch.tensor(feature_std),
        })  # fmt: skip
        watch = CollapseWatch()
        report = HealthReport(files, watch, 0, short_side=48)
        for hook in (watch, report):
            hook.trainer = trainer
        for iteration in range(100):
            trainer.iter = storage.iter = iteration
            storage.put_scalar("loss_inter", loss_inter)
            watch.after_step()
            report.after_step()
        assert ("position_r2" in storage.histories()) == bool(files)
    return report


def test_learning(files, caplog):
    with caplog.at_level(logging.INFO):
        report = run(files, encoder())
    assert report.health.state == "learning"
    (line,) = (r for r in caplog.records if r.getMessage().startswith("Health"))
    assert "Health after 100 steps: learning: the loss between views is 2.00 (log K 2.77)" in (
        line.getMessage()
    )
    assert line.levelno == logging.INFO


def test_still_at_log_k(files):
    health = run(files, encoder(), loss_inter=0.99 * math.log(K)).health
    assert health.state == "still at log K"
    assert "log K 2.77" in health.text


@pytest.mark.parametrize("how", ["one centroid", "constant features"])
def test_collapsing(how, files):
    assigned = torch.zeros(K, dtype=torch.int64)
    assigned[3] = 80
    values = {"assigned": assigned} if how == "one centroid" else {"feature_std": 0.01}
    health = run(files, encoder(), loss_inter=math.log(K), **values).health
    assert health.state == "collapsing"  # graver than a loss at log K
    assert ("centroid 3 has 100.0%" in health.text) == (how == "one centroid")


def test_a_map_of_places(files):
    """An encoder that does not see the pixels has nothing but positions."""
    blind = encoder()
    nn.init.zeros_(blind.patch_embed.proj.weight)
    report = run(files, blind)
    assert report.health.state == "a map of places"
    assert "position explains 100%" in report.health.text
    assert report._untrained < 0.9


@pytest.mark.parametrize(
    ("place", "untrained", "state"),
    [
        (0.82, 0.33, "a map of places"),  # the record's runs
        (0.62, 0.33, "a map of places"),
        (0.12, 0.33, "learning"),
        (0.45, 0.05, "learning"),
        (0.85, 0.8, "learning"),  # an architecture whose untrained tokens are mostly positions
        (None, None, "learning"),
    ],
)
def test_the_bound_of_a_map(place, untrained, state):
    assert judge_health([], 2.0, K, 9, place, untrained).state == state


def test_methods_without_centroids_and_unreadable_images_are_judged_too(tmp_path):
    assert judge_health([], None, 0, None, None, None).state == "learning"
    assert run([], encoder()).health.text.endswith("is not known")


def test_a_run_says_its_health_and_ends_with_the_same_weights(files, tmp_path, run_main):
    common = [
        *("--config-file", "demo/flsl_vit_scenes.py", "--images", str(Path(files[0]).parent)),
        *("train.max_iter=4", "train.log_period=2", "dataloader.total_batch_size=2"),
        *("model.backbone.depth=1", "views.global_size=32", "views.local_size=16"),
        "train.pictures_period=0",
    ]
    weights = []
    for period in (0, 2):
        output = tmp_path / str(period)
        options = [f"train.output_dir={output}", f"train.health_period={period}"]
        status, _, error = run_main(main, *common, *options)
        assert status == 0, error
        log = (output / "log.txt").read_text()
        assert log.count("Health after") == (2 if period else 1)
        weights.append(torch.load(output / "teacher_backbone.pth", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
