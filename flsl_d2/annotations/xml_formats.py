"""Readers of Pascal VOC's files, one ``.xml`` a picture, and of CVAT's, one ``.xml`` for all.

Pascal VOC's extensions by roLabelImg (``robndbox``) and Roboflow (``polygon``) are read, and both
of CVAT's formats, for images and for video.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import (
    AnnotatedObject,
    AnnotatedPicture,
    Box,
    box_of,
    ellipse,
    names_of,
    number,
    pairs,
    trust_names,
    turned,
)
from flsl_d2.annotations.shapes import encode_part
from flsl_d2.errors import InputError

_TURNED = "rotated boxes, replaced by the upright boxes around them"


def xml_root(path: Path) -> str:
    """Name of an XML file's outermost element; empty where it is no XML."""
    try:
        with path.open("rb") as file:
            _, root = next(iter(ElementTree.iterparse(file, events=("start",))))
    except (OSError, ElementTree.ParseError, StopIteration, ValueError):
        return ""
    return str(root.tag)


def _parse(path: Path) -> Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"'{path}' is not whole XML ({error}); copy or write it again.") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}); copy it again.") from error


def read_voc(path: Path, files: Sequence[Path], findings: Findings) -> list[AnnotatedPicture]:
    """Read Pascal VOC's files; one that is no XML is a fault.

    Args:
        path: folder of the files.
        files: the files.
        findings: extended by what cannot be used.
    """
    pictures = []
    for file in files:
        try:
            root = _parse(file)
        except InputError as error:
            findings.fault("files that cannot be read", str(error))
            continue
        if root.tag != "annotation":
            findings.remark("files that are not Pascal VOC's, not used", file)
            continue
        picture = AnnotatedPicture(str(file), names_of(file, root.findtext("filename")))
        picture.size = _size(root.findtext("size/height"), root.findtext("size/width"))
        for index, node in enumerate(root.iter("object"), 1):
            place = f"{file} object {index}"
            for name in ("difficult", "truncated", "occluded"):
                if (node.findtext(name) or "").strip() not in ("", "0"):
                    findings.remark(f"objects marked {name}, used like others", place)
            for _ in node.iter("part"):
                findings.remark("parts of objects, not used", place)
            try:
                picture.objects.append(_voc_object(place, node, findings))
            except ValueError as error:
                findings.unusable("objects without a usable box", f"{place} ({error})")
        pictures.append(picture)
    trust_names(pictures, findings)
    return pictures


def _size(height: str | None, width: str | None) -> tuple[int, int] | None:
    """Return a stated size; labelling tools write 0 where they did not know it."""
    try:
        size = int(number(height)), int(number(width))
    except ValueError:
        return None
    return size if min(size) > 0 else None


def _voc_object(place: str, node: Element, findings: Findings) -> AnnotatedObject:
    label = (node.findtext("name") or "").strip()
    if not label:
        raise ValueError("it has no name")
    polygons = []
    for outline in node.findall("polygon"):
        points = {child.tag: number(child.text) for child in outline}
        count = len(points) // 2
        try:
            values = [points[f"{axis}{i}"] for i in range(1, count + 1) for axis in "xy"]
        except KeyError as error:
            raise ValueError(f"a polygon without {error}") from None
        if count > 2:
            polygons.append(values)
    box = _voc_box(node)
    if box is None and (rotated := node.find("robndbox")) is not None:
        x, y, width, height, angle = (
            number(rotated.findtext(key)) for key in ("cx", "cy", "w", "h", "angle")
        )
        findings.remark(_TURNED, place)
        box = turned((x - width / 2, y - height / 2, x + width / 2, y + height / 2), angle)
    if box is None and polygons:
        box = box_of(pairs([value for polygon in polygons for value in polygon]))
    if box is None:
        raise ValueError("it has no bndbox")
    return AnnotatedObject(place, label, box, polygons)


def _voc_box(node: Element) -> Box | None:
    box = node.find("bndbox")
    if box is None:
        return None
    x0, y0, x1, y1 = (number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    return box_of([(x0, y0), (x1, y1)])


def read_cvat(path: Path, files: Sequence[Path], findings: Findings) -> list[AnnotatedPicture]:
    """Read a file of CVAT for images 1.1, or of CVAT for video 1.1, whose frames are numbered.

    Args:
        path: the file.
        files: not used.
        findings: extended by what cannot be used.

    Raises:
        InputError: the file is no whole XML.
    """
    root = _parse(path)
    pictures = []
    for node in root.iter("image"):
        name = node.get("name", "")
        place = f"{path} image {name or node.get('id')}"
        picture = AnnotatedPicture(place, [name] if name else [])
        picture.size = _size(node.get("height"), node.get("width"))
        _add_shapes(picture, node, findings)
        pictures.append(picture)
    frames: dict[int, AnnotatedPicture] = {}
    size = _size(root.findtext(".//original_size/height"), root.findtext(".//original_size/width"))
    for track in root.iter("track"):
        for node in track:
            place = f"{path} track {track.get('id')} frame {node.get('frame')}"
            if node.get("outside") == "1":
                continue  # the track ends here, and no object is there
            if not re.fullmatch(r"\d+", node.get("frame") or ""):
                findings.unusable("shapes without a frame", place)
                continue
            frame = int(node.get("frame", ""))
            names: list[str | Path] = [Path(f"frame_{frame:06d}"), Path(f"{frame:06d}")]
            picture = frames.setdefault(
                frame, AnnotatedPicture(f"{path} frame {frame}", names, size=size)
            )
            node.set("label", track.get("label", ""))
            _add_shape(picture, node, place, findings)
    return [*pictures, *frames.values()]


def _add_shapes(picture: AnnotatedPicture, parent: Element, findings: Findings) -> None:
    for index, node in enumerate(parent, 1):
        _add_shape(picture, node, f"{picture.place} shape {index}", findings)


def _add_shape(picture: AnnotatedPicture, node: Element, place: str, findings: Findings) -> None:
    reader = _CVAT_SHAPES.get(node.tag)
    if reader is None:
        findings.remark(f"shapes of the kind {node.tag}, not used", place)
        return
    if len(node):
        findings.remark("objects with attributes, which are not used", place)
    if node.get("group_id", "0") not in ("", "0"):
        findings.remark("objects with a group_id, each used by itself", place)
    try:
        label = node.attrib["label"].strip()
        if not label:
            raise ValueError("it has no label")
        box, polygons, mask = reader(node, picture, place, findings)
    except (ValueError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        findings.unusable("shapes that cannot be read", f"{place} ({reason})")
        return
    picture.objects.append(AnnotatedObject(place, label, box, polygons, mask))


def _values(node: Element, *names: str) -> list[float]:
    return [number(node.attrib[name]) for name in names]


def _turn_of(node: Element) -> float:
    return math.radians(number(node.get("rotation", "0")) % 360)


def _box(node, picture, place, findings):  # type: ignore[no-untyped-def]
    x0, y0, x1, y1 = _values(node, "xtl", "ytl", "xbr", "ybr")
    box, angle = box_of([(x0, y0), (x1, y1)]), _turn_of(node)
    if angle:
        findings.remark(_TURNED, place)
        box = turned(box, angle)
    return box, [], None


def _polygon(node, picture, place, findings):  # type: ignore[no-untyped-def]
    values = [number(v) for pair in node.attrib["points"].split(";") for v in pair.split(",")]
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"a polygon of {len(values)} coordinates")
    return box_of(pairs(values)), [values], None


def _ellipse(node, picture, place, findings):  # type: ignore[no-untyped-def]
    x, y, rx, ry = _values(node, "cx", "cy", "rx", "ry")
    box, outline = ellipse(x, y, rx, ry, _turn_of(node))
    return box, [outline], None


def _mask(node, picture, place, findings):  # type: ignore[no-untyped-def]
    left, top, width, height = (round(v) for v in _values(node, "left", "top", "width", "height"))
    runs = np.array([int(number(run)) for run in node.attrib["rle"].split(",")])
    if picture.size is None or min(width, height) < 1 or runs.min() < 0:
        raise ValueError("a mask without a size")
    if runs.sum() != width * height:
        raise ValueError("a mask that does not fill its box")
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    box, mask = encode_part(pixels, left, top, picture.size)
    return box, [], mask


_CVAT_SHAPES = {"box": _box, "polygon": _polygon, "ellipse": _ellipse, "mask": _mask}
