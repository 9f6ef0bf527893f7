"""Mask R-CNN with FLSL ViT-S/8 on COCO, ViTDet's recipe of 100 epochs (arXiv 2203.16527).

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s8_100ep.py --num-gpus 64 \\
        train.init_checkpoint=output/flsl_vit_small_p8_in1k/teacher_backbone.pth

The recipe of ViT-S/16 with four times the tokens; see mask_rcnn_flsl_vit_s8_1x.py. Hardware, time
and score: not measured.
"""

from .mask_rcnn_flsl_vit_s16_100ep import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.net.update(patch_size=8, use_act_checkpoint=True)
train.output_dir = "./output/mask_rcnn_flsl_vit_s8_100ep"
