"""AdamW with a learning rate that decays by layer, as ViTDet (arXiv 2203.16527) fine-tunes."""

import torch
from detectron2.config import LazyCall as L

from flsl_d2.detection.solver import layer_decay, optimizer_params

optimizer = L(torch.optim.AdamW)(
    params=L(optimizer_params)(
        base_lr="${optimizer.lr}",
        weight_decay_norm=0.0,
        # Factor of the learning rate from one layer of the encoder to the one before it.
        lr_factor_func=L(layer_decay)(decay_rate=0.7),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    ),
    # Learning rate for the recipe's batch; change it in proportion to the batch.
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.1,
    fused=True,
)
