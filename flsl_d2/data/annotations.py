"""Checks of COCO annotation files before any long work starts.

Detectron2 finds such faults one at a time and late: a missing picture when its batch comes up, a
missing `area` in the first evaluation, a wrong box never. Here the whole file is looked at and
everything is reported together.
"""

from __future__ import annotations

import difflib
import gc
import json
import logging
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from flsl_d2.data.annotation_entries import check_annotations, check_images
from flsl_d2.data.annotation_shapes import Findings
from flsl_d2.errors import InputError

logger = logging.getLogger(__name__)

# COCO train2017 itself has a few boxes without width. A few are dropped in training and do no harm;
# more than this share is a mistake in whatever wrote the file.
MAX_DEGENERATE_SHARE = 0.01


def _read_json(json_file: str) -> Any:
    # Collecting garbage in between doubles the time: a large file makes millions of containers.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with PathManager.open(json_file, "r") as stream:
            return json.load(stream)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"the annotation file {json_file} does not exist: put it there or set "
            "DETECTRON2_DATASETS to the folder that holds the data sets."
        ) from None
    except OSError as error:
        raise InputError(
            f"the annotation file {json_file} cannot be read ({error.strerror or error}): "
            "name a readable file in COCO format."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{json_file} is not JSON ({error}): name a file in COCO's instances format."
        ) from None
    finally:
        if collecting:
            gc.enable()


def _read_coco(json_file: str, need_annotations: bool) -> dict[str, list[Any]]:
    """The lists `images`, `annotations` and `categories` of a file."""
    content = _read_json(json_file)
    needed = ["images", "annotations", "categories"]
    if not need_annotations:
        needed.remove("annotations")
    if not isinstance(content, dict):
        raise InputError(
            f"{json_file} holds a {type(content).__name__} and is not in COCO format: expected an "
            f"object with the lists {', '.join(needed)}."
        )
    lacking = [key for key in needed if not isinstance(content.get(key), list)]
    if lacking:
        raise InputError(
            f"{json_file} is not in COCO format, it lacks the list{'s' * (len(lacking) > 1)} "
            f"{', '.join(lacking)}: name a file in COCO's instances format."
        )
    return {key: content.get(key) or [] for key in ("images", "annotations", "categories")}


def _names_in(folder: str) -> set[str] | None:
    """All names in a folder, None if there is no such folder or it may not be listed."""
    try:
        return set(PathManager.ls(folder))
    except OSError:
        return None


def _check_files(file_names: list[str], image_root: str, findings: Findings) -> None:
    """Note images without a file. One look at each folder, not one at each of 118,000 files."""
    if _names_in(image_root) is None:
        findings.fault(
            "the image folder does not exist or may not be listed, create it or set "
            "DETECTRON2_DATASETS",
            image_root,
        )
        return
    listings: dict[str, set[str] | None] = {}
    for file_name in file_names:
        folder, name = os.path.split(file_name)
        if folder not in listings:
            listings[folder] = _names_in(os.path.join(image_root, folder))
        if name not in (listings[folder] or ()):
            findings.fault(
                f"{{count}} of {len(file_names)} images are missing in {image_root}, put them "
                "there or set DETECTRON2_DATASETS",
                file_name,
            )


def check_coco_files(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    max_report: int = 10,
    need_annotations: bool = True,
) -> None:
    """Check a data set in COCO's instances format, pictures' presence included.

    Single annotations that cannot be trained on (boxes without area or outside their image, broken
    polygons) are a warning while they are fewer than `MAX_DEGENERATE_SHARE`, and a fault beyond it.

    Args:
        json_file: the annotations.
        image_root: the folder that the images' `file_name` starts from.
        max_report: how many examples of each fault the message names.
        need_annotations: False for lists of images without annotations (COCO's test sets).

    Raises:
        InputError: with all faults found, one a line.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    coco = _read_coco(json_file, need_annotations)
    findings = Findings(max_report)
    sizes, file_names = check_images(coco["images"], findings)
    check_annotations(coco["annotations"], coco["categories"], sizes, findings)
    if need_annotations and not coco["annotations"]:
        findings.fault("empty list", "annotations")
    _check_files(file_names, image_root, findings)

    allowed = MAX_DEGENERATE_SHARE * len(coco["annotations"])
    degenerate = findings.degenerate_count
    faults = findings.faults() + (findings.degenerate() if degenerate > allowed else [])
    if faults:
        lines = "\n".join(f"  - {line}" for line in faults)
        raise InputError(f"{json_file} cannot be used, correct the following:\n{lines}")
    for line in findings.degenerate() + findings.remarks():
        logger.warning("%s: %s", json_file, line)


def check_registered_dataset(
    name: str, max_report: int = 10, need_annotations: bool = True
) -> None:
    """Check that a data set's name is known, and its files where they are in COCO format.

    Raises:
        InputError: the name is not registered (names like it are listed), or the files are faulty.
    """
    if name not in DatasetCatalog:
        known = sorted(DatasetCatalog.list())
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
        near += [other for other in known if name and name in other and other not in near][:4]
        hint = f"did you mean {', '.join(near)}" if near else f"{len(known)} other names are known"
        raise InputError(
            f"the data set {name!r} is not registered ({hint}): register your own with "
            f"flsl_d2.data.register_coco_format({name!r}, json_file, image_root) before using it."
        )
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") == "coco" and json_file and image_root:
        check_coco_files(json_file, image_root, max_report, need_annotations)
