"""Runs whose images lie on a server."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import TrainingError
from flsl_d2.images.shards import make_shards
from pretrain.run import run_pretraining

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
from flaky_server import FlakyFileSystem

TINY = [
    *("train.device=cpu", "train.max_iter=6", "train.log_period=1", "train.checkpoint_period=100"),
    *("dataloader.num_workers=0", "dataloader.total_batch_size=2"),
    *("views.global_size=64", "views.local_size=32"),
    *("model.backbone.embed_dim=24", "model.backbone.depth=1", "model.backbone.num_heads=1"),
    *("model.head.num_centroids=8", "model.head.hidden_dim=16", "model.head.bottleneck_dim=8"),
    *("train.pictures_period=0", "dataset.patience=0.3"),
]


def run(root: str, output: Path, resume: bool = False) -> None:
    overrides = [*TINY, f"dataset.root={root}", f"train.output_dir={output}"]
    cfg = load_lazy_config("configs/pretrain/flsl_vit_small_p16_in1k.py", overrides)
    run_pretraining(cfg, resume)


def test_a_server_that_goes_away_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), image)
    make_shards(str(tmp_path / "images"), tmp_path / "shards", 4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(str(tmp_path / "images"), whole)
    server = FlakyFileSystem.reset(tmp_path / "shards")
    # The index, the images that are tried first, and those of five steps.
    server.limit = 1 + 8 + 2 * 5
    with pytest.raises(TrainingError, match=r"did not answer .* after step 4 is written"):
        run("flaky://data", parts)
    assert (parts / "last_checkpoint").read_text() == "model_0000003.pth"
    server.limit = float("inf")
    run("flaky://data", parts, resume=True)
    files = [torch.load(each / "model_final.pth", weights_only=True) for each in (whole, parts)]
    for name, tensor in files[0]["model"].items():
        assert torch.equal(tensor, files[1]["model"][name]), name
