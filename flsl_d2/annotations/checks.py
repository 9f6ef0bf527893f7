"""Check of a data set in COCO format before any long work starts.

Detectron2 finds faults one at a time and late: a missing picture when its batch comes up, a missing
``area`` in the first evaluation, a wrong box never. This check looks at the whole file and reports
everything together, as far as it matters to the use that is made of the data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from flsl_d2.annotations.coco_file import (
    COCO_LISTS,
    Heartbeat,
    read_coco,
    without_garbage_collection,
)
from flsl_d2.annotations.conventions import find_other_convention
from flsl_d2.annotations.entries import (
    AnnotationCheck,
    Sizes,
    check_categories,
    check_files,
    check_images,
)
from flsl_d2.annotations.findings import MAX_UNUSABLE_SHARE, Findings, Use
from flsl_d2.images.reader import picture_size

logger = logging.getLogger(__name__)

# Opening takes 0.1 ms a file on a local disk; of larger data sets a part is opened.
MAX_OPENED = 20_000
_OPENING_THREADS = 8


def check_coco_files(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    use: Use = Use.BOXES,
    max_report: int = 10,
    masks_off: str = "",
    open_pictures: bool = False,
    image_format: str = "",
) -> list[str]:
    """Check a data set in COCO's instances format, including the presence of its pictures.

    Annotations that cannot be used (boxes without area or outside their image, missing masks where
    masks are learned) are a warning while they are fewer than :data:`MAX_UNUSABLE_SHARE`, and a
    fault beyond.

    Args:
        max_report: number of examples that the message names for each fault.
        masks_off: overrides that take masks out of a model, for messages.
        open_pictures: whether to open each picture and compare its size with the annotations.
        image_format: format in which the pictures are read; empty for any.

    Returns:
        Names of the categories in the order of their ids; empty where only pictures are used.

    Raises:
        InputError: with all faults found, one a line.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    learned = bool(use & Use.BOXES)
    coco = read_coco(
        json_file, COCO_LISTS if learned else ("images", "categories") if use else ("images",)
    )
    findings = Findings(max_report)
    sizes, entries = check_images(coco["images"], use, findings)
    files = check_files(entries, image_root, findings)
    categories = check_categories(coco["categories"], findings) if use else {}
    annotations = coco.get("annotations") if use else None
    if annotations is not None:  # else a test set, which is detected on and not evaluated
        check = AnnotationCheck(sizes, categories, use, findings, masks_off)
        with without_garbage_collection():
            coco.plain = check.check(annotations)
        if not findings.has_fault():
            _check_whole(check, annotations, learned, findings)
    if open_pictures:
        _check_pictures(entries, files, image_root, sizes, findings, image_format)
    for line in findings.report(json_file, MAX_UNUSABLE_SHARE * len(annotations or ())):
        logger.warning("%s: %s.", json_file, line)
    return [categories[an_id] for an_id in sorted(categories)]


def _check_whole(
    check: AnnotationCheck, annotations: Sequence[Any], learned: bool, findings: Findings
) -> None:
    """Check what shows in all annotations together."""
    crowds = "exports of brush masks often set it"
    if learned and not annotations:
        findings.fault("empty list", "annotations")
    elif learned and not findings.unusable_count and not check.learned.total():
        findings.whole_file(
            "fault",
            f"all {len(annotations)} annotations have iscrowd 1, which training leaves out, so "
            f"that nothing is left to learn; {crowds}, write iscrowd 0 for single objects",
        )
        return
    for category_id, count in check.annotated.items():
        if not check.learned[category_id]:
            findings.remark(
                f"categories of which nothing is {'learned' if learned else 'evaluated'}, because "
                f"all their annotations are left out or have iscrowd 1 ({crowds}; write iscrowd 0 "
                "for single objects)",
                f"{check.categories[category_id]} with {count} annotations",
            )
    convention = find_other_convention(check.boxes, check.sizes)
    if convention is not None:
        if convention.certain:
            findings.discard_unusable()
        findings.whole_file(
            "fault" if convention.certain else "remark",
            "boxes are not x, y, width and height in pixels of their image but seem to be "
            f"{convention.description}; convert them",
        )


def _check_pictures(
    entries: Sequence[Any],
    files: Mapping[str, str],
    image_root: str,
    sizes: Sizes,
    findings: Findings,
    image_format: str,
) -> None:
    """Open each picture and compare its size with that of its entry."""
    present = [entry for entry in entries if entry["file_name"] in files]
    if len(present) > MAX_OPENED:
        logger.info("%d of %d pictures are opened to check them.", MAX_OPENED, len(present))
        places = np.linspace(0, len(present) - 1, MAX_OPENED).astype(int)
        present = [present[i] for i in places]
    paths = [os.path.join(image_root, files[entry["file_name"]]) for entry in present]
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        sizes_of = pool.map(partial(_size_or_reason, image_format=image_format), paths)
        opened = map(Heartbeat("Opening pictures"), sizes_of)
        for entry, result in zip(present, opened, strict=True):
            name, an_id = entry["file_name"], entry.get("id")
            if isinstance(result, str):
                findings.fault("pictures that cannot be read", f"{name} ({result})")
                continue
            (upright, stored) = result
            annotated = sizes.get(an_id) if isinstance(an_id, (int, float, str)) else None
            if annotated in (None, upright) or np.isinf(annotated[0]):
                continue
            if annotated == stored:
                findings.fault(
                    "pictures that their EXIF entry turns, while the annotations have the size "
                    "before turning; if boxes fit the picture before turning, drop the entry "
                    "(exiftool -Orientation= FILE), else exchange height and width",
                    name,
                )
                continue
            findings.fault(
                "pictures of another size than the annotations say",
                f"{name} is {upright[1]} x {upright[0]}, not {annotated[1]:g} x {annotated[0]:g}",
            )


def _size_or_reason(path: str, image_format: str) -> tuple[tuple[int, int], tuple[int, int]] | str:
    try:
        return picture_size(path, image_format)
    except OSError as error:
        return str(error)
