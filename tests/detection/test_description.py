"""Texts of users in generated configs, and plain descriptions of detectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.config import instantiate
from omegaconf import OmegaConf

from flsl_d2.detection.finetune_plan import config_text
from flsl_d2.detection.model_folder import MODEL_FILE, read_description, write_description
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.model_zoo import get_config
from tests.hostile import HOSTILE, SURROGATES

RECIPE = "coco/mask_rcnn_flsl_vit_s16_1x.py"


def test_no_text_of_a_user_is_code_in_a_generated_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [*HOSTILE, *SURROGATES]
    nested = {f"key {i}": {"text": text} for i, text in enumerate(texts)}
    settings = [(f"train.t{i}", text, "") for i, text in enumerate(texts)]
    text = config_text(RECIPE, [*settings, ("train.nested", nested, "in a tree")])
    Path("a.py").write_text(text, encoding="utf-8")
    cfg = load_lazy_config("a.py")
    assert [cfg.train[f"t{i}"] for i in range(len(texts))] == texts
    assert [cfg.train.nested[f"key {i}"].text for i in range(len(texts))] == texts
    assert not Path("ran.txt").exists()


@pytest.mark.parametrize("recipe", ["mask_rcnn", "faster_rcnn", "retinanet"])
def test_a_detector_is_built_from_its_description(tmp_path, recipe):
    cfg = get_config(f"coco/{recipe}_flsl_vit_s16_1x.py")
    cfg.model.backbone.net.update(depth=1, embed_dim=32, num_heads=1, window_size=0)
    write_description(cfg, tmp_path)
    read = read_description(tmp_path)
    built, original = instantiate(read.model), instantiate(cfg.model)
    assert str(built) == str(original)
    (resize,) = instantiate(read.dataloader.test.mapper.augmentations)
    assert resize.max_size == 1333
    assert OmegaConf.to_container(read.model)["input_format"] == cfg.model.input_format


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "detectron2.modeling.poolers.torch.load",
        "detectron2.utils.env._import_file",
        "detectron2.modeling.build_model",
        "flsl_d2.modeling.timm_backbone.timm.create_model",
        "detectron2.modeling.none",
        "detectron2.modeling",
        "flsl_d2.detection.lvis.json.load",
        *HOSTILE,
    ],
)
def test_a_description_names_models_only(tmp_path, name):
    write_description(get_config(RECIPE), tmp_path)
    content = json.loads((tmp_path / MODEL_FILE).read_text())
    content["model"]["backbone"]["net"] = {"_target_": name}
    (tmp_path / MODEL_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model\.json"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"model": 1, "augmentations": []}', '{"model": ' + "[" * 9999,
             '{"model": {"_target_": "detectron2.layers.ShapeSpec", "a": "${oc.env:HOME}"}}']
)  # fmt: skip
def test_other_contents_are_one_sentence(tmp_path, text):
    (tmp_path / MODEL_FILE).write_text(text)
    with pytest.raises(InputError, match=r"model\.json"):
        read_description(tmp_path)


def test_a_config_with_code_of_its_own_leaves_no_description(tmp_path):
    cfg = get_config(RECIPE)
    write_description(cfg, tmp_path)
    cfg.model.backbone.net = {"_target_": "os.getcwd"}
    write_description(cfg, tmp_path)
    assert not (tmp_path / MODEL_FILE).exists()
