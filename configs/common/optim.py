"""AdamW with a learning rate that decays by layer, as ViTDet (arXiv 2203.16527) fine-tunes."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import get_default_optimizer_params

from flsl_d2.detection.solver import layer_decay

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${optimizer.lr}",
        weight_decay_norm=0.0,
        lr_factor_func=L(layer_decay)(
            # Factor of the learning rate from one block to the one before it.
            decay_rate=0.7,
            num_layers="${model.backbone.net.depth}",
        ),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    ),
    # Learning rate for the recipe's batch; change it in proportion to the batch.
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.1,
    fused=True,
)
