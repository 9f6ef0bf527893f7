"""Faster R-CNN with FLSL ViT-S/16 on COCO, 1x: boxes without masks.

    tools/train_net.py --config-file configs/coco/faster_rcnn_flsl_vit_s16_1x.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

mask_rcnn_flsl_vit_s16_1x.py without its mask branch. Hardware, time and score: not measured.
"""

from .mask_rcnn_flsl_vit_s16_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_key)
dataloader.train.mapper.use_instance_mask = False
train.output_dir = "./output/faster_rcnn_flsl_vit_s16_1x"
