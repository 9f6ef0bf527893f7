"""Semantic FPN with FLSL ViT-S/16 on COCO's panoptic "stuff" (53 classes and one of things), 1x.

    tools/train_net.py --config-file configs/coco/semantic_fpn_flsl_vit_s16_stuff_1x.py \\
        --num-gpus 8 train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

Data, image sizes, batch and length are those of Detectron2's
configs/Misc/semantic_R_50_FPN_1x.yaml, schedule and optimiser those of
mask_rcnn_flsl_vit_s16_1x.py. Images are larger than ADE20K's crops, so that attention has windows.
Evaluated with mIoU by Detectron2. Hardware, time and score: not measured.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from ..ade20k.semantic_fpn_flsl_vit_s16_40k import dataloader, model
from .mask_rcnn_flsl_vit_s16_1x import lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

dataloader.train.dataset.names = "coco_2017_train_panoptic_stuffonly"
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(
        short_edge_length=list(range(640, 801, 32)), max_size=1333, sample_style="choice"
    ),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.test.dataset.names = "coco_2017_val_panoptic_stuffonly"
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)
]

model.sem_seg_head.num_classes = 54
model.backbone.net.window_size = 14

train.output_dir = "./output/semantic_fpn_flsl_vit_s16_stuff_1x"
