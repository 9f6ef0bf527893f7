"""Reader of LabelMe's files: one ``.json`` a picture."""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flsl_d2.annotations.coco_file import read_json
from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import (
    AnnotatedObject,
    AnnotatedPicture,
    box_of,
    ellipse,
    names_of,
    number,
    trust_names,
)
from flsl_d2.annotations.shapes import encode_part
from flsl_d2.errors import InputError

_NO_AREA = ("point", "points", "line", "linestrip")


def is_labelme(content: Any) -> bool:
    """Whether the content of a JSON file is LabelMe's."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read_labelme(path: Path, files: Sequence[Path], findings: Findings) -> list[AnnotatedPicture]:
    """Read annotation files; one that is no JSON is a fault.

    Args:
        path: folder of the files.
        files: the files.
        findings: extended by what cannot be used.
    """
    pictures = []
    for file in files:
        try:
            content = read_json(file)
        except InputError as error:
            findings.fault("files that cannot be read", str(error))
            continue
        if not is_labelme(content):
            findings.remark("files that are not LabelMe's, not used", file)
            continue
        picture = AnnotatedPicture(str(file), names_of(file, content.get("imagePath")))
        height, width = content.get("imageHeight"), content.get("imageWidth")
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            picture.size = height, width
        parts: dict[tuple[str, str], list[AnnotatedObject]] = defaultdict(list)
        for index, shape in enumerate(content["shapes"]):
            place = f"{file} shapes[{index}]"
            try:
                made = _object(place, shape, picture.size, findings)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
                reason = (
                    f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
                )
                findings.unusable("shapes that are no object", f"{place} ({reason})")
                continue
            if made is None:
                continue
            group = shape.get("group_id")
            key = str(index) if group is None or not made.polygons else f"group {group}"
            parts[made.label, key].append(made)
        picture.objects = [_joined(each, findings) for each in parts.values()]
        pictures.append(picture)
    trust_names(pictures, findings)
    return pictures


def _object(
    place: str, shape: dict[str, Any], size: tuple[int, int] | None, findings: Findings
) -> AnnotatedObject | None:
    kind = shape.get("shape_type") or "polygon"
    if kind in _NO_AREA:
        findings.remark(f"shapes of the kind {kind}, not used", place)
        return None
    label = shape["label"]
    if type(label) is int:
        label = str(label)
    if not isinstance(label, str) or not label.strip():
        raise ValueError("it has no label")
    points = [(number(x), number(y)) for x, y in shape["points"]]
    if any((shape.get("flags") or {}).values()):
        findings.remark("objects with flags, which are not used", place)
    if kind == "rectangle":
        if len(points) < 2:
            raise ValueError("a rectangle of one point")
        return AnnotatedObject(place, label, box_of(points))
    if kind == "circle":
        (x, y), (u, v) = points
        radius = math.hypot(u - x, v - y)
        box, outline = ellipse(x, y, radius, radius)
        return AnnotatedObject(place, label, box, [outline])
    if kind == "mask":
        data = base64.b64decode(shape["mask"])
        part = np.asarray(Image.open(io.BytesIO(data)).convert("L")) > 0
        if size is None:
            raise ValueError("a mask, and no imageHeight and imageWidth")
        box, mask = encode_part(part, round(points[0][0]), round(points[0][1]), size)
        return AnnotatedObject(place, label, box, [], mask)
    if kind not in ("polygon", "oriented_rectangle") or len(points) < 3:
        raise ValueError(f"a {kind} of {len(points)} points")
    if kind == "oriented_rectangle":
        findings.remark("rotated boxes, replaced by the upright boxes around them", place)
        return AnnotatedObject(place, label, box_of(points))
    return AnnotatedObject(place, label, box_of(points), [[c for point in points for c in point]])


def _joined(parts: list[AnnotatedObject], findings: Findings) -> AnnotatedObject:
    """Join the polygons of one label and group_id to one object, as LabelMe means them."""
    first, *rest = parts
    if rest:
        findings.remark("objects of several shapes with one label and group_id", first.place)
        corners = [corner for part in parts for corner in (part.box[:2], part.box[2:])]
        first.box = box_of(corners)
        first.polygons = [polygon for part in parts for polygon in part.polygons]
    return first
