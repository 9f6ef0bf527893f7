"""Each method's own task on photographs: after a minute it is solved better than by guessing.

``make slow-tests`` with ``DETECTRON2_DATASETS``; 64 photographs, a ViT of two blocks, a CPU.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from test_methods import build, train
from tiny_methods import RECIPES, tiny_config

PHOTOGRAPHS = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "photographs"
STEPS, BATCH = 300, 32
SETTINGS = [
    *("views.global_size=64", "model.backbone.patch_size=8", "model.backbone.embed_dim=64"),
    *("model.backbone.depth=2", "model.backbone.num_heads=4"),
]
LOCAL = ["views.local_size=32", "views.num_local=2"]
HEAD = [f"model.head.{key}" for key in ("num_centroids=64", "hidden_dim=128", "bottleneck_dim=32")]
DECODER = ["model.decoder_dim=64", "model.decoder_depth=1", "model.decoder_heads=4"]
MLP = ["model.hidden_dim=128", "model.output_dim=64"]
# Options beside these; what is logged, its value for guessing, and the value to reach. A loss is to
# fall, and an accuracy to rise. Guessing gives every answer the same probability, or the mean.
TASKS: dict[str, tuple[list[str], str, float, float]] = {
    "dino": ([*LOCAL, *HEAD], "loss", math.log(64), 3.6),
    "ibot": ([*LOCAL, *HEAD], "loss_global", math.log(64), 3.7),
    "selfpatch": (
        [*LOCAL, *HEAD, *(each.replace("head", "patch_head") for each in HEAD)],
        "loss_global",
        math.log(64),
        3.7,
    ),
    "adclr": (
        ["views.local_size=8", "views.num_local=2", *HEAD],
        "loss_global",
        math.log(64),
        3.7,
    ),
    "mae": (DECODER, "loss", 1.0, 0.85),
    "beit": (["model.num_codes=64"], "loss", math.log(64), 3.3),
    "maskfeat": ([], "loss", 0.05, 0.04),
    "droppos": (
        [*DECODER, "model.mask_share=0.25", "model.drop_share=0.75"],
        "position_accuracy",
        1 / 64,
        0.10,
    ),
    "simclr": (MLP, "loss", math.log(63), 3.0),
    "moco_v3": (MLP, "loss", 4 * 0.2 * math.log(BATCH), 2.3),
    "densecl": ([*MLP, "model.queue_length=256"], "loss_dense", math.log(257), 5.0),
    "detcon": ([*MLP, "model.num_segments=4", "views.segments=grid"], "loss", math.log(256), 5.0),
    "swav": ([*LOCAL, *MLP, "model.num_prototypes=64"], "loss", math.log(64), 3.6),
    "vicreg": (MLP, "loss", 25.0, 22.0),
    "vicregl": (
        [*LOCAL, *MLP, "model.local_dim=64", "model.num_matches=[10,4]"],
        "loss",
        25.0,
        22.0,
    ),
    "rotation": ([], "task_accuracy", 1 / 4, 0.40),
    "jigsaw": (
        ["model.num_permutations=10", "model.hidden_dim=128"],
        "task_accuracy",
        1 / 10,
        0.25,
    ),
    "context": (["model.hidden_dim=128"], "task_accuracy", 1 / 8, 0.20),
    "colorization": ([], "loss", math.log(22**2), 2.5),
    "navit": ([*LOCAL, *HEAD], "loss_inter", math.log(64), 3.7),
}


def test_every_method_has_a_task():
    assert TASKS.keys() == {name for name in RECIPES if "resnet" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_method_learns(name):
    files = sorted(map(str, PHOTOGRAPHS.rglob("*.jpg")))[:64]
    if not files:
        pytest.skip(f"{PHOTOGRAPHS} has no photographs; set DETECTRON2_DATASETS")
    options, quantity, guess, reached = TASKS[name]
    cfg = tiny_config(name, *SETTINGS, *options)
    cfg.schedules.update(warmup_fraction=0.1, teacher_temp=(0.04, 0.04))
    trainer = build(cfg, files, batch=BATCH, base_lr=8e-3, steps=STEPS)
    start = train(trainer, 0, 1)[quantity]
    value = train(trainer, 1, STEPS)[quantity]
    print(f"\n{name} | {quantity} | guessing {guess:.3f} | start {start:.3f} | end {value:.3f}")
    if "accuracy" in quantity:
        assert value > reached > guess
    else:
        assert value < reached < guess
