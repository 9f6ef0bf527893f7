"""Mask R-CNN with FLSL ViT-S/8 on COCO, 1x (arXiv 2306.06203).

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s8_1x.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_small_p8_in1k/teacher_backbone.pth

The recipe of ViT-S/16 with four times the tokens: windows stay 14 x 14 tokens, the pyramid has the
same strides, and blocks are recomputed in the backward pass (where memory allows,
model.backbone.net.use_act_checkpoint=false is faster). On fewer GPUs lower batch and learning rate
as in the recipe of ViT-S/16. Hardware and time: not measured. Expected: 46.5 box AP and 42.1 mask
AP, reported by the paper, not reproduced here.
"""

from .mask_rcnn_flsl_vit_s16_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.net.update(patch_size=8, use_act_checkpoint=True)
train.output_dir = "./output/mask_rcnn_flsl_vit_s8_1x"
