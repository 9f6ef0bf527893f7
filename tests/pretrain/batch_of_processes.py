"""A batch that two processes share, beside one process with the whole batch."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from tiny_methods import VALUES, step, tiny_method
from torch import Tensor

from pretrain.batch_norm import synchronise_batch_norm
from pretrain.methods.protocol import StepInputs

# Methods with a term of the whole batch, and what their tiny recipes need beside it.
SHARED = {
    "dino": [],
    "ibot": [],
    "adclr": [],
    "selfpatch": [],
    "simclr": [],
    "moco_v3": [],
    "swav": [],
    "vicreg": [],
    "vicregl": [],
    "densecl": [],
    "detcon": [],
    "beit": ["model.num_codes=5"],
}
STEPS, IMAGES = 2, 4


@contextmanager
def without_group():
    """Let a process compute as if it were the only one."""
    with mock.patch.object(dist, "is_initialized", return_value=False):
        yield


@contextmanager
def without_chance():
    """Draw the same masks and segments for an image, wherever it lies in a batch."""

    def mask(side: int, *_: object) -> Tensor:
        drawn = torch.zeros(side, side, dtype=torch.bool)
        drawn[1:3, :2] = True
        return drawn

    def first_patches(number: int, **_: object) -> Tensor:
        return torch.arange(number)

    with (
        mock.patch("pretrain.methods.ibot.block_mask", mask),
        mock.patch("pretrain.methods.masking.block_mask", mask),
        mock.patch("pretrain.methods.detcon.DetCon._draw", lambda _, labels: labels[:, :3]),
        mock.patch("torch.randperm", first_patches),
    ):
        yield


def train(name: str, rank: int, processes: int) -> tuple[list[float], dict[str, Tensor]]:
    """Take steps without an optimiser.

    Returns:
        The losses, and gradients and buffers by name; those of this process alone.
    """
    method = tiny_method(name, *SHARED[name])
    inputs = step(method, num_local=2 if name in {"dino", "vicregl"} else 0, images=IMAGES)
    if name == "adclr":
        inputs.views += [view[..., :4, :4] for view in inputs.views]
    generator = torch.Generator().manual_seed(3)
    inputs.segments = [torch.randint(3, (IMAGES, 16), generator=generator) for _ in range(2)]
    method.train()
    synchronise_batch_norm(method)
    own = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    part = StepInputs(
        [view[own] for view in inputs.views],
        [],
        [place[own] for place in inputs.regions],
        num_global=inputs.num_global,
        segments=[labels[own] for labels in inputs.segments],
    )
    losses = []
    for _ in range(STEPS):
        loss = method(part, VALUES)[0]["loss"]
        loss.backward()
        losses.append(loss.item())
    found = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    for key, buffer in method.named_buffers():
        if "memory_bank" not in key:  # of length 0, with an index that nothing sets
            found[f"buffer {key}"] = buffer.float()
    return losses, found
