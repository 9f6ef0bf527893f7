"""SwAV pre-training of ViT-S/16 on ImageNet-1k (arXiv 2006.09882).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/swav_vit_small_p16_in1k.py

The paper trains a ResNet-50 by LARS. Views, head and prototypes are its; learning rate, weight
decay, warm-up and length are those of MoCo v3's ViT-S by AdamW. Hardware and time: not measured.
Expected: no score was measured here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.swav import SwAV

from .moco_v3_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .moco_v3_vit_small_p16_in1k import model as _moco

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(
    num_local=6,
    global_scale=(0.14, 1.0),
    local_scale=(0.05, 0.14),
    jitter=(0.8, 0.8, 0.8, 0.2),
    blur=(0.5, 0.5, 0.5),
    solarise=(0.0, 0.0, 0.0),
)
model = L(SwAV)(
    backbone=_moco.backbone,
    num_prototypes=3000,
    hidden_dim=2048,
    output_dim=128,
    temperature=0.1,
    epsilon=0.05,
)

train.output_dir = "./output/swav_vit_small_p16_in1k"
