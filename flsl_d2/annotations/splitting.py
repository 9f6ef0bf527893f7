"""A validation part of a data set in COCO format, split off by image."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from typing import Any

from flsl_d2.errors import InputError

Coco = dict[str, list[Any]]


def split_by_image(
    coco: Coco, share: float = 0.2, seed: int = 0, group_pattern: str = ""
) -> tuple[Coco, Coco]:
    """Split a data set into a part for training and one for validation.

    Whole groups of images are drawn in random order until the validation part has its share. A
    group stays in training if it holds the last boxes of a class there, so that every class is
    learned; a part without boxes at all is not made.

    Args:
        coco: content of a file in COCO's instances format, checked already.
        share: share of the images that is validated on, between 0 and 1.
        seed: seed of the drawing.
        group_pattern: regular expression on file names. Images with the same match (of the first
            bracket, if there is one) stay together, such as frames of one video; an image without
            a match is a group of its own. Empty for none.

    Returns:
        The two parts, each with all categories and in the order of the file.

    Raises:
        InputError: the share or the pattern is wrong, or there are too few groups with boxes.
    """
    if not 0 < share < 1:
        raise InputError(f"--val-share is {share:g}; give a number between 0 and 1, such as 0.2.")
    groups = _groups(coco["images"], group_pattern)
    classes_of = defaultdict(set)
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd"):
            classes_of[annotation["image_id"]].add(annotation["category_id"])
    group_classes = {
        name: set().union(*(classes_of[image_id] for image_id in members))
        for name, members in groups.items()
    }
    remaining = Counter(each for classes in group_classes.values() for each in classes)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    # Groups with boxes come first, so that the validation part has some.
    order.sort(key=lambda name: not group_classes[name])
    wanted = max(1, round(share * len(coco["images"])))
    held_out: set[Any] = set()
    for name in order:
        too_many = len(held_out) + len(groups[name]) > wanted and bool(held_out)
        if too_many or any(remaining[category] < 2 for category in group_classes[name]):
            continue
        held_out.update(groups[name])
        remaining.subtract(group_classes[name])
        if len(held_out) >= wanted:
            break
    if not any(classes_of[image_id] for image_id in held_out):
        raise InputError(
            f"{len(groups)} groups of {len(coco['images'])} images are too few to split off a "
            "validation part and keep every class in training; give --val-annotations, or more "
            "images."
        )
    train, val = (
        {
            "images": [i for i in coco["images"] if (i["id"] in held_out) is validation],
            "annotations": [
                a for a in coco["annotations"] if (a["image_id"] in held_out) is validation
            ],
            "categories": coco["categories"],
        }
        for validation in (False, True)
    )
    return train, val


def _groups(images: list[Any], pattern: str) -> dict[str, list[Any]]:
    """Image ids by group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"--val-group is {pattern!r}, which is no regular expression ({error}); correct it."
        ) from error
    groups: dict[str, list[Any]] = defaultdict(list)
    for image in images:
        name = str(image["file_name"])
        match = compiled.search(name) if pattern else None
        key = f"image {name}" if match is None else f"group {match[1 if compiled.groups else 0]}"
        groups[key].append(image["id"])
    return groups
