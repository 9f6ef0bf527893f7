"""FLSL pre-training of ViT-L/16 on ImageNet-1k (arXiv 2306.06203).

    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_large_p16_in1k.py --num-gpus 16

The recipe of ViT-B/16 with ViT-L and recomputed blocks. Nobody has run it, and neither the paper
nor the published code has this size, so watch the health of its first epochs. Hardware, time and
score: not measured.
"""

from ..common.vit_sizes import large as _size
from .flsl_vit_base_p16_in1k import dataloader, dataset, model, schedules, train, views

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model.backbone.update(_size, use_act_checkpoint=True)
train.output_dir = "./output/flsl_vit_large_p16_in1k"
