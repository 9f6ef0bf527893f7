"""The data sets of a detection run: own files, checks, and mappers that name what fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from flsl_d2.annotations import Use, check_registered_dataset
from flsl_d2.annotations.coco_file import read_coco
from flsl_d2.annotations.datasets import register_files, use_own_loader
from flsl_d2.detection.lvis import check_lvis_dataset
from flsl_d2.errors import InputError
from flsl_d2.images.labels import check_label_images

logger = logging.getLogger(__name__)

# Checks of data sets that are not in COCO's format, by Detectron2's kind of evaluator.
_OTHER_CHECKS = {"lvis": check_lvis_dataset, "sem_seg": check_label_images}
# The key of a LazyConfig that holds the number of classes, by architecture.
_CLASSES = ("model.roi_heads.num_classes", "model.sem_seg_head.num_classes", "model.num_classes")


def names_of(names: str | Iterable[str]) -> list[str]:
    """List the data set names of a config, which may give one name or several."""
    return [names] if isinstance(names, str) else list(names)


def num_classes_key(cfg: DictConfig) -> str | None:
    """Return the key of a LazyConfig that holds the model's number of classes, if any."""
    return next((key for key in _CLASSES if OmegaConf.select(cfg, key) is not None), None)


def use_own_data(cfg: DictConfig, eval_only: bool) -> None:
    """Register the files of ``dataloader.{train,test}.dataset.{json_file,image_root}``, if given.

    They replace ``names`` in the config, and the model gets the number of their classes. With
    training files alone nothing is evaluated, because the recipe's test set has other classes;
    with ``eval_only`` that is an :class:`InputError`, as is half a pair.
    """
    own = {}
    for split in ("train", "test"):
        start = f"dataloader.{split}.dataset"
        keys = (f"{start}.json_file", f"{start}.image_root")
        json_file, image_root = (OmegaConf.select(cfg, key) or "" for key in keys)
        if json_file or image_root:
            own[split] = register_files(json_file, image_root, keys)
            cfg.dataloader[split].dataset.names = own[split]
    if not own:
        return
    key = num_classes_key(cfg)
    if key is not None:
        # What is wrong with single categories is found by the check of the whole file.
        file = MetadataCatalog.get(next(iter(own.values()))).json_file
        count = len(read_coco(file, ("categories",))["categories"])
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


def check_datasets(
    train: Sequence[str],
    test: Sequence[str],
    num_classes: int | None,
    classes_key: str,
    masks_off: str = "",
    image_format: str = "",
) -> None:
    """Check data sets: their files, their number of classes, and that they have the same classes.

    Runs on the first rank; the others wait for it.

    Args:
        test: names of the test sets; they need no annotations.
        num_classes: number of classes of the model; None where it has no such number.
        classes_key: the config key of that number, as an override begins.
        masks_off: overrides that remove the masks from the model; empty where it learns none.
        image_format: format in which the model reads pictures; empty for any.

    Raises:
        InputError: a data set cannot be used; the message names it and what is wrong.
    """
    for name in {*train, *test}:
        use_own_loader(name)
    if comm.is_main_process():
        first: tuple[str, list[str]] | None = None
        for name in dict.fromkeys([*train, *test]):
            use = (Use.BOXES if name in train else Use(0)) | (Use.MASKS if masks_off else Use(0))
            use |= Use.EVALUATION if name in test else Use(0)
            found = check_registered_dataset(
                name, use, masks_off=masks_off, open_pictures=True, image_format=image_format
            )
            metadata = MetadataCatalog.get(name)
            kind = metadata.get("evaluator_type")
            if kind in _OTHER_CHECKS:
                _OTHER_CHECKS[kind](name)
            known = "stuff_classes" if kind == "sem_seg" else "thing_classes"
            categories = found or list(metadata.get(known) or [])
            if not categories:
                continue
            first = first or (name, categories)
            _check_same_categories(*first, name, categories)
            if num_classes is not None and len(categories) != num_classes:
                some = ", ".join(categories[:3]) + (", ..." if len(categories) > 3 else "")
                raise InputError(
                    f"the data set {name!r} has {len(categories)} categories ({some}), but the "
                    f"model has {num_classes} classes; set {classes_key}{len(categories)}."
                )
    comm.synchronize()


def _check_same_categories(first: str, expected: list[str], name: str, found: list[str]) -> None:
    if found == expected:
        return
    differing = sorted(set(found) ^ set(expected))
    reason = ", ".join(map(repr, differing[:6])) if differing else "their order differs"
    raise InputError(
        f"the data sets {first!r} and {name!r} have different categories ({reason}), so one class "
        "number would mean two things; give the same categories in the same order of their ids."
    )


class CheckedMapper:
    """A data set mapper whose exceptions are an InputError that names the image.

    Detectron2's own mapper, which reads some images in another way, is named in a warning.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self.mapper = mapper
        if type(mapper) is DatasetMapper:
            logger.warning(
                "Detectron2's DatasetMapper turns 16-bit images white and drops transparency; "
                "flsl_d2.annotations.FLSLDatasetMapper takes the same arguments and reads images "
                "as pre-training does."
            )

    def __call__(self, record: dict[str, Any]) -> Any:
        """Map a record in Detectron2's format."""
        try:
            return self.mapper(record)
        except InputError:
            raise
        except Exception as error:
            file = record.get("file_name", f"number {record.get('image_id')}")
            raise InputError(
                f"the image {file} or its annotations cannot be used ({reason_of(error)}); correct "
                "the file, or remove it from the data set."
            ) from error


def reason_of(error: BaseException) -> str:
    """Return the text of an exception in one line, with its type unless it is an OSError."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:300].rstrip(".")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"
