"""Defaults of the method: the same in the classes, the root recipe and the documentation."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.modeling import VIT_SIZES

ROOT = Path(__file__).parents[2]
RECIPE = "configs/pretrain/flsl_vit_small_p16_in1k.py"
# The encoder is built without stochastic depth elsewhere, so only the recipe has it.
RECIPE_ALONE = {"model.backbone.drop_path_rate"}
KEY = re.compile(r"^\| `([\w.]+)` \| `?([^|`]+)`? \|", re.MULTILINE)
# Keys that change speed and memory; docs/PERFORMANCE.md has them.
NOT_THE_METHOD = {
    *("views.on_device", "views.reduced_decoding", "model.pack_views"),
    *("model.backbone.use_act_checkpoint", "train.compile"),
}


@pytest.fixture(scope="module")
def recipe() -> DictConfig:
    return load_lazy_config(RECIPE, [])


def plain(value: Any) -> Any:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return tuple(value) if isinstance(value, list) else value


def nodes(node: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    for key in node:
        if OmegaConf.is_interpolation(node, key) or not isinstance(node[key], DictConfig):
            continue
        below = f"{path}.{key}" if path else str(key)
        if "_target_" in node[key]:
            yield below, node[key]
        yield from nodes(node[key], below)


def test_the_recipe_has_the_defaults_of_the_classes(recipe):
    compared = 0
    for path, node in nodes(recipe):
        target = node._target_
        target = locate(target) if isinstance(target, str) else target
        for name, parameter in inspect.signature(target).parameters.items():
            key = f"{path}.{name}"
            if name not in node or isinstance(node[name], DictConfig) or key in RECIPE_ALONE:
                continue
            if parameter.default is not inspect.Parameter.empty:
                assert plain(node[name]) == parameter.default, key
                compared += 1
    assert compared > 40


def test_the_documentation_has_the_defaults_of_the_recipe(recipe):
    written = dict(KEY.findall((ROOT / "docs" / "METHOD.md").read_text()))
    for key, value in written.items():
        assert ast.literal_eval(value.strip()) == plain(OmegaConf.select(recipe, key)), key
    method = {
        f"{path}.{key}"
        for path, node in nodes(recipe)
        for key in node
        if key != "_target_"
        and not OmegaConf.is_interpolation(node, key)
        and not isinstance(node[key], DictConfig)
    }
    sizes = {f"model.backbone.{name}" for name in ("patch_size", *VIT_SIZES["small"])}
    assert method - NOT_THE_METHOD - sizes <= written.keys()


def test_recipes_have_the_sizes_of_the_table():
    for size, expected in VIT_SIZES.items():
        cfg = load_lazy_config(f"configs/pretrain/flsl_vit_{size}_p16_in1k.py", [])
        assert {name: cfg.model.backbone[name] for name in expected} == expected
