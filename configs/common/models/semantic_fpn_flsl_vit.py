"""Semantic FPN (arXiv 1901.02446) on FLSLViT with p2 to p5 of the simple feature pyramid.

Every block attends to the whole image, as in pre-training: at 512 x 512 there are 1,024 tokens.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from .mask_rcnn_flsl_vit import model as _mask_rcnn

model = L(SemanticSegmentor)(
    backbone=_mask_rcnn.backbone,
    sem_seg_head=L(SemSegFPNHead)(
        input_shape={
            f"p{level}": L(ShapeSpec)(channels="${model.backbone.out_channels}", stride=2**level)
            for level in (2, 3, 4, 5)
        },
        num_classes=150,
        conv_dims=128,
        common_stride=4,
        norm="GN",
        # The label of pixels that are neither trained on nor evaluated.
        ignore_value=255,
    ),
    pixel_mean=_mask_rcnn.pixel_mean,
    pixel_std=_mask_rcnn.pixel_std,
)
model.backbone.top_block = None
model.backbone.net.window_size = 0
