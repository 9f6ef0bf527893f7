"""Optimisers of the detection recipes: AdamW with a learning rate that decays by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, TimmBackbone


def layer_decay(decay_rate: float) -> Callable[[nn.Module], Callable[[str], float]]:
    """Learning rate factors of weights by depth (BEiT, arXiv 2106.08254; ViTDet, 2203.16527).

    The result maps a detector to a function from a weight's name to its factor, 1 outside the
    encoder. An ``FLSLViT`` of L blocks has ``decay_rate ** (L - i)`` for block i from 0, one step
    less for the patch embedding. A model of timm has the layers into which timm groups it
    (:meth:`flsl_d2.modeling.TimmBackbone.layer_factors`), whose stages count on from each other.
    """
    return partial(_layer_factor, decay_rate)


def optimizer_params(
    model: nn.Module,
    lr_factor_func: Callable[[nn.Module], Callable[[str], float]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Build groups of parameters by Detectron2's function of ``options``.

    ``lr_factor_func`` is a result of :func:`layer_decay`, or None for the same rate everywhere.
    """
    factor = None if lr_factor_func is None else lr_factor_func(model)
    return get_default_optimizer_params(model, lr_factor_func=factor, **options)


def _layer_factor(decay_rate: float, model: nn.Module) -> Callable[[str], float]:
    factors = {
        f"{prefix}.{name}": factor
        for prefix, module in model.named_modules()
        if isinstance(module, TimmBackbone)
        for name, factor in module.layer_factors(decay_rate).items()
    }
    if factors:
        return lambda name: factors.get(name, 1.0)
    depth = max((each.depth for each in model.modules() if isinstance(each, FLSLViT)), default=0)
    return partial(get_vit_lr_decay_rate, lr_decay_rate=decay_rate, num_layers=depth)


def add_solver_config(cfg: CfgNode) -> None:
    """Add ``SOLVER.OPTIMIZER`` ("SGD" or "ADAMW") and ``SOLVER.LAYER_DECAY`` to a YAML config.

    The defaults leave Detectron2's optimiser as it is. Existing keys keep their values.
    """
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    cfg.SOLVER.setdefault("LAYER_DECAY", 1.0)


def build_yaml_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of a YAML config (:func:`add_solver_config`) over what is trained.

    With ``SOLVER.OPTIMIZER: ADAMW``, betas are (0.9, 0.999) and learning rates follow
    :func:`layer_decay`.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_optimizer(cfg, model)
    if solver.OPTIMIZER != "ADAMW":
        raise InputError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; use SGD or ADAMW.")
    groups = optimizer_params(
        model,
        layer_decay(solver.LAYER_DECAY),
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    # The fused optimiser divides by the scale of float16 gradients itself, after the clipping.
    fused = not solver.CLIP_GRADIENTS.ENABLED
    optimizer = torch.optim.AdamW(
        groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=fused
    )
    return maybe_add_gradient_clipping(cfg, optimizer)
