"""Faster R-CNN with FLSL ViT-S/8 on UAVDT: cars, trucks and buses seen from drones.

    tools/convert_uavdt.py
    tools/train_net.py --config-file configs/uavdt/faster_rcnn_flsl_vit_s8.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_small_p8_in1k/teacher_backbone.pth

The recipe of ViT-S/16 with four times the tokens; see coco/mask_rcnn_flsl_vit_s8_1x.py. Hardware,
time and score: not measured.
"""

from .faster_rcnn_flsl_vit_s16 import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.net.update(patch_size=8, use_act_checkpoint=True)
train.output_dir = "./output/uavdt_faster_rcnn_flsl_vit_s8"
