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
from typing import Any

import numpy as np

from flsl_d2.annotations.coco_file import COCO_LISTS, read_coco, without_garbage_collection
from flsl_d2.annotations.conventions import find_other_convention
from flsl_d2.annotations.entries import (
    AnnotationCheck,
    Sizes,
    check_categories,
    check_files,
    check_images,
)
from flsl_d2.annotations.findings import MAX_UNUSABLE_SHARE, Findings, Use
from flsl_d2.annotations.shapes import NO_AREA, NO_MASK, OUTSIDE
from flsl_d2.errors import InputError
from flsl_d2.images.reader import picture_size

logger = logging.getLogger(__name__)

BOX_PROBLEMS = (NO_AREA, OUTSIDE)
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
) -> list[str]:
    """Check a data set in COCO's instances format, including the presence of its pictures.

    Annotations that cannot be used (boxes without area or outside their image, missing masks where
    masks are learned) are a warning while they are fewer than :data:`MAX_UNUSABLE_SHARE`, and a
    fault beyond.

    Args:
        json_file: path of the annotations.
        image_root: the folder that the images' ``file_name`` starts from.
        use: what the data set is used for.
        max_report: number of examples that the message names for each fault.
        masks_off: overrides that take masks out of a model, for messages.
        open_pictures: whether to open each picture and compare its size with the annotations.

    Returns:
        Names of the categories in the order of their ids; empty where only pictures are used.

    Raises:
        InputError: with all faults found, one a line.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    coco = read_coco(json_file, _needed_lists(use))
    findings = Findings(max_report)
    sizes, entries = check_images(coco["images"], use, findings)
    files = check_files(entries, image_root, findings)
    categories: dict[Any, str] = {}
    if use:
        categories = check_categories(coco["categories"], findings)
        with without_garbage_collection():
            coco.plain = _check_annotations(
                coco.get("annotations"), sizes, categories, use, findings
            )
    if open_pictures:
        _check_pictures(entries, files, image_root, sizes, findings)
    annotations = coco.get("annotations", ()) if use else ()
    report_findings(json_file, findings, MAX_UNUSABLE_SHARE * len(annotations), masks_off)
    return [categories[an_id] for an_id in sorted(categories)]


def _needed_lists(use: Use) -> tuple[str, ...]:
    if not use:
        return ("images",)
    return COCO_LISTS if use & Use.BOXES else ("images", "categories")


def _check_annotations(
    annotations: Sequence[Any] | None,
    sizes: Sizes,
    categories: Mapping[Any, str],
    use: Use,
    findings: Findings,
) -> bytearray | None:
    if annotations is None:  # a test set, which is detected on and not evaluated
        return None
    check = AnnotationCheck(sizes, dict(categories), use, findings)
    plain = check.check(annotations)
    if not findings.lines("fault"):
        _check_whole(check, annotations, sizes, categories, use, findings)
    return plain


def _check_whole(
    check: AnnotationCheck,
    annotations: Sequence[Any],
    sizes: Sizes,
    categories: Mapping[Any, str],
    use: Use,
    findings: Findings,
) -> None:
    """Check what shows in all annotations together."""
    learned = bool(use & Use.BOXES)
    if learned and not annotations:
        findings.fault("empty list", "annotations")
    elif learned and not findings.unusable_count and not check.learned.total():
        findings.whole_file(
            "fault",
            f"all {len(annotations)} annotations have iscrowd 1, which training leaves out, so "
            "that nothing is left to learn; exports of brush masks often set it, write iscrowd 0 "
            "for single objects",
        )
        return
    for category_id, count in check.annotated.items():
        if not check.learned[category_id]:
            findings.remark(
                f"categories of which nothing is {'learned' if learned else 'evaluated'}, because "
                "all their annotations are left out or have iscrowd 1 (exports of brush masks "
                "often set it; write iscrowd 0 for single objects)",
                f"{categories[category_id]} with {count} annotations",
            )
    convention = find_other_convention(check.boxes, sizes)
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
) -> None:
    """Open each picture and compare its size with that of its entry."""
    present = [entry for entry in entries if entry["file_name"] in files]
    if len(present) > MAX_OPENED:
        logger.info("%d of %d pictures are opened to check them.", MAX_OPENED, len(present))
        places = np.linspace(0, len(present) - 1, MAX_OPENED).astype(int)
        present = [present[i] for i in places]
    paths = [os.path.join(image_root, files[entry["file_name"]]) for entry in present]
    with ThreadPoolExecutor(_OPENING_THREADS) as pool:
        opened = pool.map(_size_or_reason, paths)
        for entry, result in zip(present, opened, strict=True):
            if isinstance(result, str):
                findings.fault("pictures that cannot be read", f"{entry['file_name']} ({result})")
            elif isinstance(entry.get("id"), (int, float, str)):
                _compare_size(entry, result, sizes.get(entry["id"]), findings)


def _size_or_reason(path: str) -> tuple[tuple[int, int], tuple[int, int]] | str:
    try:
        return picture_size(path)
    except OSError as error:
        return str(error)


def _compare_size(
    entry: dict[str, Any],
    opened: tuple[tuple[int, int], tuple[int, int]],
    annotated: tuple[float, float] | None,
    findings: Findings,
) -> None:
    upright, stored = opened
    if annotated is None or annotated == upright or np.isinf(annotated[0]):
        return
    if annotated == stored:
        findings.fault(
            "pictures that their EXIF entry turns, while the annotations have the size before "
            "turning; if boxes fit the picture before turning, drop the entry (exiftool "
            "-Orientation= FILE), else exchange height and width",
            entry["file_name"],
        )
        return
    findings.fault(
        "pictures of another size than the annotations say",
        f"{entry['file_name']} is {upright[1]} x {upright[0]}, not "
        f"{annotated[1]:g} x {annotated[0]:g}",
    )


def report_findings(
    json_file: str, findings: Findings, allowed: float = 0, masks_off: str = ""
) -> None:
    """Raise all faults of a file together, or log the harmless findings.

    Args:
        json_file: path of the file, for messages.
        findings: what was found.
        allowed: number of annotations that may be left out.
        masks_off: overrides that take masks out of a model; empty where it has none.

    Raises:
        InputError: with all faults, one a line where there are several.
    """
    unusable = findings.lines("unusable")
    if masks_off:
        remedy = f"{NO_MASK.kind}, while the model learns masks (for boxes alone: {masks_off})"
        unusable = [line.replace(NO_MASK.kind, remedy) for line in unusable]
    faults = findings.lines("fault")
    if findings.unusable_count > allowed:
        faults += unusable
    if faults:
        lines = "\n".join(f"  - {line}" for line in faults)
        several = f", correct the following:\n{lines}"
        raise InputError(
            f"{json_file} cannot be used{several if len(faults) > 1 else f': {faults[0]}'}"
        )
    for line in unusable:
        boxes = any(problem.kind in line for problem in BOX_PROBLEMS)
        done = "they are left out" if boxes else "their boxes stand for their masks"
        logger.warning("%s: %s; %s.", json_file, line, done)
    for line in findings.lines("remark"):
        logger.warning("%s: %s", json_file, line)
