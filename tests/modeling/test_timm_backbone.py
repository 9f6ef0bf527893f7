"""timm models as backbones: features equal timm's own, any size, right pyramid, right pixels."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_backbone
from timm.optim import param_groups_layer_decay

from flsl_d2 import add_flsl_config
from flsl_d2.detection.solver import add_solver_config, build_yaml_optimizer
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.modeling import timm_backbone
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


@pytest.mark.parametrize(("name", "arguments"), [*LEVELS.items(), *list(PLAIN.items())[:1]])
@pytest.mark.parametrize("kind", ["yaml", "lazy"])
def test_layer_decay_is_timms(kind, name, arguments):
    """Blocks are numbered anew in every stage, so their numbers alone tell no depth."""
    text = f"{name}?pretrained=false" + "".join(f"&{k}={v}" for k, v in arguments.items())
    model = torch.nn.Sequential()
    if kind == "yaml":
        cfg = get_cfg()
        add_flsl_config(cfg)
        add_solver_config(cfg)
        cfg.MODEL.BACKBONE.NAME = "build_timm_pyramid"
        cfg.MODEL.TIMM.NAME = text
        cfg.SOLVER.OPTIMIZER, cfg.SOLVER.LAYER_DECAY, cfg.SOLVER.BASE_LR = "ADAMW", 0.5, 1.0
        model.backbone = build_backbone(cfg)
        optimizer = build_yaml_optimizer(cfg, model)
    else:
        cfg = load_lazy_config("coco/mask_rcnn_flsl_vit_s16_1x.py").optimizer
        model.backbone = timm_pyramid(build_timm_backbone(text))
        cfg.lr, cfg.params.lr_factor_func.decay_rate, cfg.params.model = 1.0, 0.5, model
        optimizer = instantiate(cfg)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    net = getattr(model.backbone, "bottom_up", None) or model.backbone.net
    expected = param_groups_layer_decay(net.model, layer_decay=0.5)
    for group in expected:
        assert {rates.pop(id(p)) for p in group["params"]} == {group["lr_scale"]}
    assert len({group["lr_scale"] for group in expected}) > 2
    assert set(rates.values()) == {1.0}  # the pyramid
    assert {id(p) for p in model.backbone.parameters() if p.requires_grad} >= set(rates)


@pytest.mark.parametrize(("name", "arguments"), [*LEVELS.items(), *list(PLAIN.items())[:2]])
def test_checkpointing_keeps_less_for_the_same_gradients(name, arguments):
    nets = [
        TimmBackbone(name, pretrained=False, use_act_checkpoint=recomputed, **arguments)
        for recomputed in (False, True)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    images = torch.rand(2, 3, 64, 64)
    kept, gradients = [0, 0], []
    for index, net in enumerate(nets):

        def keep(tensor: torch.Tensor, index: int = index) -> torch.Tensor:
            kept[index] += tensor.numel()
            return tensor

        torch.manual_seed(0)  # of stochastic depth, which is drawn again for the second pass
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = torch.stack([each.square().mean() for each in net(images).values()]).sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert kept[1] < kept[0] / 2
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_frozen_model_of_several_stages_stays_as_it_is(name):
    """Batch norm has statistics that training mode would move, and blocks dropped paths."""
    arguments = {**LEVELS[name], "frozen": True, "use_act_checkpoint": True}
    pyramid = timm_pyramid(TimmBackbone(name, pretrained=False, **arguments), 8).train()
    before = copy.deepcopy(pyramid.bottom_up.state_dict())
    images = torch.rand(2, 3, 64, 64)
    first = pyramid(images)
    torch.stack([each.square().mean() for each in first.values()]).sum().backward()
    assert all((p.grad is None) == n.startswith("bottom_up") for n, p in pyramid.named_parameters())
    torch.optim.SGD(pyramid.parameters(), 1.0, weight_decay=1.0).step()
    after = pyramid.bottom_up.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not pyramid.bottom_up.model.training


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
        ("resnet18?weights=/no/such.pth", "'/no/such.pth' do not exist"),
        ("hrnet_w18_small?use_act_checkpoint=true", "cannot recompute"),
    ],
)
def test_what_cannot_be_used_is_said(name, sentence):
    with pytest.raises(InputError, match=sentence):
        build_timm_backbone(f"timm:{name}", pretrained=False)


def test_an_image_that_does_not_fit():
    net = TimmBackbone("resnet18", pretrained=False)
    with pytest.raises(InputError, match=r"40 x 64 pixels .* multiples of 32"):
        net(torch.zeros(1, 3, 40, 64))


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def fail(request, timeout):
        asked.append(timeout)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr(timm_backbone, "try_to_load_from_cache", lambda *_: None)
    for name in ("resnet18", "hf-hub:someone/vit"):
        with pytest.raises(InputError, match="cannot be reached"):
            TimmBackbone(name)
    assert asked == [5.0, 5.0]
