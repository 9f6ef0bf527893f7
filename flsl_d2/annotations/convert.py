"""Annotations of any known format as COCO's: recognised, read, matched with pictures, accounted.

Every file and object is used, left out with its name and the reason, or refused.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flsl_d2.annotations import formats, yolo
from flsl_d2.annotations.coco_file import read_json
from flsl_d2.annotations.findings import MAX_UNUSABLE_SHARE, Findings
from flsl_d2.annotations.matching import match_pictures
from flsl_d2.annotations.objects import AnnotatedObject, AnnotatedPicture, simplified
from flsl_d2.annotations.shapes import box_problem, mask_area
from flsl_d2.errors import InputError
from flsl_d2.images.listing import find_images
from flsl_d2.images.opening import IMAGE_SUFFIXES
from flsl_d2.images.reader import picture_size

_KNOWN = (
    "COCO (one .json), YOLO (a folder of .txt with data.yaml or classes.txt), Pascal VOC (a folder "
    "of .xml), LabelMe (a folder of .json) and CVAT 1.1 (one .xml)"
)
_READERS = {
    "Pascal VOC": formats.read_voc, "CVAT": formats.read_cvat, "LabelMe": formats.read_labelme
}  # fmt: skip
_SAMPLE = 50  # files that are looked at to recognise a folder's format


@dataclass(frozen=True)
class AnnotationSource:
    """Annotations of a recognised format."""

    kind: str  # COCO, YOLO, Pascal VOC, LabelMe or CVAT
    path: Path  # file, or folder with a file for each image
    files: tuple[Path, ...]  # all files of the format's suffix
    others: Counter[str]  # number of other files of the folder by suffix, pictures left out
    names_file: Path | None = None  # file with the class names, where the user named it


def recognise_annotations(path: str | Path) -> AnnotationSource:
    """Recognise the format of annotations by their content."""
    path = Path(path).expanduser()
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise InputError(f"the annotations '{path}' do not exist; check the path.")
    by_suffix = defaultdict(list)
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.name not in yolo.NAME_FILES and file.is_file():
            by_suffix[file.suffix.lower()].append(file)
    found = {}
    for kind, (suffix, is_kind) in _FOLDERS.items():
        files = by_suffix[suffix]
        sample = np.linspace(0, len(files) - 1, min(len(files), _SAMPLE)).astype(int)
        found[kind] = sum(is_kind(files[i]) for i in sample), len(files)
    kind = max(found, key=lambda each: found[each])
    if not found[kind][0]:
        raise InputError(
            f"the folder '{path}' holds no annotations of a known format; known: {_KNOWN}."
        )
    chosen = tuple(by_suffix.pop(_FOLDERS[kind][0]))
    others = {
        suffix or "no suffix": len(rest)
        for suffix, rest in by_suffix.items()
        if rest and suffix not in IMAGE_SUFFIXES
    }
    return AnnotationSource(kind, path, chosen, Counter(others))


def _recognise_file(path: Path) -> AnnotationSource:
    if path.suffix.lower() in (".yaml", ".yml") or path.name in yolo.NAME_FILES:
        source = recognise_annotations(path.parent)
        if source.kind != "YOLO":
            raise InputError(f"'{path}' names classes of YOLO, and '{path.parent}' has no labels.")
        return AnnotationSource("YOLO", source.path, source.files, source.others, path)
    root = formats.xml_root(path)
    if root == "annotation" or _is_labelme(path, 0):
        raise InputError(f"'{path}' annotates one image; give the folder of all such files.")
    if root != "annotations" and (root or path.suffix.lower() == ".xml"):
        raise InputError(f"'{path}' is XML of an unknown format; known: {_KNOWN}.")
    return AnnotationSource("CVAT" if root else "COCO", path, (path,), Counter())


def _is_labelme(path: Path, most: int = 2**24) -> bool:
    try:
        with path.open("rb") as file:
            if b'"shapes"' not in file.read(2**16) and path.stat().st_size > most:
                return False  # a large file of another format is not read for this
        return formats.is_labelme(read_json(path))
    except (OSError, InputError):
        return False


def _is_yolo(path: Path) -> bool:
    """Whether any line is an object."""
    try:
        return any(map(yolo.is_yolo_line, path.read_text("utf-8-sig", "replace").splitlines()))
    except OSError:
        return False


_FOLDERS = {
    "Pascal VOC": (".xml", lambda path: formats.xml_root(path) == "annotation"),
    "LabelMe": (".json", _is_labelme),
    "YOLO": (".txt", _is_yolo),
}


def convert_to_coco(
    source: AnnotationSource, images: str | Path, labels: Sequence[str] = ()
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return annotations as the content of a file in COCO's format, and the account in sentences.

    Boxes are cut at the border of their picture, and objects that are written twice count once. The
    content gets the classes ``labels`` even if no object has them, as a second part of a data set
    needs.

    Raises:
        InputError: files that cannot be read, more than a hundredth of the objects that cannot be
            used, or none that belongs to a picture.
    """
    root = Path(os.path.abspath(Path(images).expanduser()))
    files = find_images(root)
    findings = Findings()
    for suffix, count in source.others.items():
        kind = "other files in the folder of the annotations, not used"
        findings.remark(kind, f"{suffix} ({count})", count)
    if source.kind == "YOLO":
        stems = {simplified(Path(file).stem) for file in files}
        label_files = []
        for file in source.files:
            if simplified(file.stem) in stems or _is_yolo(file):
                label_files.append(file)
            else:
                findings.remark("files without labels, not used", file)
        annotated = yolo.read_yolo(source.path, label_files, findings, source.names_file)
    else:
        annotated = _READERS[source.kind](source.path, source.files, findings)
    total = sum(len(picture.objects) for picture in annotated) + findings.unusable_count
    roots = str(source.path) if source.path.is_dir() else "", str(root)
    matched = match_pictures(annotated, files, findings, roots, source.files)
    content = _coco(matched, root, labels, findings)
    place = f"{source.path} ({source.kind})"
    notes = findings.report(place, MAX_UNUSABLE_SHARE * total)
    if not content["annotations"]:
        reasons = "".join(f"\n  - {note}" for note in notes)
        raise InputError(
            f"{place} holds no box of a picture in '{root}'; the pictures must have the names that "
            f"the annotations state.{reasons}"
        )
    return content, [
        f"{source.kind} annotations: {len(content['annotations'])} objects of "
        f"{len(content['categories'])} classes in {len(content['images'])} pictures.",
        *(f"{source.kind} annotations: {note}." for note in notes),
    ]


def _coco(
    matched: dict[str, AnnotatedPicture], root: Path, labels: Sequence[str], findings: Findings
) -> dict[str, list[Any]]:
    images: list[dict[str, Any]] = []
    rows: list[tuple[str, dict[str, Any]]] = []
    for file, picture in matched.items():
        try:
            size, _ = picture_size(file)
        except OSError as error:
            findings.fault("pictures that cannot be read", f"{file} ({error})")
            continue
        # What the annotations state is compared with the picture when the content is checked.
        height, width = stated = picture.size or size
        name = os.path.relpath(file, root)
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        seen: set[Any] = set()
        for each in picture.objects:
            entry = _entry(each, stated, picture.in_shares)
            problem = box_problem(entry["bbox"], stated)
            if problem is not None:
                findings.unusable(problem.kind, each.place)
                continue
            key = (each.label, *entry["bbox"], str(entry.get("segmentation", "")))
            if key in seen:
                findings.remark("duplicate objects, used once", each.place)
                continue
            seen.add(key)
            rows.append((each.label, {"id": len(rows) + 1, "image_id": image_id, **entry}))
    names = sorted({label for label, _ in rows}.union(labels))
    for name, count in Counter(simplified(" ".join(name.split())) for name in names).items():
        if count > 1:
            findings.remark("class names that differ by spelling alone, learned apart", name)
    ids = {label: number for number, label in enumerate(names, 1)}
    annotations = [{**entry, "category_id": ids[label]} for label, entry in rows]
    categories = [{"id": number, "name": label} for label, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _entry(each: AnnotatedObject, size: tuple[int, int], in_shares: bool) -> dict[str, Any]:
    """Write an object as a COCO annotation, cut at the border of its picture."""
    limits = np.array(size[::-1], float)
    scale = limits if in_shares else np.ones(2)
    corners = np.array(each.box).reshape(2, 2) * scale
    inside = corners.clip(0, limits)
    if (inside[1] - inside[0]).min() <= 0:
        inside = corners  # outside its picture: the check says so
    (x0, y0), (x1, y1) = inside.tolist()
    entry: dict[str, Any] = {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
    if each.mask is not None or each.polygons:
        entry["segmentation"] = each.mask or [
            (np.array(polygon).reshape(-1, 2) * scale).clip(0, limits).ravel().tolist()
            for polygon in each.polygons
        ]
        entry["area"] = mask_area(entry["segmentation"], size)
        if not entry["area"]:
            del entry["segmentation"]  # smaller than a pixel
    entry["area"] = entry.get("area") or entry["bbox"][2] * entry["bbox"][3]
    return entry
