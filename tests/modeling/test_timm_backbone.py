"""timm models as backbones: features equal timm's own, any size, right pyramid, right pixels."""

from __future__ import annotations

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from flsl_d2 import add_flsl_config
from flsl_d2.detection.solver import add_solver_config, build_yaml_optimizer
from flsl_d2.errors import InputError
from flsl_d2.modeling.timm_backbone import (
    TimmBackbone,
    build_timm_backbone,
    parse_timm_name,
    timm_pyramid,
)

# One small model of every family, shortened where the family has no small one.
PLAIN = {
    "vit_tiny_patch16_224": {"depth": 2},
    "vit_small_patch16_dinov3": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 1},
    "vit_base_patch16_clip_224": {"depth": 1},
    "naflexvit_base_patch16_gap": {"depth": 1},
    "samvit_base_patch16": {"depth": 1, "global_attn_indexes": (0,)},
    "vit_small_patch14_dinov2": {"depth": 2},
}
LEVELS = {
    "resnet18": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "pvt_v2_b0": {},
    "efficientnet_b0": {},
}


@pytest.mark.parametrize(("name", "arguments"), [*PLAIN.items(), *LEVELS.items()])
def test_maps_equal_timms_at_a_size_of_no_usual_ratio(name, arguments):
    backbone = TimmBackbone(name, pretrained=False, **arguments).eval()
    mean = torch.tensor(timm.data.resolve_model_data_config(backbone.model)["mean"])
    std = torch.tensor(timm.data.resolve_model_data_config(backbone.model)["std"])
    stride = backbone.padding_constraints["size_divisibility"]
    images = torch.rand(2, 3, 3 * stride, 4 * stride)
    fed = (images * 255 - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor(
        [58.395, 57.12, 57.375]
    )[:, None, None]
    own = (images - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        maps = backbone(fed)
        expected = backbone.model.forward_intermediates(
            own, norm=backbone.is_plain, intermediates_only=True
        )
    assert list(maps) == list(backbone.output_shape())
    for output, shape in backbone.output_shape().items():
        assert maps[output].shape[1] == shape.channels
        assert maps[output].shape[-2:] == (3 * stride // shape.stride, 4 * stride // shape.stride)
    # The last map is the last of timm's own; float32 rounding of the two normalisations remains.
    torch.testing.assert_close(list(maps.values())[-1], expected[-1], rtol=1e-5, atol=1e-5)
    if name in PLAIN:
        tokens = backbone.forward_tokens(fed)
        assert torch.equal(tokens, maps["last_feat"].flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "arguments", "levels"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, "SimpleFeaturePyramid"),
        ("resnet18", {}, "FPN"),
    ],
)
def test_the_pyramid_that_fits(name, arguments, levels):
    pyramid = timm_pyramid(TimmBackbone(name, pretrained=False, **arguments), 32)
    assert type(pyramid).__name__ == levels
    maps = pyramid(torch.zeros(1, 3, 64, 96))
    assert {k: tuple(v.shape[1:]) for k, v in maps.items()} == {
        "p2": (32, 16, 24),
        "p3": (32, 8, 12),
        "p4": (32, 4, 6),
        "p5": (32, 2, 3),
        "p6": (32, 1, 2),
    }


def test_yaml_config_builds_it_and_reads_bgr():
    cfg = get_cfg()
    add_flsl_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_pyramid"
    cfg.MODEL.TIMM.NAME = "resnet18?pretrained=false"
    cfg.MODEL.TIMM.FROZEN = True
    backbone = build_backbone(cfg)
    net = backbone.bottom_up
    rgb = TimmBackbone("resnet18", pretrained=False).eval()
    rgb.model.load_state_dict(net.model.state_dict())
    pixels = torch.rand(1, 3, 64, 64) * 255
    mean, std = torch.tensor(cfg.MODEL.PIXEL_MEAN), torch.tensor(cfg.MODEL.PIXEL_STD)
    bgr_fed = (pixels.flip(1) - mean[:, None, None]) / std[:, None, None]
    rgb_fed = (pixels - torch.tensor([123.675, 116.28, 103.53])[:, None, None]) / torch.tensor(
        [58.395, 57.12, 57.375]
    )[:, None, None]
    backbone.train()
    assert not net.model.training
    with torch.no_grad():
        # float32 rounding of pixels up to 255 on two ways of normalisation.
        torch.testing.assert_close(net(bgr_fed)["res5"], rgb(rgb_fed)["res5"], atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in net.parameters())


def test_layer_factors_fall_towards_the_input():
    net = TimmBackbone("vit_tiny_patch16_224", pretrained=False, depth=3)
    factors = net.layer_factors(0.5)
    assert set(factors) == {n for n, _ in net.named_parameters()}
    ordered = [factors[f"model.blocks.{i}.attn.qkv.weight"] for i in range(3)]
    assert ordered == [ordered[2] / 4, ordered[2] / 2, ordered[2]]
    assert factors["model.patch_embed.proj.weight"] < ordered[0]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_every_trained_parameter_gets_a_gradient(name):
    """Several processes cannot train a model of which some parameters get none."""
    net = TimmBackbone(name, pretrained=False)
    torch.stack([each.sum() for each in net(torch.rand(1, 3, 64, 64)).values()]).sum().backward()
    without = {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("model.head.", "model.fc.")) for name in frozen)


def test_yaml_layer_decay_follows_timms_layers():
    """Blocks are numbered anew in every stage, so their numbers alone tell no depth."""
    cfg = get_cfg()
    add_flsl_config(cfg)
    add_solver_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_timm_pyramid"
    cfg.MODEL.TIMM.NAME = "convnext_atto?pretrained=false"
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.LAYER_DECAY, cfg.SOLVER.BASE_LR = "ADAMW", 0.5, 1.0
    model = torch.nn.Sequential()
    model.backbone = build_backbone(cfg)
    groups = build_yaml_optimizer(cfg, model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    factors = model.backbone.bottom_up.layer_factors(0.5)
    for name, parameter in model.backbone.bottom_up.named_parameters():
        assert not parameter.requires_grad or rates[id(parameter)] == factors[name]
    assert factors["model.stages.3.blocks.0.gamma"] > factors["model.stages.0.blocks.1.gamma"]
    assert rates[id(model.backbone.fpn_lateral2.weight)] == 1.0


def test_weights_of_a_file_are_taken_whole(tmp_path):
    source = TimmBackbone("vit_tiny_patch16_224", pretrained=False, depth=1)
    file = tmp_path / "vit.pth"
    torch.save(source.model.state_dict(), file)
    text = f"timm:vit_tiny_patch16_224?depth=1&weights={file}"
    loaded = build_timm_backbone(text).eval()
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(loaded(images)["last_feat"], source.eval()(images)["last_feat"])
    with pytest.raises(InputError, match="lack"):
        build_timm_backbone(text.replace("depth=1", "depth=2"))


def test_names_with_options():
    assert parse_timm_name("timm:resnet50.a1_in1k?pretrained=false&img_size=(96, 128)") == (
        "resnet50.a1_in1k",
        {"pretrained": False, "img_size": (96, 128)},
    )
    with pytest.raises(InputError, match="no option"):
        parse_timm_name("timm:resnet50?pretrained")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vit_smal_patch16_dinov3", "did you mean .*vit_small_patch16_dinov3"),
        ("hiera_tiny_224", "images of any size"),
        ("levit_128s", "images of any size"),
        ("mvitv2_tiny", "images of any size"),
        ("resnet18?colour=red", "check the options"),
    ],
)
def test_what_cannot_be_used_is_said(name, sentence):
    with pytest.raises(InputError, match=sentence):
        build_timm_backbone(f"timm:{name}", pretrained=False)


def test_an_image_that_does_not_fit():
    net = TimmBackbone("resnet18", pretrained=False)
    with pytest.raises(InputError, match=r"40 x 64 pixels .* multiples of 32"):
        net(torch.zeros(1, 3, 40, 64))
