"""The encoder that the package ships."""

from __future__ import annotations

import os

import pytest
import torch
from detectron2.utils.file_io import PathManager

from flsl_d2 import model_zoo
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import build_encoder
from flsl_d2.weights.reading import shipped_encoders

RECIPE = "pretrain/flsl_vit_mini_p8_small_data.py"


def test_the_encoder_of_a_recipe_has_its_architecture_and_is_small():
    address = model_zoo.get_checkpoint_url(RECIPE)
    assert shipped_encoders() == [address]
    assert os.path.getsize(PathManager.get_local_path(address)) < 3 * 2**20
    encoder = build_encoder(address)
    backbone = dict(model_zoo.get_config(RECIPE).model.backbone)
    backbone.pop("_target_")
    assert encoder.architecture == FLSLViT(**backbone).architecture
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_other_names_are_refused():
    with pytest.raises(InputError, match=r"ships flsl_d2://flsl_vit_mini_p8_small_data"):
        build_encoder("flsl_d2://flsl_vit_small.safetensors")
    with pytest.raises(InputError, match=r"no weights of 'pretrain/flsl_vit_small"):
        model_zoo.get_checkpoint_url("pretrain/flsl_vit_small_p16_in1k.py")
