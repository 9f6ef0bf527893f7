"""Recipes by name; tests/test_compare.py reads those of an installed wheel."""

from __future__ import annotations

import pytest

from flsl_d2 import model_zoo
from flsl_d2.errors import InputError


def test_both_kinds_by_name():
    lazy = model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_1x.py")
    assert lazy.model.backbone.net.embed_dim == 384
    cfg = model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_1x.yaml")
    assert cfg.MODEL.BACKBONE.NAME == "build_flsl_vit_sfp_backbone"


def test_unknown_name_gives_the_closest():
    with pytest.raises(InputError, match=r"mask_rcnn_flsl_vit_s16_1x\.py"):
        model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_2x.py")
