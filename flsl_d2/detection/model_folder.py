"""The detector of a training run's folder, or of a config: its model, weights and classes.

A LazyConfig, and the ``config.yaml`` that Detectron2 saves of it, may run any code. So a folder's
detector is built from its ``model.json`` or from a YAML config of registry names, which hold names
and numbers alone, unless the user trusts its config.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

import flsl_d2
from flsl_d2.detection.checks import names_of
from flsl_d2.detection.setup import read_kept_classes
from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.weights import build_encoder
from flsl_d2.weights.checkpointer import BEST_WEIGHTS

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


_TO_FINE_TUNE = (
    "is an encoder and no detector; fine-tune it with tools/finetune.py --weights FILE "
    "--annotations FILE --images FOLDER, and give its output folder."
)


def find_config(model: str | Path, trust_config: bool) -> DictConfig | CfgNode:
    """Read the description of a detector from a run's folder or a config file, which is run.

    ``trust_config`` allows to run the LazyConfig of a folder without ``model.json``.
    """
    place = Path(model).expanduser()
    if place.is_dir():
        return _folder_config(place, trust_config)
    if place.is_file() and place.suffix not in (".py", ".yaml", ".yml"):
        try:
            build_encoder(str(place))
        except InputError:
            raise InputError(
                f"'{model}' is no folder of a run and no config file; weights of a detector are "
                "given by --weights beside the config or the folder that they belong to."
            ) from None
        raise InputError(f"'{model}' {_TO_FINE_TUNE}")
    return load_yaml_config(str(model)) if is_yaml(str(model)) else load_lazy_config(str(model))


def _folder_config(folder: Path, trust_config: bool) -> DictConfig | CfgNode:
    file = folder / "config.yaml"
    encoders = sorted(folder.glob("teacher_backbone*"))
    if encoders:
        raise InputError(f"'{folder}' is a run of pre-training: '{encoders[0]}' {_TO_FINE_TUNE}")
    if (folder / MODEL_FILE).is_file() and not trust_config:
        return read_description(folder)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        if "\nMODEL:" in f"\n{text}":
            return load_yaml_config(str(file))
        if not trust_config:
            raise InputError(
                f"'{folder}' has no {MODEL_FILE}, and its config.yaml may run any code; where you "
                "made the folder yourself, or trust its maker, give --trust-config "
                "(trust_config=True)."
            )
        cfg = LazyConfig.load(str(file))
    except FileNotFoundError as error:
        raise InputError(
            f"'{folder}' holds no {MODEL_FILE} and no config.yaml, so it is no output folder of "
            "tools/finetune.py or tools/train_net.py; name one, or a config file with --weights."
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"'{file}' cannot be read ({error}); restore it.") from error
    if not isinstance(cfg, DictConfig) or "dataloader" not in cfg or "model" not in cfg:
        raise InputError(f"'{file}' describes no detector; name the folder of a training run.")
    return cfg


def find_weights(folder: Path | None, cfg: DictConfig | CfgNode) -> str:
    """Return the best weights of a folder, or those that a config names."""
    if folder is None:
        named = cfg.MODEL.WEIGHTS if isinstance(cfg, CfgNode) else cfg.train.init_checkpoint
        if not named:
            raise InputError("a config alone has no detector weights; give them with --weights.")
        return str(named)
    candidates = [folder / BEST_WEIGHTS, folder / "model_final.pth"]
    last = folder / "last_checkpoint"
    if last.is_file():
        candidates.append(folder / last.read_text().strip())
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise InputError(f"'{folder}' holds no checkpoint yet; train first, or give --weights.")
    return str(found)


def build_detector(cfg: DictConfig | CfgNode, device: str) -> nn.Module:
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        return build_model(cfg)
    return instantiate(cfg.model).to(device)


def preprocessing(cfg: DictConfig | CfgNode, short_side: int) -> tuple[str, T.AugmentationList]:
    """Channel order of the model's input, and the resizing of its test data."""
    own = T.ResizeShortestEdge([short_side] * 2, math.ceil(short_side * 1333 / 800))
    if isinstance(cfg, CfgNode):
        order = cfg.INPUT.FORMAT
        resize = [T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)]
    else:
        order = OmegaConf.select(cfg, "model.input_format", default="BGR")
        resize = list(instantiate(cfg.dataloader.test.mapper.augmentations))
    return order, T.AugmentationList([own] if short_side else resize)


def find_classes(
    folder: Path | None, cfg: DictConfig | CfgNode
) -> tuple[list[str], list[int], str]:
    """Names and ids of the classes and the version that a run kept; else of its data set."""
    if folder is not None and (kept := read_kept_classes(folder)) is not None:
        return kept
    if isinstance(cfg, CfgNode):
        given: Any = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
    else:
        keys = (f"dataloader.{split}.dataset.names" for split in ("test", "train"))
        given = next(filter(None, (OmegaConf.select(cfg, key) for key in keys)), [])
    first = next(iter(names_of(given)), "")
    metadata: Any = MetadataCatalog.get(first) if first else {}
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    return list(metadata.get("thing_classes", [])), sorted(ids, key=ids.__getitem__), ""
