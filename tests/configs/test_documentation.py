"""The guides say what the recipes and the engine have."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from flsl_d2.detection.yaml import load_yaml_config
from flsl_d2.engine.config_files import CONFIGS_FOLDER, load_lazy_config
from flsl_d2.engine.run_folder import DETECTION_KEYS, PRETRAINING_KEYS, flat_config
from pretrain.schedules import set_run_length

PRETRAINING = "pretrain/flsl_vit_small_p16_in1k.py"
DETECTION = "coco/mask_rcnn_flsl_vit_s16_1x.py"
YAML = "coco/mask_rcnn_flsl_vit_s16_1x.yaml"

TEXT = (CONFIGS_FOLDER.parent / "docs" / "CONFIGS.md").read_text()


def test_all_recipes_are_listed_and_all_listed_are_there():
    recipes = {
        str(path.relative_to(CONFIGS_FOLDER))
        for path in CONFIGS_FOLDER.rglob("*.py")
        if "common" not in path.parts
    }
    tables = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
    listed = {
        name if "/" in name else f"pretrain/{name}"
        for name in re.findall(r"`([\w/]+\.py)`", tables)
    }
    assert listed == recipes


def test_the_keys_that_may_differ_are_those_of_the_engine():
    text = (CONFIGS_FOLDER.parent / "docs" / "RUNS.md").read_text()
    table = text.partition("**Keys that may differ**")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    for neutral, columns in ((PRETRAINING_KEYS, [1]), (DETECTION_KEYS, [2, 3])):
        listed = {key for row in rows for i in columns for key in re.findall(r"`([^`]+)`", row[i])}
        assert listed == {*neutral.no_effect, *neutral.on_resume}
        first = {key for i in columns for key in re.findall(r"`([^`]+)`", rows[0][i])}
        assert first == set(neutral.no_effect)


def test_every_key_that_may_differ_is_a_key_of_a_recipe():
    pretraining = flat_config(_with_length(load_lazy_config(PRETRAINING)))
    detection = flat_config(load_lazy_config(DETECTION)) | flat_config(load_yaml_config(YAML))
    for neutral, keys in ((PRETRAINING_KEYS, pretraining), (DETECTION_KEYS, detection)):
        for pattern in (*neutral.no_effect, *neutral.on_resume):
            assert any(fnmatchcase(key, pattern) for key in keys), pattern


def _with_length(cfg):
    set_run_length(cfg, 1000)
    return cfg
