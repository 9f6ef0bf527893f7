"""The YAML nodes of the encoder and its pyramid."""

from __future__ import annotations

from detectron2.config import CfgNode

__all__ = ["add_flsl_config"]


def add_flsl_config(cfg: CfgNode) -> None:
    """Add the nodes that the backbones ``build_flsl_vit_sfp_backbone`` and ``FLSLViT`` read.

    The defaults are ViT-S/16 for detection: 14 x 14 windows with four global blocks. Each key is
    the argument of :class:`flsl_d2.modeling.FLSLViT` of the same name. Existing keys of ``cfg``
    are left alone; calling this twice does no harm.
    """
    model = cfg.MODEL
    if "FLSL_VIT" not in model:
        model.FLSL_VIT = CfgNode(
            {
                "IMG_SIZE": 224,
                "PATCH_SIZE": 16,
                "EMBED_DIM": 384,
                "DEPTH": 12,
                "NUM_HEADS": 6,
                "MLP_RATIO": 4.0,
                "QKV_BIAS": True,
                "DROP_PATH_RATE": 0.1,
                "WINDOW_SIZE": 14,
                "GLOBAL_BLOCK_INDEXES": [],  # empty: four, evenly spread
                "USE_REL_POS": False,
                "REL_POS_IMG_SIZE": 0,  # 0: IMG_SIZE
                "FINAL_NORM": True,
                "POSITION_OFFSET": 0.1,
                "POSITION_ANTIALIAS": False,
                "LEARNED_POSITIONS": False,
                "MASK_WINDOW_PADDING": False,
                "LAYER_SCALE_INIT": 0.0,  # 0: no LayerScale
                "NUM_PREFIX_TOKENS": 0,
                "USE_ACT_CHECKPOINT": False,
                "SKIP_DROPPED": True,
                "RECOMPUTE_GELU": True,
                "ONEDNN_LINEAR": True,
            }
        )
    if "FLSL_SFP" not in model:
        model.FLSL_SFP = CfgNode({"OUT_CHANNELS": 256, "NORM": "LN", "SQUARE_PAD": 0})
    if "TIMM" not in model:
        model.TIMM = CfgNode(
            {
                "NAME": "",  # timm's name, options after "?", e.g. resnet50?pretrained=false
                "FROZEN": False,
                "USE_ACT_CHECKPOINT": False,
            }
        )
