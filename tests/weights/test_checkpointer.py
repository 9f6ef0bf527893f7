"""The checkpointer: encoders by exact name with a count, detectors and runs as usual."""

import ast
import logging
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN_FILES
from detectron2.checkpoint import DetectionCheckpointer
from layouts import LAYOUTS
from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid
from flsl_d2.weights import FLSLCheckpointer, build_encoder

SMALL = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}


class Detector(nn.Module):
    def __init__(self, **changes):
        super().__init__()
        self.backbone = SimpleFeaturePyramid(FLSLViT(**{**SMALL, **changes}), out_channels=8)
        self.head = nn.Linear(4, 4)


class Pretraining(nn.Module):
    """The nesting of a pre-training model: two encoders with their heads."""

    def __init__(self):
        super().__init__()
        self.student = nn.ModuleDict({"backbone": FLSLViT(**SMALL), "head": nn.Linear(4, 4)})
        self.teacher = nn.ModuleDict({"backbone": FLSLViT(**SMALL), "head": nn.Linear(4, 4)})


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def save_encoder(encoder: FLSLViT, path) -> str:
    torch.save(
        {
            "model": encoder.state_dict(),
            "encoder": encoder.architecture,
            "format": "flsl_d2 encoder",
            "matching_heuristics": True,
        },
        path,
    )
    return str(path)


@pytest.fixture
def encoder():
    return randomised(FLSLViT(**SMALL))


def same(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())


def refusal(model: nn.Module, path: str) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpointer = FLSLCheckpointer(model)
    for _ in range(2):  # a failed load leaves a checkpointer that can be used again
        with pytest.raises(InputError) as error:
            checkpointer.load(path)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_encoder_file_into_a_detector_with_one_line(encoder, tmp_path, caplog):
    path = save_encoder(encoder, tmp_path / "teacher_backbone.pth")
    model = Detector(window_size=2, drop_path_rate=0.1)
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(path)
    assert same(encoder, model.backbone.net)
    count = len(encoder.state_dict())
    lines = [r.getMessage() for r in caplog.records if "matched" in r.getMessage()]
    assert lines == [f"encoder weights: {count} of {count} matched ({path})"]
    assert "FLSLViT: all" not in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_encoder_file_into_a_bare_encoder(encoder, tmp_path):
    path = save_encoder(encoder, tmp_path / "a.pth")
    model = FLSLViT(**SMALL)
    FLSLCheckpointer(model).load(path)
    assert same(encoder, model)


def test_bare_state_dicts_load(encoder, tmp_path):
    for content in (encoder.state_dict(), {"model": encoder.state_dict()}):
        torch.save(content, tmp_path / "a.pth")
        model = Detector()
        FLSLCheckpointer(model).load(str(tmp_path / "a.pth"))
        assert same(encoder, model.backbone.net)


def test_the_teacher_of_a_pretraining_checkpoint(tmp_path, caplog):
    run = randomised(Pretraining())
    FLSLCheckpointer(run, str(tmp_path)).save("model_final")
    model = Detector()
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    assert same(run.teacher["backbone"], model.backbone.net)
    assert "2 left out (the projection head serves pre-training only)" in caplog.text
    again = Pretraining()
    FLSLCheckpointer(again).load(str(tmp_path / "model_final.pth"))
    assert same(run, again)


def test_a_runs_checkpoint_tells_what_shapes_cannot(tmp_path):
    """Three heads of 16 channels: a guess from the width would be another network."""
    model = randomised(Pretraining())
    FLSLCheckpointer(model, str(tmp_path)).save("model_final", iteration=3)
    built = build_encoder(str(tmp_path / "model_final.pth"))
    assert built.blocks[0].attn.num_heads == 3
    image = torch.randn(1, 3, 64, 64)
    own = model.teacher["backbone"].eval()
    torch.testing.assert_close(built.forward_tokens(image), own.forward_tokens(image))


def test_positions_of_another_grid_are_resampled(encoder, tmp_path, caplog):
    path = save_encoder(encoder, tmp_path / "a.pth")
    model = Detector(img_size=96)
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(path)
    assert "positions resampled from 4 x 4 to 6 x 6" in caplog.text
    assert model.backbone.net.pos_embed.shape == (1, 36, 48)
    FLSLCheckpointer(model, str(tmp_path)).save("detector")
    other = Detector(img_size=64)
    FLSLCheckpointer(other).load(str(tmp_path / "detector.pth"))
    assert other.backbone.net.pos_embed.shape == (1, 16, 48)


def test_new_relative_positions_are_counted_and_change_nothing(encoder, tmp_path, caplog):
    path = save_encoder(encoder, tmp_path / "a.pth")
    model = Detector(use_rel_pos=True)
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(path)
    own = len(model.backbone.net.state_dict())
    assert f"{own - 6} of {own} matched" in caplog.text
    assert "6 relative position tables are new" in caplog.text
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(images), model.eval().backbone.net(images))


@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": 96},
        {"depth": 2},
        {"depth": 4},
        {"num_heads": 4},
        {"patch_size": 8},
        {"mlp_ratio": 2.0},
        {"qkv_bias": False},
    ],
)
def test_another_architecture_is_refused_by_its_values(encoder, tmp_path, change):
    path = save_encoder(encoder, tmp_path / "a.pth")
    text = refusal(Detector(**change), path)
    for key, value in change.items():
        assert f"{key}={encoder.architecture[key]}" in text
        assert f"{key}={value}" in text


@pytest.mark.parametrize("change", [{"embed_dim": 96}, {"depth": 2}, {"patch_size": 8}])
def test_a_detector_of_another_architecture_is_refused(tmp_path, change):
    FLSLCheckpointer(Detector(), str(tmp_path)).save("detector")
    text = refusal(Detector(**change), str(tmp_path / "detector.pth"))
    assert "=" in text


def test_an_incomplete_encoder_is_refused(encoder, tmp_path):
    state = encoder.state_dict()
    for dropped in ("final_norm.bias", "blocks.1.attn.qkv.weight", "pos_embed"):
        torch.save({k: v for k, v in state.items() if k != dropped}, tmp_path / "a.pth")
        assert dropped in refusal(Detector(), str(tmp_path / "a.pth"))


def test_weights_that_the_model_has_no_place_for_are_listed(encoder, tmp_path, caplog):
    path = save_encoder(encoder, tmp_path / "a.pth")
    model = Detector(final_norm=False)
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(path)
    warning = next(r for r in caplog.records if r.levelno == logging.WARNING)
    assert "not used: final_norm.bias, final_norm.weight" in warning.getMessage()


def test_foreign_names_are_refused(tmp_path):
    torch.save({"model": {"res2.conv1.weight": torch.ones(1)}}, tmp_path / "a.pth")
    text = refusal(Detector(), str(tmp_path / "a.pth"))
    assert "res2.conv1.weight" in text
    assert "published FLSL" in text


def test_a_detector_resumes_with_its_iteration(tmp_path):
    model = randomised(Detector())
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    FLSLCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_1", iteration=1)
    other = Detector()
    other_optimizer = torch.optim.AdamW(other.parameters())
    checkpointer = FLSLCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert same(model, other)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1


def test_models_without_this_encoder_load_as_ever(tmp_path):
    model = randomised(nn.Linear(2, 2))
    FLSLCheckpointer(model, str(tmp_path)).save("a")
    other = nn.Linear(2, 2)
    FLSLCheckpointer(other).load(str(tmp_path / "a.pth"))
    assert same(model, other)


def test_detectron2s_own_checkpointer_reads_the_encoder_file(encoder, tmp_path):
    path = save_encoder(encoder, tmp_path / "a.pth")
    model = Detector()
    DetectionCheckpointer(model).load(path)
    assert same(encoder, model.backbone.net)
    with pytest.raises(RuntimeError, match="no tensor that fits"):
        DetectionCheckpointer(Detector(embed_dim=96)).load(path)


@pytest.mark.parametrize("reference", GOLDEN_FILES, ids=lambda path: path.stem)
def test_a_file_in_the_published_layout_gives_the_published_tokens(reference, tmp_path, caplog):
    golden = np.load(reference)
    meta = ast.literal_eval(str(golden["__meta__"]))
    student, teacher = (
        {
            key.removeprefix(name): torch.from_numpy(golden[key])
            for key in golden.files
            if key.startswith(name)
        }
        for name in ("student.", "teacher.")
    )
    # The outer shape of the files that the published code writes.
    file = {"student": {f"module.{key}": value for key, value in student.items()}}
    file |= {"teacher": teacher, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    file |= {"args": Namespace(arch="vit_small", patch_size=meta["p"]), "flsl_loss": {}}
    path = str(tmp_path / "checkpoint.pth")
    torch.save(file, path)
    width = {"embed_dim": meta["d"], "depth": meta["depth"], "num_heads": meta["h"]}
    grid = round(torch.as_tensor(golden["teacher.backbone.pos_embed"]).shape[1] ** 0.5)
    encoder = FLSLViT(img_size=grid * meta["p"], patch_size=meta["p"], **width)
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(encoder).load(path)
    tokens = encoder.eval().forward_tokens(torch.from_numpy(golden["view0"]))
    # The published code's operations in another order, in float32.
    torch.testing.assert_close(
        tokens, torch.from_numpy(golden["teacher_tokens"]), rtol=1e-4, atol=1e-5
    )
    assert "1 left out (stored by the published code, but unused)" in caplog.text


# Detectors of the width of tests/weights/layouts.py.
OF_LAYOUTS = {"embed_dim": 192, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "query"), [("DINO teacher", ""), ("DINO student", "?which=student"), ("MAE", "")]
)
def test_other_projects_encoders_go_into_a_detector_without_their_class_token(
    tmp_path, caplog, name, query
):
    layout = LAYOUTS[name][0]()
    torch.save(layout.content, tmp_path / "a.pth")
    model = Detector(window_size=2, **OF_LAYOUTS)
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(f"{tmp_path / 'a.pth'}{query}")
    net, theirs = model.backbone.net, layout.model.state_dict()
    count = len(net.state_dict())
    assert f"{count} of {count} matched" in caplog.text
    assert "the encoder has num_prefix_tokens=0, as windows require" in caplog.text
    assert torch.equal(net.pos_embed, theirs["pos_embed"][:, 1:])
    assert torch.equal(net.final_norm.weight, theirs["norm.weight"])
    assert torch.equal(net.blocks[1].mlp.fc2.weight, theirs["blocks.1.mlp.fc2.weight"])
    assert ("position_offset=0.0" in caplog.text) == (name == "MAE")


def test_prefix_tokens_are_kept_where_the_encoder_has_them(tmp_path):
    layout = LAYOUTS["DINO teacher"][0]()
    torch.save(layout.content, tmp_path / "a.pth")
    model = Detector(num_prefix_tokens=1, **OF_LAYOUTS)
    FLSLCheckpointer(model).load(str(tmp_path / "a.pth"))
    theirs = layout.model.state_dict()
    expected = theirs["cls_token"] + theirs["pos_embed"][:, :1]
    assert torch.equal(model.backbone.net.prefix_tokens, expected)
    text = refusal(Detector(num_prefix_tokens=5, **OF_LAYOUTS), str(tmp_path / "a.pth"))
    assert "num_prefix_tokens=1" in text
    assert "num_prefix_tokens=5" in text


def test_layer_scale_is_kept_or_asked_for(tmp_path):
    layout = LAYOUTS["DINOv2"][0]()
    torch.save(layout.content, tmp_path / "a.pth")
    dinov2 = {"img_size": 56, "patch_size": 14, **OF_LAYOUTS}
    encoder = FLSLViT(layer_scale_init=1.0, **dinov2)
    FLSLCheckpointer(encoder).load(str(tmp_path / "a.pth"))
    theirs = layout.model.state_dict()
    assert torch.equal(encoder.blocks[1].ls2.gamma, theirs["blocks.1.ls2.gamma"])
    text = refusal(FLSLViT(**dinov2), str(tmp_path / "a.pth"))
    assert "layer_scale_init=1.0" in text
    assert "layer_scale_init=None" in text
    torch.save(LAYOUTS["MAE"][0]().content, tmp_path / "b.pth")
    model = Detector(layer_scale_init=0.1, **OF_LAYOUTS)
    assert "layer_scale_init=0.1" in refusal(model, str(tmp_path / "b.pth"))


def test_the_heads_of_moco_v3_are_compared(tmp_path):
    torch.save(LAYOUTS["MoCo v3"][0]().content, tmp_path / "a.pth")
    model = Detector(embed_dim=384, depth=1, num_heads=6)
    assert "num_heads=12" in refusal(model, str(tmp_path / "a.pth"))


def test_an_encoder_file_of_before_prefix_tokens_loads(encoder, tmp_path):
    path = save_encoder(encoder, tmp_path / "a.pth")
    content = torch.load(path, weights_only=True)
    for key in ("num_prefix_tokens", "layer_scale_init", "position_antialias"):
        del content["encoder"][key]
    torch.save(content, path)
    model = Detector()
    FLSLCheckpointer(model).load(path)
    assert same(encoder, model.backbone.net)
    assert same(encoder, build_encoder(path))


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_an_evaluation_takes_whole_detectors_alone(tmp_path, wrapper):
    model, other = randomised(Detector()), Detector()
    state = {f"{wrapper}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    checkpointer = FLSLCheckpointer(other)
    checkpointer.require_whole = True
    checkpointer.load(str(tmp_path / "a.pth"))
    assert same(model, other)
    for changed in ({}, {f"{wrapper}head.bias": torch.ones(7)}):
        partial = {name: t for name, t in state.items() if not name.endswith("head.bias")}
        torch.save({"model": partial | changed}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=r"missing or of another shape are head\.bias"):
            checkpointer.load(str(tmp_path / "a.pth"))
        FLSLCheckpointer(other).load(str(tmp_path / "a.pth"))  # training may start from a part


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "ema_model.module."])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", None])
def test_whole_detectors_of_other_frameworks_load(tmp_path, prefix, key):
    model, other = randomised(Detector()), Detector()
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "a.pth")
    checkpointer = FLSLCheckpointer(other)
    checkpointer.require_whole = True
    checkpointer.load(str(tmp_path / "a.pth"))
    assert same(model, other)


def test_one_of_two_detectors_in_a_file_is_taken(tmp_path):
    model, averaged, other = randomised(Detector()), randomised(Detector()), Detector()
    content = {"model": model.state_dict(), "model_ema": averaged.state_dict()}
    torch.save(content, tmp_path / "a.pth")
    FLSLCheckpointer(other).load(f"{tmp_path / 'a.pth'}?which=model_ema")
    assert same(averaged, other)
    FLSLCheckpointer(other).load(str(tmp_path / "a.pth"))
    assert same(model, other)
    assert "hold no set of this model's" in refusal(other, f"{tmp_path / 'a.pth'}?which=teacher")


def test_a_detector_whose_training_diverged_is_refused(tmp_path):
    state = randomised(Detector()).state_dict()
    state["head.bias"] = state["head.bias"] * float("nan")
    torch.save({"model": state}, tmp_path / "a.pth")
    assert "infinite values or NaN in head.bias" in refusal(Detector(), str(tmp_path / "a.pth"))


def test_another_set_of_weights_is_taken_into_a_detector(encoder, tmp_path, caplog):
    other = randomised(FLSLViT(**SMALL))
    content = {"model": encoder.state_dict(), "model_ema": other.state_dict()}
    torch.save(content, tmp_path / "a.pth")
    model = Detector()
    with caplog.at_level(logging.INFO):
        FLSLCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert same(encoder, model.backbone.net)
    assert "the file also holds model_ema (?which=NAME takes one)" in caplog.text
    FLSLCheckpointer(model).load(f"{tmp_path / 'a.pth'}?which=model_ema")
    assert same(other, model.backbone.net)
