"""MoCo v3 pre-training of ViT-S/16 on ImageNet-1k (arXiv 2104.02057).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/moco_v3_vit_small_p16_in1k.py

Views (BYOL's), heads, temperature, rates and batch are those of the authors' command for ViT-S,
which clips no gradients. Hardware and time: not
measured. Expected: no score was measured here; the authors report 73.2% accuracy on ImageNet by a
linear layer for a ViT-S with 12 heads and a class token, after 300 epochs (README of
github.com/facebookresearch/moco-v3).
"""

from detectron2.config import LazyCall as L

from pretrain.methods.moco_v3 import MoCoV3

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(num_local=0, global_scale=(0.08, 1.0))
model = L(MoCoV3)(
    backbone=_dino.backbone,
    hidden_dim=4096,
    output_dim=256,
    temperature=0.2,
    freeze_patches=True,
)
model.backbone.drop_path_rate = 0.0
schedules.update(
    base_lr=1.5e-4,
    final_lr=0.0,
    warmup_fraction=40 / 300,
    weight_decay=(0.1, 0.1),
    teacher_momentum=(0.99, 1.0),
)
train.update(epochs=300, clip_mode="none", output_dir="./output/moco_v3_vit_small_p16_in1k")
