"""The recipes by name, and the encoders that were trained by them.

``model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_1x.py")`` reads the checkout's ``configs``
folder, of which an installed wheel carries a copy.
"""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from omegaconf import DictConfig

from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import (
    CONFIGS_FOLDER,
    is_yaml,
    load_lazy_config,
    resolve_config_path,
)
from flsl_d2.errors import InputError
from flsl_d2.weights.reading import SHIPPED_PREFIX, shipped_encoders

__all__ = ["configs_folder", "get_checkpoint_url", "get_config", "get_config_file"]


def configs_folder() -> Path:
    """Return the folder of all recipes."""
    return CONFIGS_FOLDER


def get_config_file(name: str) -> str:
    """Find the file of a recipe such as ``coco/mask_rcnn_flsl_vit_s16_1x.py``."""
    return resolve_config_path(str(CONFIGS_FOLDER / name))


def get_config(name: str) -> DictConfig | CfgNode:
    """Load a recipe: a LazyConfig, or for ``.yaml`` a CfgNode with this project's nodes."""
    path = get_config_file(name)
    return load_yaml_config(path) if is_yaml(path) else load_lazy_config(path)


def get_checkpoint_url(name: str) -> str:
    """Find the encoder that the package ships for a recipe, like Detectron2's function.

    The address is for ``train.init_checkpoint``, ``MODEL.WEIGHTS``, ``--weights`` and
    :func:`flsl_d2.weights.build_encoder`.
    """
    address = f"{SHIPPED_PREFIX}{Path(name).stem}.safetensors"
    if address not in shipped_encoders():
        raise InputError(
            f"there are no weights of {name!r}; the package ships {', '.join(shipped_encoders())}."
        )
    return address
