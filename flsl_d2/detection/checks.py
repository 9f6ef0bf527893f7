"""Checks of a detection run's input, for configs of both kinds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from flsl_d2.annotations import Use, check_registered_dataset
from flsl_d2.annotations.datasets import use_own_loader
from flsl_d2.detection.lvis import check_lvis_dataset
from flsl_d2.errors import InputError
from flsl_d2.images.labels import check_label_images

logger = logging.getLogger(__name__)

# Checks of data sets that are not in COCO's format, by Detectron2's kind of evaluator.
_OTHER_CHECKS = {"lvis": check_lvis_dataset, "sem_seg": check_label_images}


def names_of(names: str | Iterable[str]) -> list[str]:
    """List the data set names of a config, which may give one name or several."""
    return [names] if isinstance(names, str) else list(names)


def check_datasets(
    train: Sequence[str],
    test: Sequence[str],
    num_classes: int | None,
    classes_key: str,
    masks_off: str = "",
) -> None:
    """Check data sets: their files, their number of classes, and that they have the same classes.

    Runs on the first rank; the others wait for it.

    Args:
        train: names of the training sets.
        test: names of the test sets; they need no annotations.
        num_classes: number of classes of the model; None where it has no such number.
        classes_key: the config key of that number, as an override begins.
        masks_off: overrides that remove the masks from the model; empty where it learns none.

    Raises:
        InputError: a data set cannot be used; the message names it and what is wrong.
    """
    for name in {*train, *test}:
        use_own_loader(name)
    if comm.is_main_process():
        first: tuple[str, list[str]] | None = None
        for name in dict.fromkeys([*train, *test]):
            use = (Use.BOXES if name in train else Use(0)) | (Use.MASKS if masks_off else Use(0))
            if name in test:
                use |= Use.EVALUATION
            categories = check_registered_dataset(
                name, use, masks_off=masks_off, open_pictures=True
            )
            other_check = _OTHER_CHECKS.get(MetadataCatalog.get(name).get("evaluator_type"))
            if other_check:
                other_check(name)
            categories = categories or _known_categories(name)
            if categories:
                first = first or (name, categories)
                _check_same_categories(*first, name, categories)
            if num_classes is not None and categories and len(categories) != num_classes:
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
    """A data set mapper whose exceptions name the image in one sentence.

    Detectron2's own mapper, which reads some images in another way, is named in a warning.

    Args:
        mapper: function from a record in Detectron2's format to what the model takes.
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
        """Map a record.

        Raises:
            InputError: the mapper failed; the message names the image file and the reason.
        """
        try:
            return self.mapper(record)
        except InputError:
            raise
        except Exception as error:
            file = record.get("file_name", f"number {record.get('image_id')}")
            raise InputError(
                f"the image {file} or its annotations cannot be used ({_reason(error)}); correct "
                "the file, or remove it from the data set."
            ) from error


def check_test_set(
    name: str, build: Callable[[], tuple[DataLoader[Any], DatasetEvaluator]]
) -> None:
    """Build the loader and the evaluator of a test set, and map its first image.

    Called before training, so that a test set that cannot be evaluated is found before the first
    step and not after the last one. Runs on every rank.

    Args:
        name: name of the test set, for the message.
        build: function that builds the loader and the evaluator.

    Raises:
        InputError: the test set cannot be evaluated.
    """
    try:
        loader, evaluator = build()
        evaluator.reset()
        if hasattr(loader.dataset, "__getitem__"):
            loader.dataset[0]
    except InputError:
        raise
    except Exception as error:
        logger.debug("The test set %s failed.", name, exc_info=True)
        raise InputError(
            f"the test set {name!r} cannot be evaluated ({_reason(error)}); correct its files or "
            "its evaluator, or train without evaluation."
        ) from error


def _reason(error: BaseException) -> str:
    """Return the text of an exception in one line, with its type unless it is an OSError."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:300].rstrip(".")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def check_batch(batch_size: int, key: str) -> None:
    """Check that every process gets the same whole number of images.

    Args:
        batch_size: images of a step, of all processes together.
        key: the config key of the batch size, for the message.

    Raises:
        InputError: the images cannot be shared equally.
    """
    world = comm.get_world_size()
    if batch_size < 1 or batch_size % world:
        raise InputError(
            f"{key} is {batch_size}, which {world} process(es) cannot share equally; "
            f"use a positive multiple of {world}."
        )


def mixed_precision(enabled: bool, device: str) -> bool:
    """Whether to train in mixed precision; it is turned off on a CPU, with a line in the log."""
    if enabled and not str(device).startswith("cuda"):
        logger.info("Mixed precision is for GPUs only; training on %s in float32.", device)
        return False
    return enabled


def describe_model(model: nn.Module) -> None:
    """Log one line about a model, where Detectron2 prints all of its modules."""
    parts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = next(model.parameters(), torch.empty(0)).device
    logger.info(
        "%s on %s: %.1fM parameters, %.1fM trained (%s).",
        type(model).__name__,
        device,
        sum(parts.values()) / 1e6,
        trained / 1e6,
        ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parts.items()),
    )


def _known_categories(name: str) -> list[str]:
    """List the classes in a data set's metadata; empty where they are unknown."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "sem_seg":
        return list(metadata.stuff_classes)
    return list(metadata.get("thing_classes") or [])
