"""SelfPatch pre-training of ViT-S/16 on ImageNet-1k (arXiv 2206.07990).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/selfpatch_vit_small_p16_in1k.py

Views, heads, weights and schedules are those of the authors' command for ViT-S/16. Hardware and
time: not measured. Expected: no score was measured here.
"""

from detectron2.config import LazyCall as L

from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.selfpatch import SelfPatch

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))
model = L(SelfPatch)(
    backbone=_dino.backbone,
    head=_dino.head,
    patch_head=L(FLSLHead)(
        in_dim="${model.backbone.embed_dim}",
        num_centroids=4096,
        hidden_dim=2048,
        bottleneck_dim=256,
        learn_scale=False,
    ),
    num_neighbours=4,
    aggregation_depth=2,
    patch_weight=0.1,
    student_temp=0.1,
    center_momentum=0.9,
)

model.head.learn_scale = False
schedules.update(warmup_fraction=10 / 300, teacher_temp=(0.04, 0.04))
train.update(epochs=300, output_dir="./output/selfpatch_vit_small_p16_in1k")
