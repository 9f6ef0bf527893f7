"""Configs that are set to the encoder in a file build a model that takes all of it."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_backbone
from layouts import timm_vit
from omegaconf import OmegaConf
from torch import nn

import flsl_d2
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, InputFormat, SimpleFeaturePyramid
from flsl_d2.weights import FLSLCheckpointer, write_encoder

SHAPE = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}


@pytest.fixture(params=["own", "one channel", "timm"])
def file(request, tmp_path) -> str:
    path = str(tmp_path / "weights.pth")
    if request.param == "timm":
        torch.save(timm_vit(init_values=0.1, reg_tokens=2).state_dict(), path)
        return path
    encoder = FLSLViT(**SHAPE, in_chans=1 if request.param == "one channel" else 3)
    if request.param == "one channel":
        encoder.input_format = InputFormat(1, 16, (2400.0,), (80.0,), stated=True)
    write_encoder(encoder, path)
    return path


def loaded(backbone: nn.Module, file: str) -> FLSLViT:
    model = nn.ModuleDict({"backbone": backbone})
    FLSLCheckpointer(model).load(file)
    return model.backbone.net


def test_yaml(file):
    cfg = get_cfg()
    flsl_d2.configure_from_weights(cfg, file)
    net = loaded(build_backbone(cfg), file)
    assert file == cfg.MODEL.WEIGHTS
    if net.architecture["in_chans"] == 1:
        assert (cfg.MODEL.PIXEL_MEAN, cfg.INPUT.FORMAT) == ([2400.0], "channels:1")
    else:
        assert (cfg.INPUT.FORMAT, net.pixel_adapter) == ("RGB", None)


def test_lazy_config(file):
    net = L(FLSLViT)(window_size=0)
    model = {"backbone": L(SimpleFeaturePyramid)(net=net), "pixel_mean": [], "pixel_std": []}
    cfg = OmegaConf.create({"model": model, "train": {"init_checkpoint": ""}})
    flsl_d2.configure_from_weights(cfg, file)
    encoder = loaded(instantiate(cfg.model.backbone), file)
    assert cfg.train.init_checkpoint == file
    assert len(cfg.model.pixel_mean) == encoder.architecture["in_chans"]
    cfg.model.backbone = L(nn.Linear)(in_features=1, out_features=1)
    with pytest.raises(InputError, match="FLSLViT"):
        flsl_d2.configure_from_weights(cfg, file)
