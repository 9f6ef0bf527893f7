"""FLSL pre-training of ViT-T/16 on ImageNet-1k (arXiv 2306.06203).

    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_tiny_p16_in1k.py --num-gpus 8

The recipe of ViT-S/16 with a narrower encoder; the smallest size of the published code. Hardware
and time: not measured. Expected: the paper's abstract has no figure for it.
"""

from ..common.vit_sizes import tiny as _size
from .flsl_vit_small_p16_in1k import dataloader, dataset, model, schedules, train, views

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model.backbone.update(_size)
train.output_dir = "./output/flsl_vit_tiny_p16_in1k"
