"""VICReg pre-training of ViT-S/16 on ImageNet-1k (arXiv 2105.04906).

    tools/pretrain_net.py --config-file configs/pretrain/vicreg_vit_small_p16_in1k.py --num-gpus 8

The paper trains a ResNet-50 by LARS. Views (BYOL's), expander and weights are its; learning rate,
weight decay, warm-up and length are those of MoCo v3's ViT-S by AdamW. Hardware and time: not
measured. Expected: no score was measured here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.vicreg import VICReg

from .moco_v3_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .moco_v3_vit_small_p16_in1k import model as _moco

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model = L(VICReg)(
    backbone=_moco.backbone,
    hidden_dim=8192,
    output_dim=8192,
    invariance_weight=25.0,
    variance_weight=25.0,
    covariance_weight=1.0,
)

train.output_dir = "./output/vicreg_vit_small_p16_in1k"
