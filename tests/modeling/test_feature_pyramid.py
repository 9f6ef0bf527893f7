"""The pyramid: strides for both patch sizes, Detectron2's weights, real padding, YAML."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid as Detectron2Pyramid
from detectron2.structures import ImageList

import flsl_d2
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid
from flsl_d2.modeling.pixels import PixelAdapter

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3}


@pytest.mark.parametrize("patch_size", [8, 16])
def test_strides_4_to_64(patch_size):
    net = FLSLViT(patch_size=patch_size, **SMALL)
    pyramid = SimpleFeaturePyramid(net, out_channels=32, top_block=LastLevelMaxPool())
    shapes = pyramid.output_shape()
    assert {k: s.stride for k, s in shapes.items()} == {f"p{i}": 2**i for i in range(2, 7)}
    maps = pyramid(torch.randn(1, 3, 128, 192))
    for name, value in maps.items():
        stride = shapes[name].stride
        assert value.shape == (1, 32, 128 // stride, 192 // stride)


@torch.no_grad()
def test_equals_detectron2():
    net = FLSLViT(**SMALL)
    scales = (4.0, 2.0, 1.0, 0.5)
    theirs = Detectron2Pyramid(net, "last_feat", 32, scales, LastLevelMaxPool()).eval()
    ours = SimpleFeaturePyramid(net, "last_feat", 32, scales, LastLevelMaxPool()).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 128)
    expected = theirs(images)
    assert expected.keys() == ours.output_shape().keys()
    for name, value in ours(images).items():
        torch.testing.assert_close(value, expected[name])


def test_images_are_really_padded():
    pyramid = SimpleFeaturePyramid(FLSLViT(**SMALL))
    images = ImageList.from_tensors(
        [torch.zeros(3, 50, 70)], padding_constraints=pyramid.padding_constraints
    )
    assert images.tensor.shape == (1, 3, 64, 96)
    alone = ImageList.from_tensors(
        [torch.zeros(3, 50, 70)], padding_constraints=pyramid.net.padding_constraints
    )
    assert alone.tensor.shape == (1, 3, 64, 80)


def test_scales_that_are_no_powers_of_two():
    with pytest.raises(InputError, match="powers of two"):
        SimpleFeaturePyramid(FLSLViT(**SMALL), scale_factors=(3.0, 1.0))


def test_patches_of_14_pixels_have_no_such_strides():
    with pytest.raises(InputError, match=r"stride 14 .* patches of 8 or 16 pixels"):
        SimpleFeaturePyramid(FLSLViT(**{**SMALL, "img_size": 56, "patch_size": 14}))


def yaml_config(name):
    cfg = get_cfg()
    flsl_d2.add_flsl_config(cfg)
    flsl_d2.add_flsl_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FLSL_VIT.IMG_SIZE = 64
    cfg.MODEL.FLSL_VIT.EMBED_DIM = 48
    cfg.MODEL.FLSL_VIT.NUM_HEADS = 3
    cfg.MODEL.FLSL_VIT.DEPTH = 4
    return cfg


@pytest.mark.parametrize("name", ["build_flsl_vit_sfp_backbone", "FLSLViT"])
def test_yaml_builds_a_detector(name):
    cfg = yaml_config(name)
    pyramid = name != "FLSLViT"
    features = [f"p{i}" for i in range(2, 7)] if pyramid else ["last_feat"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]] if pyramid else [[32]]
    cfg.MODEL.RPN.IN_FEATURES = features
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = features[:4]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model = build_model(cfg).eval()
    backbone = model.backbone.net if pyramid else model.backbone
    assert isinstance(backbone, FLSLViT)
    assert [b.window_size for b in backbone.blocks] == [0, 0, 0, 0]
    with torch.no_grad():
        output = model([{"image": torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)}])
    assert "instances" in output[0]


@torch.no_grad()
def test_default_pixels_reach_the_encoder_as_rgb():
    """Detectron2's default BGR with std 1 must give what normalised RGB gives."""
    cfg = yaml_config("FLSLViT")
    backbone = FLSLViT(cfg, None).eval()
    image = torch.rand(1, 3, 64, 64) * 255  # RGB
    mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
    as_fed = (image.flip(1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    rgb = (image - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)) / torch.tensor(
        [58.395, 57.12, 57.375]
    ).view(3, 1, 1)
    adapted = backbone(as_fed)["last_feat"]
    backbone.pixel_adapter = None
    # Pixels up to 255 are normalised in float32 on two ways.
    torch.testing.assert_close(adapted, backbone(rgb)["last_feat"], rtol=1e-4, atol=1e-4)


def test_pixels_that_are_right_are_left_alone():
    cfg = yaml_config("FLSLViT")
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    assert PixelAdapter.from_config(cfg) is None
