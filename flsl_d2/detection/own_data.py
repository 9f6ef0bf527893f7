"""Training and evaluating on files in COCO format that the command line names."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from flsl_d2.data.coco_file import category_names
from flsl_d2.data.datasets import register_files
from flsl_d2.errors import InputError

__all__ = [
    "add_own_data_config",
    "num_classes_key",
    "num_classes_yaml",
    "use_own_data",
    "use_own_data_yaml",
]

logger = logging.getLogger(__name__)

# Where an architecture's config has its number of classes.
_LAZY_KEYS = ("model.roi_heads.num_classes", "model.sem_seg_head.num_classes", "model.num_classes")
_YAML_NODES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "SemanticSegmentor": "SEM_SEG_HEAD",
}


def num_classes_key(cfg: DictConfig) -> str | None:
    """The key of a LazyConfig that holds the model's number of classes, if it has one."""
    return next((key for key in _LAZY_KEYS if OmegaConf.select(cfg, key) is not None), None)


def num_classes_yaml(cfg: CfgNode) -> tuple[str, int | None]:
    """The key of a YAML config that holds the model's number of classes, and the number."""
    node = _YAML_NODES.get(cfg.MODEL.META_ARCHITECTURE)
    if node is None:
        return "", None
    return f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES


def add_own_data_config(cfg: CfgNode) -> None:
    """Add ``DATASETS.{TRAIN,TEST}_{JSON_FILE,IMAGE_ROOT}`` to a YAML config, all empty."""
    for split in ("TRAIN", "TEST"):
        for file in ("JSON_FILE", "IMAGE_ROOT"):
            cfg.DATASETS.setdefault(f"{split}_{file}", "")


def use_own_data(cfg: DictConfig, eval_only: bool) -> None:
    """Put ``dataloader.{train,test}.dataset.{json_file,image_root}`` to use, where they are given.

    The data set takes the place of ``names``, and the model gets as many classes as it has. With
    files for training alone nothing is evaluated, for the recipe's own test data have other
    classes.

    Args:
        cfg: changed in place.
        eval_only: training files are of no use then.

    Raises:
        InputError: one of two paths, a file without categories, or two with different ones.
    """
    own = {}
    for split in ("train", "test"):
        dataset = OmegaConf.select(cfg, f"dataloader.{split}.dataset")
        files = [(dataset or {}).get(key) or "" for key in ("json_file", "image_root")]
        if any(files):
            keys = tuple(f"dataloader.{split}.dataset.{key}" for key in ("json_file", "image_root"))
            dataset.names = own[split] = register_files(*files, keys)
    if not own:
        return
    key = num_classes_key(cfg)
    if key is not None:
        count = len(_common_categories(own))
        if count != OmegaConf.select(cfg, key):
            logger.info("%s is %d, after the annotation file.", key, count)
            OmegaConf.update(cfg, key, count)
    if "test" not in own:
        _say_not_evaluated(
            "dataloader.test.dataset.json_file= and dataloader.test.dataset.image_root=", eval_only
        )
        cfg.dataloader.pop("evaluator", None)
        cfg.dataloader.test.dataset.names = []


def use_own_data_yaml(cfg: CfgNode, eval_only: bool) -> None:
    """:func:`use_own_data` for a YAML config, with the keys of :func:`add_own_data_config`."""
    own = {}
    for split in ("TRAIN", "TEST"):
        keys = (f"{split}_JSON_FILE", f"{split}_IMAGE_ROOT")
        files = [cfg.DATASETS[key] for key in keys]
        if any(files):
            own[split] = register_files(*files, tuple(f"DATASETS.{key}" for key in keys))
            cfg.DATASETS[split] = (own[split],)
    if not own:
        return
    key, classes = num_classes_yaml(cfg)
    if classes is not None:
        count = len(_common_categories(own))
        if count != classes:
            logger.info("%s is %d, after the annotation file.", key, count)
            cfg.merge_from_list([key, count])
    if "TEST" not in own:
        _say_not_evaluated("DATASETS.TEST_JSON_FILE and DATASETS.TEST_IMAGE_ROOT", eval_only)
        cfg.DATASETS.TEST = ()


def _say_not_evaluated(keys: str, eval_only: bool) -> None:
    if eval_only:
        raise InputError(f"--eval-only was given files to train on alone; give {keys} as well.")
    logger.warning("Training without evaluation; for AP give %s as well.", keys)


def _common_categories(files: dict[str, str]) -> list[str]:
    found = {path: category_names(path) for path in files.values()}
    (first, names), *others = found.items()
    for path, other in others:
        if other != names:
            differing = sorted(set(names) ^ set(other)) or "their order"
            raise InputError(
                f"{first} and {path} have different categories ({differing}); training and "
                "evaluation need the same ones."
            )
    return names
