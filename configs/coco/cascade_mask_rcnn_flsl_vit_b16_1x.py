"""Cascade Mask R-CNN with FLSL ViT-B/16 on COCO, 1x.

    tools/train_net.py --config-file configs/coco/cascade_mask_rcnn_flsl_vit_b16_1x.py \\
        --num-gpus 8 train.init_checkpoint=output/flsl_vit_base_p16_in1k/teacher_backbone.pth

mask_rcnn_flsl_vit_b16_1x.py with the three-stage heads of ViTDet. Hardware, time and score: not
measured.
"""

from ..common.models.cascade_roi_heads import roi_heads as _roi_heads
from .mask_rcnn_flsl_vit_b16_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.roi_heads = _roi_heads
train.output_dir = "./output/cascade_mask_rcnn_flsl_vit_b16_1x"
