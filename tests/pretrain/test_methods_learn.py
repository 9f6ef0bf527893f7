"""Every method learns its own task on 16 photographs: minutes, outside the default run.

The views of the photographs stay the same, so that a hundred steps are enough; masks, turns,
tiles and pairs that a method draws itself are new in each step. What is known without looking at
an image is the bar: a uniform answer, the mean of the targets, or for prototypes the entropy of
the mean assignment, which a collapse to one or to all of them does not go below.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from tiny_methods import HEAD, RECIPES, SMALL

from flsl_d2.engine.config_files import load_lazy_config
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.methods.colorization import rgb_to_lab
from pretrain.methods.maskfeat import hog
from pretrain.optimizer import build_adamw
from pretrain.trainer import PretrainTrainer

IMAGES, OUTPUTS, SEGMENTS, QUEUE = 16, 32, 4, 64
FLSL = "configs/pretrain/flsl_vit_small_p16_in1k.py"
FILES = {**{n: f for n, f in RECIPES.items() if "resnet" not in n}, "flsl": FLSL}
COMMON = """
    views.global_size=64 model.backbone.patch_size=8 model.backbone.embed_dim=96
    model.backbone.depth=3 model.backbone.num_heads=3 model.backbone.drop_path_rate=0.0
    schedules.frozen_last_layer_epochs=0 schedules.base_lr=16e-3 schedules.warmup_fraction=0.1
    schedules.teacher_momentum=[0.9,0.9] schedules.weight_decay=[0.0,0.0]
""".split()
# Larger than in the tests of single steps.
SIZES = {
    "num_centroids": OUTPUTS, "num_prototypes": OUTPUTS, "num_codes": OUTPUTS, "local_size": 32,
    "head.hidden_dim": 64, "bottleneck_dim": 64, "model.hidden_dim": 64, "output_dim": 64,
    "decoder_dim": 64, "local_dim": 64, "queue_length": QUEUE, "num_segments": SEGMENTS,
    "num_permutations": 8, "pack_tokens": 256, "mask_share": 0.25,
}  # fmt: skip
MORE = {
    "ibot": ["schedules.base_lr=8e-3", "schedules.teacher_momentum=[0.97,1.0]"],
    "jigsaw": ["views.global_size=96"],
    "maskfeat": ["schedules.base_lr=64e-3"],
    "flsl": [*HEAD, "views.local_size=32", "views.num_local=2"],
    "detcon": [
        *("views.grey=0.9", "views.jitter_probability=1.0", "views.jitter=[0.8,0.8,0.8,0.4]"),
        "views.global_scale=[0.1,0.5]",
    ],
}
# Steps, what is measured, and a bound between its first and its last value: 0 is the bar, 1 no
# error at all.
PLAN = {
    "adclr": (100, "loss_global", 0.2),
    "beit": (100, "loss", 0.15),
    "colorization": (100, "task_accuracy", 0.1),
    "context": (200, "task_accuracy", 0.1),
    "densecl": (100, "loss_dense", 0.41),
    "detcon": (100, "loss", 0.86),  # untrained tokens know most pairs of 16 images
    "dino": (200, "loss", 0.15),
    "droppos": (100, "position_accuracy", 0.08),
    "flsl": (300, "loss_inter", 0.08),
    "ibot": (250, "loss_patch", 0.5),
    "jigsaw": (100, "task_accuracy", 0.5),
    "mae": (100, "loss", 0.1),
    "maskfeat": (300, "loss", 0.015),
    "moco_v3": (100, "loss", 0.5),
    "navit": (300, "loss_inter", 0.05),
    "rotation": (100, "task_accuracy", 0.5),
    "selfpatch": (100, "loss_global", 0.2),
    "simclr": (100, "loss", 0.5),
    "swav": (100, "loss", 0.2),
    "vicreg": (100, "loss", 0.4),
    "vicregl": (100, "loss", 0.2),
}
# Step after which the first value is taken, where it is not 0.
FIRST = {"densecl": QUEUE // IMAGES + 8}  # the queue is full


def config(name: str):
    options = [*SMALL.get(name, []), *MORE.get(name, [])]
    for i, option in enumerate(options):
        key = option.partition("=")[0]
        options[i] = next((f"{key}={v}" for end, v in SIZES.items() if key.endswith(end)), option)
    return load_lazy_config(FILES[name], [*COMMON, *options])


def bar(name: str, method, batch, assignment) -> float:
    """Value of the measure for an answer that does not depend on the image."""
    if name == "colorization":  # the commonest colour
        lab = rgb_to_lab(torch.cat(batch.views).float() / 255)[:, 1:]
        bins = (torch.nn.functional.avg_pool2d(lab, 8) / 10).floor().movedim(1, -1)
        counts = bins.reshape(-1, 2).unique(dim=0, return_counts=True)[1]
        return counts.max().item() / counts.sum().item()
    if name == "maskfeat":
        targets = hog(method.normalised(torch.cat(batch.views)), cell_size=2)
        return targets.var(dim=(0, 2, 3)).mean().item()
    known = {
        "mae": 1.0,  # the variance of each patch
        "vicreg": 25.0,  # the variance term of equal outputs
        "vicregl": 25.0,
        "context": 1 / 8,
        "jigsaw": 1 / 8,
        "rotation": 1 / 4,
        "droppos": 1 / 64,
        "simclr": math.log(2 * IMAGES - 1),
        "moco_v3": 4 * 0.2 * math.log(IMAGES),
        "densecl": math.log(1 + QUEUE),
        "detcon": math.log(2 * IMAGES * SEGMENTS),
    }
    return known[name] if name in known else float(torch.special.entr(assignment).sum())


def progress(name: str, files: list[str]) -> tuple[float, float]:
    """Train a method; return how far it is from the bar to no error after a step and at the end."""
    steps, measure, _ = PLAN[name]
    cfg = config(name)
    cfg.schedules.update(total_batch_size=IMAGES, iters_per_epoch=1, total_iters=steps)
    torch.manual_seed(0)
    method, views = instantiate(cfg.model), instantiate(cfg.views)
    batch = next(iter(build_pretrain_loader(PretrainDataset(files, views), IMAGES, 0)))
    schedules, optimizer = instantiate(cfg.schedules), build_adamw(method)
    trainer = PretrainTrainer(method, itertools.repeat(batch), optimizer, schedules)
    trainer.start_iter, trainer.max_iter = 0, steps
    found = []
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(steps):
            trainer.run_step()
            trainer.storage.step()
            if trainer.iter in (FIRST.get(name, 0), steps - 1):
                logged = {k: v.avg(10) for k, v in trainer.storage.histories().items()}
                chance = bar(name, method, batch, trainer.monitored.get("mean_assignment"))
                best = 1.0 if measure.endswith("accuracy") else 0.0
                found.append(float((logged[measure] - chance) / (best - chance)))
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES))
def test_learns_its_own_task(name, datasets_root):
    photographs = sorted((datasets_root / "photographs").rglob("*.jpg"))
    if len(photographs) < IMAGES:
        pytest.skip("DETECTRON2_DATASETS has no photographs")
    files = [str(path) for path in photographs[:: len(photographs) // IMAGES][:IMAGES]]
    first, last = progress(name, files)
    print(f"{name}: {first:.2f} after a step, {last:.2f} at the end")
    assert first < PLAN[name][2] < last
