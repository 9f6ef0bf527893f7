"""VICReg pre-training of ViT-S/16 on ImageNet-1k (arXiv 2105.04906).

    tools/pretrain_net.py --config-file configs/pretrain/vicreg_vit_small_p16_in1k.py --num-gpus 8

The paper trains a ResNet-50 by LARS; here are its views (BYOL's), expander and weights with AdamW.
Batch norm in the expander sees the images of one process. Hardware and time: not measured.
Expected: no score was measured here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.vicreg import VICReg

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(num_local=0, global_scale=(0.08, 1.0))
model = L(VICReg)(
    backbone=_dino.backbone,
    hidden_dim=8192,
    output_dim=8192,
    invariance_weight=25.0,
    variance_weight=25.0,
    covariance_weight=1.0,
)
dataloader.total_batch_size = 2048

train.update(epochs=1000, output_dir="./output/vicreg_vit_small_p16_in1k")
