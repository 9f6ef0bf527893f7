"""FLSL pre-training of ViT-B/16 on ImageNet-1k (arXiv 2306.06203).

    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_base_p16_in1k.py --num-gpus 8

The recipe of ViT-S/16, as the published code trains ViT-B. Its scales of mean-shift stay at 0.1 and
0.2 over sqrt(D), where the published code keeps sqrt(384) for every width: that is
schedules.self_scale=[0.141,0.141] schedules.cross_scale=[0.283,0.283] here. Hardware and time: not
measured. Expected: no figure of the paper was at hand.
"""

from ..common.vit_sizes import base as _size
from .flsl_vit_small_p16_in1k import dataloader, dataset, model, schedules, train, views

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model.backbone.update(_size)
train.output_dir = "./output/flsl_vit_base_p16_in1k"
