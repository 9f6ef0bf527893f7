"""Exports: equal to their source in other programs, with a card, whole or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
import timm
import torch
from detectron2.config import LazyConfig, instantiate
from hostile import HOSTILE, SURROGATES

from flsl_d2.detection.model_folder import write_description
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.export import formats
from flsl_d2.export.__main__ import export_model, main
from flsl_d2.export.card import card_text, licence_of
from flsl_d2.export.graphs import EncoderGraph, largest_difference, onnx_runner
from flsl_d2.modeling import FLSLViT, InputFormat
from flsl_d2.modeling.positions import _bicubic_by_matrices, resample_positions
from flsl_d2.weights import write_encoder

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """File of an encoder whose positions are far from a smooth table."""
    torch.manual_seed(0)
    model = FLSLViT(**SMALL, num_prefix_tokens=1)
    torch.nn.init.normal_(model.pos_embed)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    write_encoder(model, path)
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """Folder of a Mask R-CNN that reports a few objects in anything."""
    folder = tmp_path_factory.mktemp("detector")
    cfg = load_lazy_config("demo/mask_rcnn_flsl_vit_scenes.py")
    cfg.model.backbone.net.depth = 1
    cfg.model.proposal_generator.update(pre_nms_topk=(40, 30), post_nms_topk=(40, 20))
    cfg.model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=10)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    write_description(cfg, folder)
    kept = [{"id": i + 1, "name": f"class {i}"} for i in range(6)]
    (folder / "classes.json").write_text(json.dumps({"version": "0", "categories": kept}))
    settings = {"train.init_checkpoint": "start.pth", "dataloader.train.dataset.names": "scenes"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "metrics.json").write_text('{"iteration": 9, "bbox/AP": 12.5}\n{"iterat')
    return folder


@pytest.mark.parametrize("grid", [(5, 5), (7, 3), (5, 9), (1, 1), (20, 31)])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_in_graphs_are_those_of_interpolate(grid, offset):
    """Sums of 16 products of standard normal numbers in float32: 1e-5 is rounding."""
    table = torch.randn(1, 25, 8)
    got = _bicubic_by_matrices(table.view(1, 5, 5, 8), grid, offset)
    wanted = resample_positions(table, grid, offset)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_an_encoder_in_onnx_takes_any_size_and_batch(encoder, tmp_path, run_main):
    target = tmp_path / "encoder.onnx"
    arguments = ["--model", str(encoder), "--format", "onnx", "--output", str(target)]
    status, printed, error = run_main(main, *arguments)
    assert status == 0, error
    assert "of the source in onnxruntime (3 images, 64x64 and 64x96 pixels)" in printed
    facts = {p.key: p.value for p in onnx.load(str(target)).metadata_props}
    assert "multiples of 16 pixels" in facts["input"]
    assert json.loads(facts["architecture"])["embed_dim"] == 32
    run, graph = onnx_runner(str(target)), EncoderGraph(torch_encoder(encoder))
    pixels = torch.rand(3, 3, 32, 128) * 255
    assert largest_difference(graph, run, [pixels])[0] < 1e-4
    card = (tmp_path / "encoder.onnx.md").read_text()
    assert "| licence | unknown |" in card
    assert len(card) < 5000
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert scope["features"].shape == (2, 32, 4, 4)
    assert json.loads((tmp_path / "encoder.onnx.json").read_text())["sha256"]["encoder.onnx"]


def torch_encoder(path: Path) -> FLSLViT:
    return formats.build_encoder(str(path)).eval()


@pytest.mark.parametrize(
    ("file_format", "name"),
    [("torch", "a.pt2"), ("timm", "a.safetensors"), ("safetensors", "a.safetensors")],
)
def test_other_formats_of_an_encoder_are_checked(file_format, name, encoder, tmp_path, capsys):
    export_model(str(encoder), file_format, tmp_path / name)
    assert "within" in capsys.readouterr().out
    scope: dict = {}
    exec((tmp_path / f"{name}.md").read_text().split("```python\n")[1].split("```")[0], scope)
    assert (scope.get("tokens", scope.get("features"))).shape[-1] in (4, 32)
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.md", f"{name}.json"}


def test_a_hugging_face_folder_is_a_timm_model(encoder, tmp_path):
    export_model(str(encoder), "huggingface", tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert model.pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert (tmp_path / "hub" / "README.md").is_file()
    with pytest.raises(InputError, match="folder with files"):
        export_model(str(encoder), "huggingface", tmp_path / "hub")


def test_a_whole_detector_in_onnx(detector, tmp_path, capsys):
    target = tmp_path / "detector.onnx"
    export_model(str(detector), "onnx", target)
    assert "in onnxruntime (20 objects, 192x256 and 224x208 pixels)" in capsys.readouterr().out
    model = onnx.load(str(target))
    assert [out.name for out in model.graph.output] == ["boxes", "scores", "classes", "masks"]
    facts = {p.key: p.value for p in model.metadata_props}
    assert json.loads(facts["classes"])[3] == "class 3"
    boxes, scores, classes, masks = onnx_runner(str(target))(torch.rand(3, 75, 130) * 255)
    assert boxes.shape == (10, 4)
    assert masks.shape == (10, 28, 28)
    assert boxes[:, 2].max() <= 130
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert classes.max() < 6
    card = json.loads((tmp_path / "detector.onnx.json").read_text())
    assert card["figures"] == {"iteration": 9, "bbox/AP": 12.5}
    assert card["initial_weights"] == {"file": "start.pth", "licence": "unknown"}
    assert card["data"] == {"dataloader.train.dataset.names": "scenes"}


@pytest.mark.parametrize(
    ("recipe", "outputs", "changes"),
    [
        (
            "coco/retinanet_flsl_vit_s16_1x.py",
            ["boxes", "scores", "classes"],
            {"test_score_thresh": 0.0, "test_topk_candidates": 50, "max_detections_per_image": 20},
        ),
        ("coco/semantic_fpn_flsl_vit_s16_stuff_1x.py", ["logits"], {}),
    ],
)
def test_other_models_of_the_recipes_in_onnx(recipe, outputs, changes, tmp_path, capsys):
    cfg = load_lazy_config(recipe)
    cfg.model.backbone.net.update(depth=1, embed_dim=32, num_heads=2, window_size=0)
    cfg.model.update(changes)
    torch.manual_seed(0)
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "model_final.pth")
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    write_description(cfg, tmp_path)
    target = tmp_path / "model.onnx"
    export_model(str(tmp_path), "onnx", target)
    assert "192x256 and 224x208 pixels" in capsys.readouterr().out
    assert [out.name for out in onnx.load(str(target)).graph.output] == outputs
    found = onnx_runner(str(target))(torch.rand(3, 75, 130) * 255)
    if outputs == ["logits"]:
        assert found[0].shape[1:] == (75, 130)
    else:
        assert found[0].shape == (20, 4)
    card = json.loads((tmp_path / "model.onnx.json").read_text())
    assert card["kind"] == ("segmenter" if outputs == ["logits"] else "detector")


def test_an_encoder_of_four_channels_is_normalised_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    encoder = FLSLViT(**SMALL, in_chans=4).eval()
    mean, std = (1000.0, 2000.0, 500.0, 0.0), (300.0, 400.0, 100.0, 1.0)
    encoder.input_format = InputFormat(4, 16, mean, std, stated=True)
    write_encoder(encoder, tmp_path / "teacher_backbone.pth")
    export_model(str(tmp_path), "onnx", tmp_path / "a.onnx")
    pixels = torch.rand(1, 4, 64, 64) * 1000
    normal = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        (wanted,) = encoder(normal).values()
    (found,) = onnx_runner(str(tmp_path / "a.onnx"))(pixels)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert "stored values" in (tmp_path / "a.onnx.md").read_text()


def test_a_detectors_encoder_and_its_tensors(detector, tmp_path):
    export_model(str(detector), "safetensors", tmp_path / "whole.safetensors")
    export_model(str(detector), "timm", tmp_path / "encoder.pth", part="encoder")
    card = json.loads((tmp_path / "encoder.pth.json").read_text())
    assert card["kind"] == "encoder"


@pytest.mark.parametrize(
    ("file_format", "name", "words"),
    [
        ("timm", "a.pth", "is a format of encoders"),
        ("huggingface", "a", "is a format of encoders"),
        ("onnx", "a.pth", "does not end as onnx files do"),
    ],
)
def test_formats_that_a_detector_cannot_have(file_format, name, words, detector, tmp_path):
    with pytest.raises(InputError, match=words):
        export_model(str(detector), file_format, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_differs(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TOLERANCE", -1.0)
    with pytest.raises(InputError, match="so nothing was written"):
        export_model(str(encoder), "safetensors", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "licence"),
    [
        ("DINO checkpoint", "unknown"),
        ("MAE with its decoder", "CC BY-NC 4.0 (facebookresearch/mae)"),
        ("timm", "unknown"),
    ],
)
def test_licences_follow_the_layout(layout, licence):
    assert licence_of(layout) == licence


@pytest.mark.parametrize("text", [*HOSTILE, *SURROGATES])
def test_texts_of_users_in_cards_and_in_onnx(text, tmp_path):
    facts = {"name": text, "classes": [text], "data": {text: text}}
    card = card_text(facts)
    lines = card.splitlines()
    assert len(lines) == 12
    assert all(line.startswith(("#", "|")) or not line for line in lines)
    assert not re.search(r"(?<!\\)[<`*]", card)
    target = tmp_path / "a.onnx"
    formats.add_metadata(
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), facts, target
    )
    found = {p.key: p.value for p in onnx.load(str(target)).metadata_props}
    assert json.loads(found["classes"]) == [text]
