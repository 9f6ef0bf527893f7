"""A plain description of a detector, which builds it without running any code of its folder.

A LazyConfig, and ``config.yaml`` that Detectron2 saves of it, may name any function. The file
``model.json`` holds numbers, texts and lists alone, and names of classes of Detectron2's and of
this project's models, which are compared with what the packages define before one is called.
"""

from __future__ import annotations

import inspect
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf

import flsl_d2
from flsl_d2.errors import InputError
from flsl_d2.files import write_text

MODEL_FILE = "model.json"
_PACKAGES = (
    "detectron2.data.transforms.",
    "detectron2.layers.",
    "detectron2.modeling.",
    "flsl_d2.modeling.",
)
_FUNCTIONS = (
    "flsl_d2.detection.lvis.federated_loss_weights",
    "flsl_d2.modeling.timm_backbone.build_timm_backbone",
    "flsl_d2.modeling.timm_backbone.timm_pyramid",
)
_AUGMENTATIONS = "dataloader.test.mapper.augmentations"
_MAX_DEPTH = 40

logger = logging.getLogger(__name__)


def write_description(cfg: DictConfig, folder: str | Path) -> None:
    """Write ``model.json`` of a LazyConfig's detector; log a line where it cannot be described."""
    try:
        augmentations = _content(cfg, _AUGMENTATIONS)
        if augmentations is None:  # a detector on pictures of another size finds something else
            raise InputError(f"the config has no {_AUGMENTATIONS}")
        content = {
            "version": flsl_d2.__version__,
            "model": _plain(_content(cfg, "model")),
            "augmentations": [_plain(each) for each in augmentations],
        }
    except InputError as error:
        Path(folder, MODEL_FILE).unlink(missing_ok=True)
        logger.info("No %s: %s", MODEL_FILE, error)
        return
    write_text(Path(folder, MODEL_FILE), json.dumps(content, indent=1))


def read_description(folder: str | Path) -> DictConfig:
    """Read ``model.json`` of a folder, and check that it names nothing but known models.

    The config has ``version``, ``model`` and ``dataloader.test.mapper.augmentations``, and may be
    instantiated.
    """
    file = Path(folder, MODEL_FILE)
    try:
        content = json.loads(file.read_text("utf-8-sig"))
        model, augmentations = _plain(content["model"]), _plain(content["augmentations"])
        if not isinstance(model, dict) or "_target_" not in model:
            raise InputError("it holds no model")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"'{file}' does not describe a detector ({error}); restore it, or name a config file "
            "that you trust with --weights."
        ) from error
    cfg = OmegaConf.create({"version": str(content.get("version", "")), "model": model})
    OmegaConf.update(cfg, _AUGMENTATIONS, augmentations)
    return cfg


def _content(cfg: DictConfig, key: str) -> Any:
    node = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _plain(value: Any, depth: int = 0) -> Any:
    """Copy a tree of plain values, each class as its checked name."""
    if depth > _MAX_DEPTH:
        raise InputError("it is nested too deeply")
    if isinstance(value, dict):
        return {
            str(k): _target_name(each) if k == "_target_" else _plain(each, depth + 1)
            for k, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(each, depth + 1) for each in value]
    if isinstance(value, str) and "${" in value:
        raise InputError(f"{value!r} is no plain text")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"{type(value).__name__} is no plain value")


def _target_name(target: Any) -> str:
    """Return the full name of a class of models, or of a known function."""
    name = target if isinstance(target, str) else _convert_target_to_string(target)
    if name.startswith(("detectron2.", "flsl_d2.")) and "__" not in name:
        found = None
        with suppress(Exception):  # whatever importing a name that does not exist raises
            found = locate(name)
        full = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        if full in _FUNCTIONS or (inspect.isclass(found) and full.startswith(_PACKAGES)):
            return full
    raise InputError(f"{name!r} is no part of a model of Detectron2 or flsl-d2")
