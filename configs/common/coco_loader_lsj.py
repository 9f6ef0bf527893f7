"""COCO 2017 with large-scale jitter (arXiv 2012.07177): resized by 0.1 to 2.0, cropped to 1024."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .coco_loader import dataloader

image_size = 1024

dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(
        min_scale=0.1, max_scale=2.0, target_height=image_size, target_width=image_size
    ),
    L(T.FixedSizeCrop)(crop_size=(image_size, image_size), pad=False),
]
dataloader.train.mapper.recompute_boxes = True
dataloader.train.total_batch_size = 64
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=image_size, max_size=image_size)
]
