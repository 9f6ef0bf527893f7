"""Detectron2's own ViTDet files, with windows and relative positions, from pickles and .pth."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid as Detectron2Pyramid
from detectron2.modeling.backbone.vit import ViT
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid
from flsl_d2.weights import FLSLCheckpointer, build_encoder, open_encoder

WIDTH = {"embed_dim": 192, "depth": 4, "num_heads": 3}


class Detector(nn.Module):
    """The nesting of a detector's names."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 4)


def vitdet(**options) -> Detector:
    vit = ViT(
        img_size=128,
        pretrain_img_size=64,
        window_size=3,
        window_block_indexes=(0, 2),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{"use_rel_pos": True, **WIDTH, **options},
    )
    pyramid = Detectron2Pyramid(vit, "last_feat", 8, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool())
    model = Detector(pyramid).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "rel_pos" in name else 0.1)
    return model.requires_grad_(False)


def zoo_file(model: nn.Module, path) -> str:
    """As in Detectron2's model zoo."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "ViTDet"}))
    return str(path)


@pytest.mark.parametrize("size", [(64, 64), (96, 208)])
@torch.no_grad()
def test_the_same_features_as_detectron2(tmp_path, size):
    model = vitdet()
    encoder, report = open_encoder(zoo_file(model, tmp_path / "model_final.pkl"))
    images = torch.randn(2, 3, *size)
    expected = model.backbone.net(images)["last_feat"]
    assert expected.std() > 0.05
    # Detectron2's operations in another order, in float32.
    torch.testing.assert_close(encoder(images)["last_feat"], expected, rtol=1e-4, atol=1e-4)
    known = encoder.architecture
    assert (known["window_size"], known["global_block_indexes"]) == (3, [1, 3])
    assert (known["rel_pos_img_size"], known["final_norm"]) == (128, False)
    assert report.source == "Detectron2's ViTDet"
    assert "the position of a class token" in report.dropped["backbone.net.pos_embed[:, 0]"]
    assert report.dropped["head.weight"] == "belongs to the detector"


@torch.no_grad()
def test_windows_without_relative_positions_are_asked_for(tmp_path):
    model = vitdet(use_rel_pos=False)
    path = zoo_file(model, tmp_path / "a.pkl")
    images = torch.randn(1, 3, 96, 128)
    expected = model.backbone.net(images)["last_feat"]
    windows = build_encoder(path, window_size=3, global_block_indexes=(1, 3))
    # Detectron2's operations in another order, in float32.
    torch.testing.assert_close(windows(images)["last_feat"], expected, rtol=1e-4, atol=1e-4)
    plain, report = open_encoder(path)
    assert (plain(images)["last_feat"] - expected).abs().max() > 1e-3
    assert "give window_size" in report.note


@torch.no_grad()
def test_a_vitdet_goes_into_a_detector_of_this_project(tmp_path):
    model = vitdet()
    options = {
        "img_size": 64,
        "window_size": 3,
        "use_rel_pos": True,
        "rel_pos_img_size": 128,
        "final_norm": False,
        "position_offset": 0.0,
        **WIDTH,
    }
    scales = (4.0, 2.0, 1.0, 0.5)
    net = FLSLViT(global_block_indexes=(1, 3), **options)
    ours = Detector(SimpleFeaturePyramid(net, "last_feat", 8, scales, LastLevelMaxPool())).eval()
    path = zoo_file(model, tmp_path / "a.pkl")
    FLSLCheckpointer(ours).load(path)
    images = torch.randn(1, 3, 128, 96)
    expected = model.backbone(images)
    for name, value in ours.backbone(images).items():
        # Detectron2's operations in another order, in float32.
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.head.weight, model.head.weight)
    for wrong in ({"final_norm": True}, {"use_rel_pos": False}, {"embed_dim": 96}):
        other = Detector(SimpleFeaturePyramid(FLSLViT(**{**options, **wrong}), out_channels=8))
        with pytest.raises(InputError, match=f"has {next(iter(wrong))}="):
            FLSLCheckpointer(other).load(path)


def test_models_of_caffe2_load_as_in_detectron2(tmp_path):
    stem = nn.ModuleDict({"stem": BasicStem(norm="FrozenBN")})
    names = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    blobs = {name: torch.randn(shape).numpy() for name, shape in names.items()}
    blobs["conv1_w_momentum"] = blobs["conv1_w"]
    (tmp_path / "R.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    expected = nn.ModuleDict({"stem": BasicStem(norm="FrozenBN")})
    DetectionCheckpointer(expected).load(str(tmp_path / "R.pkl"))
    FLSLCheckpointer(stem).load(str(tmp_path / "R.pkl"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(stem.state_dict()[name], tensor)
    assert torch.equal(stem.stem.conv1.weight, torch.as_tensor(blobs["conv1_w"]))
