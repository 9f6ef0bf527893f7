"""All recipes, and each as it is loaded, which takes a tenth of a second and more."""

from functools import cache

from omegaconf import DictConfig

from flsl_d2.engine.config_files import CONFIGS_FOLDER, load_lazy_config

FLSL = "pretrain/flsl_vit_small_p16_in1k.py"
ONE_X = "coco/mask_rcnn_flsl_vit_s16_1x.py"
LONG = "coco/mask_rcnn_flsl_vit_s16_100ep.py"
YAML = "coco/mask_rcnn_flsl_vit_s16_1x.yaml"
TEXTS = {
    str(path.relative_to(CONFIGS_FOLDER)): path.read_text()
    for path in sorted(CONFIGS_FOLDER.rglob("*.py"))
    if "common" not in path.parts
}
PRETRAINING = [name for name, text in TEXTS.items() if "tools/pretrain_net" in text]
DETECTION = [name for name in TEXTS if name not in PRETRAINING]
SEMANTIC = [name for name in DETECTION if "semantic" in name]


@cache
def recipe(name: str) -> DictConfig:
    """Return a recipe, which nobody may change."""
    return load_lazy_config(name)
