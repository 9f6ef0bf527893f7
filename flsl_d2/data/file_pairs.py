"""A data set in COCO format given by its two paths, without a name in Detectron2's catalog."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.file_io import PathManager

from flsl_d2.data.datasets import register_coco_format
from flsl_d2.errors import InputError

__all__ = ["category_names", "detection_records", "register_files"]


def register_files(
    json_file: str, image_root: str, keys: tuple[str, str] = ("json_file", "image_root")
) -> str:
    """Register a data set under the path of its annotation file.

    Args:
        json_file: COCO instances annotations; ``~`` is the home folder.
        image_root: the folder that the annotations' file names start from.
        keys: what the two are called where they are given, for messages.

    Returns:
        The name to use wherever Detectron2 asks for one.

    Raises:
        InputError: only one of the two is given, lists are given, or the same annotations are in
            use with another folder.
    """
    if not json_file or not image_root:
        given, missing = keys if json_file else reversed(keys)
        raise InputError(
            f"{given} is {json_file or image_root!r} but {missing} is empty; a data set in COCO "
            "format needs both."
        )
    for path, key in zip((json_file, image_root), keys, strict=True):
        if not isinstance(path, str):
            raise InputError(
                f"{key} is {path}, but it takes one path; give several data sets by names that are "
                "registered (flsl_d2.data.register_coco_format)."
            )
    json_file, image_root = (os.path.expanduser(path) for path in (json_file, image_root))
    if json_file in DatasetCatalog:
        other = MetadataCatalog.get(json_file).image_root
        if other != image_root:
            raise InputError(
                f"{json_file} is given with two folders of images, {other} and {image_root}; give "
                "the same one, or two annotation files."
            )
    register_coco_format(json_file, json_file, image_root)
    return json_file


def category_names(json_file: str) -> list[str]:
    """Names of the categories of a COCO file, in the order of their class numbers.

    Raises:
        InputError: the file is missing or has no categories.
    """
    try:
        with PathManager.open(json_file) as stream:
            categories = json.load(stream)["categories"]
        names = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    except OSError as error:
        raise InputError(
            f"the annotation file {json_file} cannot be read ({error.strerror or error}); "
            "check the path."
        ) from None
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise InputError(
            f"{Path(json_file).name} has no list of categories with id and name; give a file in "
            "COCO's instances format."
        )
    return names


def detection_records(
    names: str | list[str],
    json_file: str = "",
    image_root: str = "",
    filter_empty: bool = True,
    check_consistency: bool = True,
) -> list[dict[str, Any]]:
    """Records of data sets by name, or of one given by its files.

    Args:
        names: a name or several, as Detectron2's ``get_detection_dataset_dicts`` takes them; not
            used where the files are given.
        json_file: see :func:`register_files`.
        image_root: see :func:`register_files`.
        filter_empty: leave out images without usable annotations.
        check_consistency: that data sets of one run have the same classes.

    Returns:
        A list of dicts in Detectron2's data set format.
    """
    if json_file or image_root:
        names = register_files(json_file, image_root)
    return get_detection_dataset_dicts(
        names, filter_empty=filter_empty, check_consistency=check_consistency
    )
