"""YAML configs of detectors: loading, and what they say about a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from flsl_d2.annotations.mapper import FLSLDatasetMapper
from flsl_d2.detection.checks import CheckedMapper
from flsl_d2.detection.coco_evaluator import FLSLCOCOEvaluator
from flsl_d2.detection.setup import Detection
from flsl_d2.detection.solver import add_solver_config, build_yaml_optimizer
from flsl_d2.engine.config_files import resolve_config_path, unknown_keys_error
from flsl_d2.errors import InputError
from flsl_d2.files import expand_home
from flsl_d2.modeling import add_flsl_config

# The node that holds the number of classes of an architecture.
_CLASSES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "SemanticSegmentor": "SEM_SEG_HEAD",
}
# Exceptions of yacs for files and values that it cannot take.
_YAML_ERRORS = (
    *(AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError),
)


def load_yaml_config(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Load a YAML config over Detectron2's defaults and this project's nodes.

    Tags that run code are refused; ``overrides`` are ``[KEY, VALUE, KEY, VALUE, ...]``.

    Raises:
        InputError: a missing or broken file, an unknown key, or a value of another type than the
            one it replaces.
    """
    path = resolve_config_path(path)
    cfg = get_cfg()
    add_flsl_config(cfg)
    add_solver_config(cfg)
    cfg.TRAIN = CfgNode({"TRACKERS": []})  # train.trackers of a LazyConfig
    odd = next((key for key in overrides[::2] if "=" in key), None)
    if odd is not None or len(overrides) % 2:
        raise InputError(
            f"overrides of a YAML config are pairs KEY VALUE, but {odd or overrides[-1]!r} is not "
            "followed by a value; write for example SOLVER.MAX_ITER 100."
        )
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
        cfg.merge_from_list([expand_home(text) for text in overrides])
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split()).strip("\"'")
        unknown = re.search(r"Non-existent (?:config )?key: ([\w.]+)", reason)
        if unknown:
            raise unknown_keys_error([unknown[1]], list(_key_paths(cfg)), f" ({path})") from error
        raise InputError(
            f"config file {path!r} with its overrides cannot be used: {reason}; correct it."
        ) from error
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = expand_home(cfg.MODEL.WEIGHTS), expand_home(cfg.OUTPUT_DIR)
    return cfg


def _key_paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _key_paths(value, f"{prefix}{key}.")


def yaml_detection(cfg: CfgNode) -> Detection:
    """Read a run's description from a YAML config."""
    for key, used in (
        ("TEST.EXPECTED_RESULTS", cfg.TEST.EXPECTED_RESULTS),
        ("TEST.PRECISE_BN.ENABLED", cfg.TEST.PRECISE_BN.ENABLED),
    ):
        if used:
            raise InputError(f"{key} is {used}, which is not supported here; leave it out.")
    kept, cfg = cfg, DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    node = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE)

    def mapper(is_train: bool) -> CheckedMapper:
        return CheckedMapper(FLSLDatasetMapper(cfg, is_train=is_train))

    def test_set(name: str) -> tuple[DataLoader[Any], DatasetEvaluator]:
        own = [name] if len(cfg.DATASETS.TEST) > 1 else []
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", *own)
        loader = build_detection_test_loader(cfg, name, mapper=mapper(False))
        return loader, FLSLCOCOEvaluator(name, output_dir=folder)

    return Detection(
        cfg=kept,
        keys={
            "output": "OUTPUT_DIR",
            "weights": "MODEL.WEIGHTS ",
            "batch": "SOLVER.IMS_PER_BATCH",
            "classes": f"MODEL.{node}.NUM_CLASSES ",
            "masks_off": "MODEL.MASK_ON False" if cfg.MODEL.MASK_ON else "",
        },
        output_dir=cfg.OUTPUT_DIR,
        seed=cfg.SEED,
        device=cfg.MODEL.DEVICE,
        weights=cfg.MODEL.WEIGHTS,
        train_names=cfg.DATASETS.TRAIN,
        image_format=cfg.INPUT.FORMAT,
        test_names=cfg.DATASETS.TEST,
        num_classes=cfg.MODEL[node].NUM_CLASSES if node else None,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        max_iter=cfg.SOLVER.MAX_ITER,
        eval_period=cfg.TEST.EVAL_PERIOD,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        trackers=cfg.TRAIN.TRACKERS,
        precision=torch.float16 if cfg.SOLVER.AMP.ENABLED else None,
        build_model=lambda: build_model(cfg),
        build_optimizer=lambda model: build_yaml_optimizer(cfg, model),
        build_scheduler=lambda optimizer: build_lr_scheduler(cfg, optimizer),
        build_train_loader=lambda: build_detection_train_loader(cfg, mapper=mapper(True)),
        build_test_set=test_set,
    )
