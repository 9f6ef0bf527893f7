"""Recipes of the methods at a size at which a step takes milliseconds."""

from __future__ import annotations

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig

from flsl_d2.engine.config_files import CONFIGS_FOLDER, load_lazy_config

# By method: the recipes of the methods other than FLSL.
RECIPES = {
    path.name.partition("_vit_")[0]: f"configs/pretrain/{path.name}"
    for path in sorted((CONFIGS_FOLDER / "pretrain").glob("*_vit_*.py"))
    if not path.name.startswith("flsl_vit_")
}
TINY = [
    *("views.global_size=16", "model.backbone.patch_size=4", "model.backbone.embed_dim=16"),
    *("model.backbone.depth=1", "model.backbone.num_heads=2", "model.backbone.drop_path_rate=0.0"),
    "schedules.teacher_momentum=[0.9,1.0]",
    "schedules.frozen_last_layer_epochs=0",
]
LOCAL = ["views.local_size=8", "views.num_local=1"]
HEAD = ["model.head.num_centroids=8", "model.head.hidden_dim=8", "model.head.bottleneck_dim=8"]
# What each method needs beside these to be tiny.
SMALL = {
    "dino": [*LOCAL, *HEAD],
}


def tiny_config(name: str, *overrides: str) -> DictConfig:
    return load_lazy_config(RECIPES[name], [*TINY, *SMALL[name], *overrides])


def tiny_method(name: str, *overrides: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return instantiate(tiny_config(name, *overrides).model)
