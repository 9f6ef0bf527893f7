"""The encoder, its positions and the pyramid; importing this registers them in Detectron2."""

from flsl_d2.modeling.config import add_flsl_config
from flsl_d2.modeling.feature_pyramid import SimpleFeaturePyramid, build_flsl_vit_sfp_backbone
from flsl_d2.modeling.timm_backbone import TimmBackbone, build_timm_backbone, timm_pyramid
from flsl_d2.modeling.vit import FLSLViT

__all__ = [
    "FLSLViT",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "add_flsl_config",
    "build_flsl_vit_sfp_backbone",
    "build_timm_backbone",
    "timm_pyramid",
]
