"""Mask R-CNN with FLSL ViT-S/16 on COCO, ViTDet's recipe of 100 epochs (arXiv 2203.16527).

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_100ep.py --num-gpus 64 \\
        train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

Schedule, batch of 64 and large-scale jitter are those of Detectron2's
projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py, made for 64 GPUs. Hardware and time: not
measured here. Expected: neither paper reports FLSL's ViT-S/16 with this recipe.
"""

from ..common.coco_loader_lsj import dataloader, image_size
from .mask_rcnn_flsl_vit_s16_1x import lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

# 100 epochs of 118k images in batches of 64.
train.max_iter = 184375
train.output_dir = "./output/mask_rcnn_flsl_vit_s16_100ep"
lr_multiplier.scheduler.update(milestones=[163889, 177546], num_updates=184375)
lr_multiplier.warmup_length = 250 / 184375

model.backbone.square_pad = image_size
