"""Recipes of the methods at a size at which a step takes milliseconds, and slow arithmetic."""

from __future__ import annotations

import math

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig

from flsl_d2.engine.config_files import CONFIGS_FOLDER, load_lazy_config
from pretrain.methods.base import encode_views, global_output
from pretrain.methods.protocol import StepInputs
from pretrain.schedules import Schedules

# By method, with "_resnet50" where the encoder is one: all recipes but those of FLSL with ViTs.
RECIPES = {
    path.name.partition("_vit_")[0].removesuffix("_in1k.py"): f"configs/pretrain/{path.name}"
    for path in sorted((CONFIGS_FOLDER / "pretrain").glob("*.py"))
    if not path.name.startswith("flsl_vit_")
}
TINY = [
    *("views.global_size=16", "model.backbone.patch_size=4", "model.backbone.embed_dim=16"),
    *("model.backbone.depth=1", "model.backbone.num_heads=2", "model.backbone.drop_path_rate=0.0"),
    "schedules.teacher_momentum=[0.9,1.0]",
    "schedules.frozen_last_layer_epochs=0",
]
TINY_RESNET = ["views.global_size=64", "model.backbone.name=resnet10t", *TINY[-2:]]
LOCAL = ["views.local_size=8", "views.num_local=1"]
HEAD = ["model.head.num_centroids=8", "model.head.hidden_dim=8", "model.head.bottleneck_dim=8"]
DECODER = ["model.decoder_dim=8", "model.decoder_depth=1", "model.decoder_heads=2"]
PROJECTION = ["model.hidden_dim=8", "model.output_dim=6"]
# What each method needs beside these to be tiny.
SMALL = {
    "dino": [*LOCAL, *HEAD],
    "ibot": [*LOCAL, *HEAD],
    "mae": DECODER,
    "simclr": PROJECTION,
    "vicreg": PROJECTION,
    "vicregl": [*LOCAL, *PROJECTION, "model.local_dim=8", "model.num_matches=[3,2]"],
    "densecl": [*PROJECTION, "model.queue_length=6"],
    "selfpatch": [
        *LOCAL,
        *HEAD,
        *(option.replace("head", "patch_head") for option in HEAD),
        "model.aggregation_depth=1",
    ],
    "moco_v3": PROJECTION,
    "swav": [*LOCAL, *PROJECTION, "model.num_prototypes=7"],
    "maskfeat": ["model.cell_size=2"],
    "beit": ["model.num_codes=9"],
    "detcon": [*PROJECTION, "model.num_segments=3", "views.segments=grid"],
    "adclr": [*HEAD, "views.num_local=2"],
    "flsl_resnet50": [*HEAD, "views.local_size=32", "views.num_local=1", "model.head.in_dim=512"],
    "simclr_resnet50": PROJECTION,
    "densecl_resnet50": [*PROJECTION, "model.queue_length=6"],
    "navit": [*LOCAL, *HEAD, "model.pack_tokens=20"],
    "rotation": [],
    "jigsaw": ["model.num_permutations=5", "model.hidden_dim=8"],
    "context": ["model.hidden_dim=8"],
    "colorization": [],
    "droppos": [*DECODER, "model.mask_share=0.5", "model.drop_share=0.5"],
}


def tiny_config(name: str, *overrides: str) -> DictConfig:
    tiny = TINY_RESNET if "resnet" in name else TINY
    return load_lazy_config(RECIPES[name], [*tiny, *SMALL[name], *overrides])


def tiny_method(name: str, *overrides: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return instantiate(tiny_config(name, *overrides).model)


VALUES = Schedules(4, iters_per_epoch=2, total_iters=8)(3)
# Sums in another order, in float32.
CLOSE = {"rel": 2e-5}


def step(method, num_global: int = 2, num_local: int = 0, images: int = 3) -> StepInputs:
    """Views of 16 and 8 pixels; away from the start, where many outputs are equal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    sizes = [16] * num_global + [8] * num_local
    views = [torch.rand(images, 3, s, s, generator=generator) * 255 for s in sizes]
    places = []
    for _ in sizes:
        corner = torch.rand(images, 2, generator=generator) / 2
        side = torch.rand(images, 2, generator=generator) / 2 + 0.1
        places.append(torch.cat([corner, side], dim=1))
    return StepInputs(views, [], places, [], num_global)


def tokens_of(backbone, method, views) -> list[torch.Tensor]:
    with torch.no_grad():
        return encode_views(backbone, [method.normalised(view) for view in views])


def softmax(row, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(float(x) / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def cross_entropy(targets: list[float], probabilities: list[float]) -> float:
    return -sum(q * math.log(p) for q, p in zip(targets, probabilities, strict=True))


def unit(row) -> list[float]:
    norm = math.sqrt(sum(float(x) ** 2 for x in row))
    return [float(x) / norm for x in row]


def dot(a, b) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def outputs_of(method, inputs, head="head"):
    tokens = tokens_of(method.student.backbone, method, inputs.views)
    with torch.no_grad():
        return getattr(method.student, head)(global_output(tokens))
