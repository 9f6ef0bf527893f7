"""The encoders of a comparison, and the detector that takes their architecture."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from flsl_d2.engine.command_line import named_weights
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.studies.encoders import ComparedEncoder, read_encoders
from flsl_d2.studies.evaluations import (
    DetectionEvaluation,
    DetectionTask,
    EncoderFile,
    encoder_overrides,
)
from flsl_d2.weights import build_encoder, write_encoder

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALLER = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 1}


def write(path: Path, **arguments) -> str:
    write_encoder(FLSLViT(**arguments), path)
    return str(path)


def read(*texts: str) -> list[ComparedEncoder]:
    return read_encoders([named_weights(text) for text in texts])


def test_names_sources_and_checksums(tmp_path):
    flsl, other = write(tmp_path / "a.pth", **SMALL), write(tmp_path / "b.pth", **SMALLER)
    encoders = read("random", f"flsl={flsl}", other, "fair=random:b")
    assert [encoder.name for encoder in encoders] == ["random", "flsl", "b", "fair"]
    assert encoders[1].sha256 == hashlib.sha256(Path(flsl).read_bytes()).hexdigest()
    assert {**encoders[0].architecture, **SMALL} == encoders[0].architecture
    assert {**encoders[3].architecture, **SMALLER} == encoders[3].architecture
    (vit_s,) = read("random")
    assert vit_s.architecture == FLSLViT().architecture


def test_untrained_encoders_differ_by_seed_alone(tmp_path):
    (encoder,) = read("random")
    encoder = type(encoder)("random", "random", FLSLViT(**SMALL).architecture)
    before = torch.random.get_rng_state()
    files = [encoder.file(seed, tmp_path / name) for name, seed in (("x", 0), ("y", 0), ("x", 1))]
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [build_encoder(file.path).blocks[0].attn.qkv.weight for file in files]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert files[0].identity == files[1].identity != files[2].identity


def test_files_that_cannot_be_used_fail_alone(tmp_path):
    good = write(tmp_path / "good.pth", **SMALL)
    (tmp_path / "damaged.pth").write_bytes(Path(good).read_bytes()[:500])
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    names = ["missing.pth", "damaged.pth", "other.pth"]
    encoders = read(*(str(tmp_path / name) for name in names), f"good={good}")
    assert [bool(encoder.failure) for encoder in encoders] == [True, True, True, False]
    for encoder, name in zip(encoders, names, strict=False):
        assert name in encoder.failure
        assert encoder.failure.count("\n") == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [([], "no encoder"), (["random", "random"], "'random'"), (["random:other"], "names no file")],
)
def test_bad_lists_of_encoders(given, says):
    with pytest.raises(InputError, match=says):
        read(*given)


def test_the_detector_takes_the_architecture_of_the_weights(tmp_path, caplog):
    """Patch, width, depth, heads, positions of the file; windows stay the config's."""
    deep = {**SMALL, "depth": 8}
    path = write(tmp_path / "a.pth", **deep, qkv_bias=False, mlp_ratio=2.0, layer_scale_init=0.1)
    config = "configs/coco/mask_rcnn_flsl_vit_s16_1x.py"
    cfg = load_lazy_config(config, ["train.device=cpu"])
    encoder = build_encoder(path)
    changed = load_lazy_config(config, encoder_overrides(path, cfg))
    assert changed.model.backbone.net.window_size == 14
    net = instantiate(OmegaConf.to_container(changed.model.backbone.net, resolve=True))
    assert net.blocks[0].window_size == 14
    net.load_state_dict(encoder.state_dict())
    same = {**net.architecture}
    for key in ("window_size", "global_block_indexes", "mask_window_padding"):
        same.pop(key, None)
    own = {key: value for key, value in encoder.architecture.items() if key in same}
    assert {key: same[key] for key in own} == own
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]

    plain = DetectionEvaluation(DetectionTask(config))
    job = plain.job(EncoderFile("a", path, {"sha256": "0"}))
    command = job.command(Path("out"), 2)
    assert {"model.backbone.net.patch_size=8", "train.output_dir=out"} <= set(command)
    assert command[command.index("--num-gpus") + 1] == "2"
    again = DetectionEvaluation(DetectionTask(config, ["optimizer.lr=1e-3"]))
    keys = {
        job.key,
        again.job(EncoderFile("a", path, {"sha256": "0"})).key,
        plain.job(EncoderFile("b", path, {"sha256": "1"})).key,
        plain.job(EncoderFile("a", path, {"sha256": "0"}, seed=1)).key,
    }
    assert len(keys) == 4


TIMM = "timm:resnet18?pretrained=false"


def test_models_of_timm_by_name():
    cnn, vit, unknown = read(
        TIMM, "vit=timm:vit_tiny_patch16_224?depth=1&pretrained=false", "timm:restnet18"
    )
    assert (cnn.name, cnn.source, cnn.sha256) == ("resnet18", TIMM, "")
    assert cnn.architecture == {"timm": "resnet18", "pretrained": False}
    assert vit.name == "vit"
    assert "did you mean resnet18" in unknown.failure
    files = [cnn.file(seed, Path("not made")) for seed in (0, 1)]
    assert [file.path for file in files] == [TIMM, TIMM]
    assert files[0].identity != files[1].identity  # their weights are drawn by the seed
    with pytest.raises(InputError, match="names no file"):
        read(TIMM, "random:resnet18")


def test_weights_of_timm_are_known_by_their_checksum(tmp_path):
    name = "vit_tiny_patch16_224"
    sums = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = timm.create_model(name, depth=1, num_classes=0)
        torch.save(model.state_dict(), tmp_path / "a.pth")
        (encoder,) = read(f"timm:{name}?depth=1&num_classes=0&weights={tmp_path / 'a.pth'}")
        sums.append(encoder.sha256)
        assert encoder.file(seed, tmp_path).identity == {"sha256": encoder.sha256}
    assert sums[0] == sums[1] != sums[2]
    assert len(sums[0]) == 64


@pytest.mark.parametrize(
    ("source", "pyramid"),
    [(TIMM, "FPN"), ("timm:vit_tiny_patch16_224?pretrained=false&depth=3", "SimpleFeaturePyramid")],
)
def test_a_model_of_timm_in_a_detector(source, pyramid):
    config = "configs/demo/mask_rcnn_flsl_vit_scenes.py"
    frozen = ["model.backbone.net.frozen=True"]
    cfg = load_lazy_config(config, frozen)
    changed = load_lazy_config(config, [*frozen, *encoder_overrides(source, cfg)])
    assert changed.train.init_checkpoint == ""
    backbone = instantiate(changed.model.backbone)
    assert type(backbone).__name__ == pyramid
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if ".model." in n)
    levels = backbone(torch.zeros(1, 3, 64, 64))
    assert levels["p2"].shape[1:] == (cfg.model.backbone.out_channels, 16, 16)


def test_detection_configs_are_checked():
    for config, says in (
        ("configs/coco/mask_rcnn_flsl_vit_s16_1x.yaml", "YAML"),
        ("configs/pretrain/flsl_vit_small_p16_in1k.py", "backbone.net"),
        ("configs/coco/mask_rcnn.py", "does not exist"),
    ):
        with pytest.raises(InputError, match=says):
            DetectionEvaluation(DetectionTask(config)).check()
