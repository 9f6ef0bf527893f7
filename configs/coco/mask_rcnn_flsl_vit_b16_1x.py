"""Mask R-CNN with FLSL ViT-B/16 on COCO, 1x.

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_b16_1x.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_base_p16_in1k/teacher_backbone.pth

The recipe of ViT-S/16; stochastic depth 0.1 and layer decay 0.7 are also ViTDet's for ViT-B.
Hardware, time and score: not measured.
"""

from ..common.vit_sizes import base as _size
from .mask_rcnn_flsl_vit_s16_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.net.update(_size)
train.output_dir = "./output/mask_rcnn_flsl_vit_b16_1x"
