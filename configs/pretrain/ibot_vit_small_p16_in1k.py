"""iBOT pre-training of ViT-S/16 on ImageNet-1k (arXiv 2111.07832).

    tools/pretrain_net.py --config-file configs/pretrain/ibot_vit_small_p16_in1k.py --num-gpus 8

Views, masks, head and schedules are those of the authors' command for ViT-S/16. Hardware and time:
not measured. Expected: no score was measured here; the authors report 75.2% accuracy on ImageNet by
k-NN and 77.9% by a linear layer with a class token, after 800 epochs (README of
github.com/bytedance/ibot).
"""

from detectron2.config import LazyCall as L

from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.ibot import IBOT

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(num_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))
model = L(IBOT)(
    backbone=_dino.backbone,
    head=L(FLSLHead)(
        in_dim="${model.backbone.embed_dim}",
        num_centroids=8192,
        hidden_dim=2048,
        bottleneck_dim=256,
        learn_scale=True,
    ),
    student_temp=0.1,
    center_momentum=0.9,
    mask_share=(0.1, 0.5),
    patch_weight=1.0,
)

train.update(epochs=800, output_dir="./output/ibot_vit_small_p16_in1k")
