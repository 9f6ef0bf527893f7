"""Files in COCO format that overrides of a LazyConfig name, in place of the recipe's data set."""

from __future__ import annotations

import logging

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from flsl_d2.annotations.coco_file import read_coco
from flsl_d2.annotations.datasets import register_files
from flsl_d2.errors import InputError

logger = logging.getLogger(__name__)

# The key that holds the number of classes, by architecture.
_CLASSES = ("model.roi_heads.num_classes", "model.sem_seg_head.num_classes", "model.num_classes")


def num_classes_key(cfg: DictConfig) -> str | None:
    """Return the key of a LazyConfig that holds the model's number of classes, if any."""
    return next((key for key in _CLASSES if OmegaConf.select(cfg, key) is not None), None)


def use_own_data(cfg: DictConfig, eval_only: bool) -> None:
    """Register the files of ``dataloader.{train,test}.dataset.{json_file,image_root}``, if given.

    The data set replaces ``names``, and the model gets the number of its classes. With training
    files alone nothing is evaluated, because the recipe's own test set has other classes.

    Args:
        cfg: detection config, changed in place.
        eval_only: whether the run only evaluates; training files alone are an error then.

    Raises:
        InputError: one path of a pair is missing, or a file has no list of categories.
    """
    own = {}
    for split in ("train", "test"):
        dataset = OmegaConf.select(cfg, f"dataloader.{split}.dataset")
        json_file, image_root = (
            (dataset or {}).get(key) or "" for key in ("json_file", "image_root")
        )
        if json_file or image_root:
            start = f"dataloader.{split}.dataset"
            keys = (f"{start}.json_file", f"{start}.image_root")
            dataset.names = own[split] = register_files(json_file, image_root, keys)
    if not own:
        return
    key = num_classes_key(cfg)
    if key is not None:
        # What is wrong with single categories is found by the check of the whole file.
        count = len(
            read_coco(MetadataCatalog.get(next(iter(own.values()))).json_file, ("categories",))[
                "categories"
            ]
        )
        if count != OmegaConf.select(cfg, key):
            logger.info("%s is set to %d, the number of categories in the file.", key, count)
            OmegaConf.update(cfg, key, count)
    if "test" in own:
        return
    missing = "dataloader.test.dataset.json_file= and dataloader.test.dataset.image_root="
    if eval_only:
        raise InputError(f"--eval-only was given training files only; give {missing} as well.")
    logger.warning("Training without evaluation; give %s as well to measure AP.", missing)
    cfg.dataloader.pop("evaluator", None)
    cfg.dataloader.test.dataset.names = []
