"""The recipes by name: ``model_zoo.get_config("coco/mask_rcnn_flsl_vit_s16_1x.py")``.

Works from a checkout, whose ``configs/`` folder it reads, and from an installed wheel, which
carries a copy.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from detectron2.config import CfgNode
from omegaconf import DictConfig

from flsl_d2.engine.config_files import CONFIGS_FOLDER, load_config
from flsl_d2.errors import InputError

__all__ = ["configs_folder", "get_config", "get_config_file"]


def configs_folder() -> Path:
    """The folder of all recipes."""
    return CONFIGS_FOLDER


def get_config_file(name: str) -> str:
    """Path of a recipe.

    Args:
        name: relative to the ``configs`` folder, e.g. ``coco/mask_rcnn_flsl_vit_s16_1x.py``.

    Raises:
        InputError: no such recipe; the closest ones are named.
    """
    folder = configs_folder()
    path = folder / name
    if path.is_file():
        return str(path)
    known = [
        str(p.relative_to(folder))
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".py", ".yaml")
    ]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}."
    raise InputError(f"there is no recipe '{name}'{hint}")


def get_config(name: str) -> DictConfig | CfgNode:
    """Load a recipe: a LazyConfig, or for ``.yaml`` a CfgNode with this project's nodes.

    Args:
        name: see :func:`get_config_file`. Recipes below ``pretrain/`` need the checkout, because
            the package ``pretrain`` is not part of a wheel.
    """
    return load_config(get_config_file(name))
