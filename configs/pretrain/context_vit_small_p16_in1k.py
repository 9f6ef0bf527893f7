"""Context pre-training of ViT-S/16 on ImageNet-1k (arXiv 1505.05192).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/context_vit_small_p16_in1k.py

The paper trains a CNN by SGD; here is its task for a ViT, with views and
rates of MAE's recipe.
Hardware and time: not measured. Expected: no score was measured here, and the paper has none for a
ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.context import Context

from .mae_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .mae_vit_small_p16_in1k import model as _mae

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.flip = 0.0
model = L(Context)(backbone=_mae.backbone, hidden_dim=4096)
dataloader.total_batch_size = 512

train.update(epochs=100, output_dir="./output/context_vit_small_p16_in1k")
