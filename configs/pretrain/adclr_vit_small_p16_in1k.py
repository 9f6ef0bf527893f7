"""ADCLR pre-training of ViT-S/16 on ImageNet-1k (arXiv 2306.13337).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/adclr_vit_small_p16_in1k.py

Ten query crops of the size of a patch over DINO's schedule and head. Hardware and time: not
measured. Expected: no score was measured here; the paper's abstract reports 44.3 box and 39.7 mask
AP on COCO with a class token.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.adclr import ADCLR

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(num_local=10, local_size="${model.backbone.patch_size}", global_scale=(0.25, 1.0))
views.local_scale = (0.05, 0.25)
model = L(ADCLR)(
    backbone=_dino.backbone,
    head=_dino.head,
    query_weight=0.5,
    student_temp=0.1,
    center_momentum=0.9,
)

train.update(epochs=800, output_dir="./output/adclr_vit_small_p16_in1k")
