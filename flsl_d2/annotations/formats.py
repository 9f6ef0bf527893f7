"""Readers of Pascal VOC and LabelMe, a file for each picture, and of CVAT, one ``.xml`` for all.

Pascal VOC's extensions by roLabelImg (``robndbox``) and Roboflow (``polygon``) are read, and both
of CVAT's formats, for images and for video. A reader takes the path, the annotation files, and the
findings to add to; a file that cannot be parsed is a fault.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from flsl_d2.annotations.coco_file import read_json
from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import (
    TURNED,
    AnnotatedObject,
    AnnotatedPicture,
    box_of,
    ellipse,
    label_of,
    names_of,
    number,
    stated_size,
    trust_names,
    turned,
)
from flsl_d2.annotations.shapes import encode_part
from flsl_d2.errors import InputError
from flsl_d2.images.opening import open_picture

# Parts of an object in Pascal VOC that are read, or say nothing about it.
_VOC_PARTS = {
    *("name", "bndbox", "robndbox", "polygon", "part", "difficult", "truncated", "occluded"),
    *("pose", "type"),
}


def xml_root(path: Path) -> str:
    """Name of an XML file's outermost element; empty where it is no XML."""
    try:
        with path.open("rb") as file:
            _, root = next(iter(ElementTree.iterparse(file, events=("start",))))
    except (OSError, ElementTree.ParseError, StopIteration, ValueError):
        return ""
    return str(root.tag)


def read_xml(path: Path) -> Element:
    """Parse an XML file; one that is cut off or unreadable is an InputError."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"'{path}' is not whole XML ({error}); copy or write it again.") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}); copy it again.") from error


def is_labelme(content: Any) -> bool:
    """Whether the content of a JSON file is LabelMe's."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


# Name that the file states, height, width, and objects.
_Described = tuple[object, object, object, Iterable[Any]]
_Make = Callable[[str, Any, AnnotatedPicture, Findings], AnnotatedObject | None]


def _one_each(
    files: Sequence[Path],
    load: Callable[[Path], Any],
    describe: Callable[[Any], _Described | None],
    make: _Make,
    findings: Findings,
) -> list[AnnotatedPicture]:
    """Read files that describe one picture each."""
    pictures = []
    for file in files:
        try:
            described = describe(load(file))
        except InputError as error:
            findings.fault("files that cannot be read", str(error))
            continue
        if described is None:
            findings.remark("files of another kind, not used", file)
            continue
        stated, height, width, entries = described
        picture = AnnotatedPicture(str(file), names_of(file, stated))
        picture.size = stated_size(height, width)
        _add_all(picture, entries, make, findings)
        pictures.append(picture)
    trust_names(pictures, findings)
    return pictures


def _add_all(
    picture: AnnotatedPicture, entries: Iterable[Any], make: _Make, findings: Findings
) -> None:
    for index, entry in enumerate(entries, 1):
        place = f"{picture.place} object {index}"
        picture.add(place, partial(make, place, entry, picture, findings), findings)


def read_voc(path: Path, files: Sequence[Path], findings: Findings) -> list[AnnotatedPicture]:
    """Read Pascal VOC's files."""

    def describe(root: Element) -> _Described | None:
        if root.tag != "annotation":
            return None
        size = root.findtext("size/height"), root.findtext("size/width")
        return root.findtext("filename"), *size, root.iter("object")

    return _one_each(files, read_xml, describe, _voc_object, findings)


def _voc_object(
    place: str, node: Element, picture: AnnotatedPicture, findings: Findings
) -> AnnotatedObject:
    for name in ("difficult", "truncated", "occluded"):
        if (node.findtext(name) or "").strip() not in ("", "0"):
            findings.remark(f"objects marked {name}, used like others", place)
    for _ in node.iter("part"):
        findings.remark("parts of objects, not used", place)
    counts = Counter(child.tag for child in node)
    boxes = counts["bndbox"] + counts["robndbox"]
    if boxes > 1:
        findings.remark("objects with several boxes, of which the first is used", place)
    for tag in counts.keys() - _VOC_PARTS:
        findings.remark(f"objects with {tag}, which is not used", place)
    made = AnnotatedObject(place, label_of(node.findtext("name")), (0, 0, 0, 0))
    for outline in node.findall("polygon"):
        points = {child.tag: number(child.text) for child in outline}
        names = [f"{axis}{i}" for i in range(1, len(points) // 2 + 1) for axis in "xy"]
        if len(names) > 4:
            made.polygons.append([points[name] for name in names])
    if (box := node.find("bndbox")) is not None:
        made.box = box_of([number(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax")])
    elif (box := node.find("robndbox")) is not None:
        findings.remark(TURNED, place)
        x, y, w, h, angle = (number(box.findtext(k)) for k in ("cx", "cy", "w", "h", "angle"))
        made.box = turned((x - w / 2, y - h / 2, x + w / 2, y + h / 2), angle)
    elif made.polygons:
        made.box = box_of([value for polygon in made.polygons for value in polygon])
    else:
        raise ValueError("it has no bndbox")
    return made


def read_labelme(path: Path, files: Sequence[Path], findings: Findings) -> list[AnnotatedPicture]:
    """Read LabelMe's files; polygons of one label and ``group_id`` are one object."""

    def describe(content: Any) -> _Described | None:
        if not is_labelme(content):
            return None
        stated, height, width = (content.get(f"image{k}") for k in ("Path", "Height", "Width"))
        return stated, height, width, content["shapes"]

    pictures = _one_each(files, read_json, describe, _labelme_object, findings)
    for picture in pictures:
        joined: dict[tuple[str, str], AnnotatedObject] = {}
        for each in picture.objects:
            first = joined.setdefault((each.label, each.group or each.place), each)
            if first is not each:
                findings.remark("objects of several shapes with one label and group_id", each.place)
                first.box = box_of([*first.box, *each.box])
                first.polygons += each.polygons
        picture.objects = list(joined.values())
    return pictures


def _labelme_object(
    place: str, shape: Any, picture: AnnotatedPicture, findings: Findings
) -> AnnotatedObject | None:
    kind = shape.get("shape_type") or "polygon"
    if kind in ("point", "points", "line", "linestrip"):
        findings.remark(f"shapes of the kind {kind}, not used", place)
        return None
    label = label_of(shape.get("label"))
    points = [(number(x), number(y)) for x, y in shape["points"]]
    if any((shape.get("flags") or {}).values()):
        findings.remark("objects with flags, which are not used", place)
    if shape.get("difficult"):
        findings.remark("objects marked difficult, used like others", place)
    group = shape.get("group_id")
    if group is not None and kind != "polygon":
        findings.remark("objects with a group_id, each used by itself", place)
    if kind == "circle":
        (x, y), (u, v) = points
        box, outline = ellipse(x, y, math.hypot(u - x, v - y), math.hypot(u - x, v - y))
        return AnnotatedObject(place, label, box, [outline])
    if kind == "mask":
        data = base64.b64decode(shape["mask"])
        part = np.asarray(open_picture(data).convert("L")) > 0
        if picture.size is None:
            raise ValueError("a mask, and no imageHeight and imageWidth")
        box, mask = encode_part(part, round(points[0][0]), round(points[0][1]), picture.size)
        return AnnotatedObject(place, label, box, [], mask)
    # X-AnyLabeling calls a rotated box a rotation.
    least = {"rectangle": 2, "polygon": 3, "oriented_rectangle": 3, "rotation": 3}
    if len(points) < least.get(kind, math.inf):
        raise ValueError(f"a {kind} of {len(points)} points")
    if kind in ("oriented_rectangle", "rotation"):
        findings.remark(TURNED, place)
    if kind != "polygon":
        return AnnotatedObject(place, label, box_of(points))
    made = AnnotatedObject(place, label, box_of(points), [[v for point in points for v in point]])
    made.group = "" if group is None else f"group {group}"
    return made


def read_cvat(path: Path, files: Sequence[Path], findings: Findings) -> list[AnnotatedPicture]:
    """Read a file of CVAT for images 1.1, or of CVAT for video 1.1, whose frames are numbered."""
    root = read_xml(path)
    pictures = []
    for node in root.iter("image"):
        name = node.get("name", "")
        picture = AnnotatedPicture(f"{path} image {name or node.get('id')}", [name] if name else [])
        picture.size = stated_size(node.get("height"), node.get("width"))
        _add_all(picture, node, _cvat_object, findings)
        pictures.append(picture)
    frames: dict[int, AnnotatedPicture] = {}
    size = root.find(".//original_size")
    for place, node in _track_shapes(root, path):
        if not re.fullmatch(r"\d+", node.get("frame") or ""):
            findings.unusable("shapes without a frame", place)
            continue
        frame = int(node.get("frame", ""))
        names: list[str | Path] = [Path(f"frame_{frame:06d}"), Path(f"{frame:06d}")]
        picture = frames.setdefault(frame, AnnotatedPicture(f"{path} frame {frame}", names))
        if size is not None:
            picture.size = stated_size(size.findtext("height"), size.findtext("width"))
        picture.add(place, partial(_cvat_object, place, node, picture, findings), findings)
    return [*pictures, *frames.values()]


def _track_shapes(root: Element, path: Path) -> Iterator[tuple[str, Element]]:
    for track in root.iter("track"):
        for node in track:
            if node.get("outside") != "1":  # else the track ends here, and no object is there
                for key in ("label", "group_id"):
                    node.set(key, track.get(key, ""))
                yield f"{path} track {track.get('id')} frame {node.get('frame')}", node


def _cvat_object(
    place: str, node: Element, picture: AnnotatedPicture, findings: Findings
) -> AnnotatedObject | None:
    if node.tag not in ("box", "polygon", "ellipse", "mask"):
        findings.remark(f"shapes of the kind {node.tag}, not used", place)
        return None
    if len(node):
        findings.remark("objects with attributes, which are not used", place)
    if node.get("group_id", "0") not in ("", "0"):
        findings.remark("objects with a group_id, each used by itself", place)

    def values(*names: str) -> list[float]:
        return [number(node.attrib[name]) for name in names]

    label = label_of(node.get("label"))
    angle = math.radians(number(node.get("rotation", "0")) % 360)
    if node.tag == "box":
        if angle:
            findings.remark(TURNED, place)
        box = turned(box_of(values("xtl", "ytl", "xbr", "ybr")), angle)
        return AnnotatedObject(place, label, box)
    if node.tag == "polygon":
        outline = [number(v) for pair in node.attrib["points"].split(";") for v in pair.split(",")]
        if len(outline) < 6 or len(outline) % 2:
            raise ValueError(f"a polygon of {len(outline)} coordinates")
        return AnnotatedObject(place, label, box_of(outline), [outline])
    if node.tag == "ellipse":
        box, outline = ellipse(*values("cx", "cy", "rx", "ry"), angle)  # type: ignore[call-arg]
        return AnnotatedObject(place, label, box, [outline])
    left, top, width, height = (round(v) for v in values("left", "top", "width", "height"))
    runs = np.array([int(number(run)) for run in node.attrib["rle"].split(",")])
    if picture.size is None or min(width, height) < 1 or runs.min() < 0:
        raise ValueError("a mask without a size")
    if runs.sum() != width * height:
        raise ValueError("a mask that does not fill its box")
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    box, mask = encode_part(pixels, left, top, picture.size)
    return AnnotatedObject(place, label, box, [], mask)
