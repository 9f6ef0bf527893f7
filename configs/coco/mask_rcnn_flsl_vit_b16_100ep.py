"""Mask R-CNN with FLSL ViT-B/16 on COCO, ViTDet's recipe of 100 epochs (arXiv 2203.16527).

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_b16_100ep.py --num-gpus 64 \\
        train.init_checkpoint=output/flsl_vit_base_p16_in1k/teacher_backbone.pth

Schedule, batch of 64 and rates are those of Detectron2's mask_rcnn_vitdet_b_100ep.py. Hardware,
time and score: not measured.
"""

from ..common.vit_sizes import base as _size
from .mask_rcnn_flsl_vit_s16_100ep import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.net.update(_size)
train.output_dir = "./output/mask_rcnn_flsl_vit_b16_100ep"
