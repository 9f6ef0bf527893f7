"""What is checked of a detection run's input before it starts, for configs of both kinds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn

from flsl_d2.data import Use, check_registered_dataset
from flsl_d2.data.datasets import use_own_loader
from flsl_d2.data.label_images import check_label_images
from flsl_d2.detection.lvis import check_lvis_dataset
from flsl_d2.errors import InputError

__all__ = ["check_batch", "check_datasets", "describe_model", "mixed_precision", "names_of"]

logger = logging.getLogger(__name__)

# What is checked of data sets that are not in COCO's format, by Detectron2's kind of evaluator.
_OTHER_CHECKS = {"lvis": check_lvis_dataset, "sem_seg": check_label_images}


def names_of(names: str | Iterable[str]) -> list[str]:
    """Data set names of a config, which may give one name or several."""
    return [names] if isinstance(names, str) else list(names)


def check_datasets(
    train: Sequence[str],
    test: Sequence[str],
    num_classes: int | None,
    classes_key: str,
    masks_off: str = "",
) -> None:
    """Check that data sets exist, with their files, and have what the model is to learn.

    Runs on the first rank; the others wait for it.

    Args:
        train: names to train on.
        test: names to evaluate on; they need no annotations.
        num_classes: of the model; None where it has no such number.
        classes_key: the config key of that number, as an override begins.
        masks_off: overrides that take masks out of the model; empty where it learns none.

    Raises:
        InputError: naming the data set and what is wrong.
    """
    for name in {*train, *test}:
        use_own_loader(name)
    if comm.is_main_process():
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
            if num_classes is not None and categories and len(categories) != num_classes:
                some = ", ".join(categories[:3]) + (", ..." if len(categories) > 3 else "")
                raise InputError(
                    f"the data set {name!r} has {len(categories)} categories ({some}), but the "
                    f"model has {num_classes} classes; set {classes_key}{len(categories)}."
                )
    comm.synchronize()


def check_batch(batch_size: int, key: str) -> None:
    """Check that every process gets the same whole number of images.

    Raises:
        InputError: otherwise.
    """
    world = comm.get_world_size()
    if batch_size < 1 or batch_size % world:
        raise InputError(
            f"{key} is {batch_size}, which {world} process(es) cannot share equally; "
            f"use a multiple of {world}."
        )


def mixed_precision(enabled: bool, device: str) -> bool:
    """Whether to train in mixed precision; on a CPU it is turned off, and the log says so."""
    if enabled and not str(device).startswith("cuda"):
        logger.info("Mixed precision is for GPUs; training on %s in float32.", device)
        return False
    return enabled


def describe_model(model: nn.Module) -> None:
    """One line about a model, where Detectron2 prints all of its modules."""
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
    """Names of a data set's classes in its metadata; empty where they are not known."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "sem_seg":
        return list(metadata.stuff_classes)
    return list(metadata.get("thing_classes") or [])
