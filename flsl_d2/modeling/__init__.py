"""Encoders and the pyramid; importing this registers them in Detectron2."""

from flsl_d2.modeling.encoder import VIT_SIZES, Encoder
from flsl_d2.modeling.feature_pyramid import (
    SimpleFeaturePyramid,
    add_flsl_config,
    build_flsl_vit_sfp_backbone,
)
from flsl_d2.modeling.pixels import InputFormat
from flsl_d2.modeling.timm_backbone import TimmBackbone, build_timm_backbone, timm_pyramid
from flsl_d2.modeling.vit import FLSLViT

__all__ = [
    "VIT_SIZES",
    "Encoder",
    "FLSLViT",
    "InputFormat",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "add_flsl_config",
    "build_flsl_vit_sfp_backbone",
    "build_timm_backbone",
    "timm_pyramid",
]
