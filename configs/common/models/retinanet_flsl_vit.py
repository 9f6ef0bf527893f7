"""RetinaNet (arXiv 1708.02002) on FLSLViT with p3 to p7 of the simple feature pyramid."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from .mask_rcnn_flsl_vit import model as _mask_rcnn

model = model_zoo.get_config("common/models/retinanet.py").model
model.update({key: _mask_rcnn[key] for key in ("input_format", "pixel_mean", "pixel_std")})
model.backbone = _mask_rcnn.backbone
# Strides 8, 16, 32 from a map of stride 16.
model.backbone.scale_factors = [2.0, 1.0, 0.5]
model.backbone.top_block = L(LastLevelP6P7)(
    in_channels="${..out_channels}", out_channels="${..out_channels}", in_feature="p5"
)
