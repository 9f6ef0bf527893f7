"""Faster R-CNN with FLSL ViT-B/16 on Objects365 v2 (boxes of 365 classes), 12 epochs.

    tools/train_net.py --config-file configs/objects365/faster_rcnn_flsl_vit_b16_1x.py \\
        --num-gpus 64 train.init_checkpoint=output/flsl_vit_base_p16_in1k/teacher_backbone.pth

A first stage for detectors that are then trained on COCO with its checkpoint as
train.init_checkpoint. Image sizes and the batch of 64 are those of the COCO recipe of 100 epochs,
the shape of the schedule is that of 1x; the schedule is not a published one. Hardware, time and
score: not measured.
"""

from ..coco.mask_rcnn_flsl_vit_b16_1x import lr_multiplier
from ..coco.mask_rcnn_flsl_vit_b16_100ep import dataloader, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

dataloader.train.dataset.names = "objects365_train"
dataloader.train.mapper.update(use_instance_mask=False, recompute_boxes=False)
dataloader.test.dataset.names = "objects365_val"

model.roi_heads.num_classes = 365
for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(_key)

# 12 epochs of 1,742k images in batches of 64.
train.max_iter = 12 * 1_742_000 // 64
train.eval_period = 50000
train.output_dir = "./output/objects365_faster_rcnn_flsl_vit_b16_1x"
lr_multiplier.warmup_length = 1000 / train.max_iter
