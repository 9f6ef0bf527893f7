"""Losses of the methods against slow implementations: nested loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_methods import tiny_method

from pretrain.methods.base import encode_views, global_output
from pretrain.methods.protocol import StepInputs
from pretrain.schedules import Schedules

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


def dino_by_loops(method, inputs, student_views=None) -> float:
    student, teacher = [], []
    with torch.no_grad():
        for views, networks, outputs in (
            (student_views or inputs.views, method.student, student),
            (inputs.views[: inputs.num_global], method.teacher, teacher),
        ):
            for tokens in tokens_of(networks.backbone, method, views):
                outputs.append(networks.head(global_output([tokens])).tolist())
    center = method.loss.center.flatten().tolist()
    total, pairs = 0.0, 0
    for t, targets in enumerate(teacher):
        for s, outputs in enumerate(student):
            if s == t:
                continue
            pairs += 1
            for b, row in enumerate(outputs):
                centred = [x - c for x, c in zip(targets[b], center, strict=True)]
                target = softmax(centred, VALUES.teacher_temp)
                total += cross_entropy(target, softmax(row, 0.1)) / len(outputs)
    return total / pairs


def test_dino():
    method = tiny_method("dino")
    inputs = step(method, num_local=2)
    method.loss.center.normal_(generator=torch.Generator().manual_seed(2))
    expected = dino_by_loops(method, inputs)
    losses, monitored = method(inputs, VALUES)
    assert losses["loss"].item() == pytest.approx(expected, **CLOSE)
    assert monitored["assigned"].sum() == 2 * 3
