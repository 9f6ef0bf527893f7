"""Optimisers of the detection recipes: AdamW with a learning rate that decays by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import TimmBackbone

__all__ = ["add_solver_config", "build_yaml_optimizer", "layer_decay"]


def layer_decay(decay_rate: float, num_layers: int) -> Callable[[str], float]:
    """Learning rate factor of each weight by depth (BEiT, ViTDet arXiv 2203.16527).

    Args:
        decay_rate: factor from one block to the one before it; 1 for none.
        num_layers: number of blocks L of the encoder.

    Returns:
        A function from a weight's name to its factor: ``decay_rate ** (L - i)`` for block i from
        0, one step less for the patch embedding, 1 outside the encoder's blocks.
    """
    return partial(get_vit_lr_decay_rate, lr_decay_rate=decay_rate, num_layers=num_layers)


def add_solver_config(cfg: CfgNode) -> None:
    """Add ``SOLVER.OPTIMIZER`` ("SGD" or "ADAMW") and ``SOLVER.LAYER_DECAY`` to a YAML config.

    The defaults leave Detectron2's optimiser as it is. Existing keys keep their values.
    """
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    cfg.SOLVER.setdefault("LAYER_DECAY", 1.0)


def build_yaml_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of a YAML config over the parameters that are trained.

    With ``SOLVER.OPTIMIZER: ADAMW``, betas are (0.9, 0.999) and learning rates follow
    :func:`layer_decay`; those of a timm model follow timm's groups of layers.

    Args:
        cfg: config with the nodes of :func:`add_solver_config`.
        model: detector; an ``FLSLViT`` in it has ``MODEL.FLSL_VIT.DEPTH`` blocks.

    Raises:
        InputError: an unknown name of an optimiser.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_optimizer(cfg, model)
    if solver.OPTIMIZER != "ADAMW":
        raise InputError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use SGD or ADAMW.")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=_layer_factor(cfg, model),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    # The fused optimiser divides by the scale of float16 gradients itself, after the clipping.
    fused = not solver.CLIP_GRADIENTS.ENABLED
    optimizer = torch.optim.AdamW(
        groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=fused
    )
    return maybe_add_gradient_clipping(cfg, optimizer)


def _layer_factor(cfg: CfgNode, model: nn.Module) -> Callable[[str], float]:
    """Learning rate factor by the name of a weight."""
    rate = cfg.SOLVER.LAYER_DECAY
    factors = {
        f"{prefix}.{name}": factor
        for prefix, module in model.named_modules()
        if isinstance(module, TimmBackbone)
        for name, factor in module.layer_factors(rate).items()
    }
    if factors:
        return lambda name: factors.get(name, 1.0)
    return layer_decay(rate, cfg.MODEL.FLSL_VIT.DEPTH)
