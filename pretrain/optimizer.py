"""AdamW with two parameter groups, and clipping of gradients tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling.transfer import to_device

CLIP_MODES = ("per_tensor", "global", "none")


def build_adamw(model: nn.Module, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters.

    The first group has weight decay; biases and one-dimensional weights, in the second, have
    none. Learning rate and weight decay are set at every step by the schedules.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    exempt = {name for name, p in named if p.ndim == 1 or name.endswith(".bias")}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name not in exempt]},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]
    first, second = betas  # as a tuple, which a list of a config is not
    return torch.optim.AdamW(groups, lr=0.0, betas=(first, second), fused=True)


@torch.no_grad()
def clip_gradients(gradients: list[Tensor], max_norm: float, mode: str = "per_tensor") -> Tensor:
    """Scale gradients in place so that no norm exceeds ``max_norm``, 3 in the published run.

    ``per_tensor`` clips each parameter's gradient by its own norm, as published; ``global`` clips
    all by their common norm; ``none`` only measures. Returns the common norm before clipping, a
    scalar tensor on the gradients' device.
    """
    if mode not in CLIP_MODES:
        raise InputError(f"train.clip_mode is '{mode}'; use one of {', '.join(CLIP_MODES)}.")
    norms = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(norms)
    if mode == "per_tensor":
        # On CUDA a list of numbers on the device would take a launch for each; tensors of the
        # gradients' shapes take a few for all.
        sizes = torch.tensor([gradient.numel() for gradient in gradients])
        total_size = int(sizes.sum())
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        spread = factors.repeat_interleave(to_device(sizes, total.device), output_size=total_size)
        parts = zip(spread.split(sizes.tolist()), gradients, strict=True)
        torch._foreach_mul_(gradients, [part.view_as(like) for part, like in parts])
    elif mode == "global":
        torch._foreach_mul_(gradients, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total
