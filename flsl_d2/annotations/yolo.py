"""Reader of YOLO labels: one ``.txt`` a picture, a line an object, coordinates in shares of it.

A line is a class number and a box (centre, width, height), a polygon, or a box with key points
where ``data.yaml`` has ``kpt_shape``, as Ultralytics documents the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import (
    AnnotatedObject,
    AnnotatedPicture,
    box_of,
    number,
    pairs,
    read_text,
)
from flsl_d2.errors import InputError
from flsl_d2.images.listing import IMAGE_SUFFIXES

NAME_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "_classes.txt")
# Shares beyond this are no rounding at the border but coordinates in pixels.
_FURTHEST_SHARE = 1.5


def is_yolo_line(line: str) -> bool:
    """Whether a line looks like an object."""
    words = line.split()
    try:
        return len(words) >= 5 and number(words[0]) >= 0 and len([number(w) for w in words]) > 4
    except ValueError:
        return False


def read_yolo(
    path: Path, files: Sequence[Path], findings: Findings, names_file: Path | None = None
) -> list[AnnotatedPicture]:
    """Read label files.

    Args:
        path: folder of the labels.
        files: label files.
        findings: extended by what cannot be used.
        names_file: file with the class names; looked for beside the labels by default.

    Raises:
        InputError: there are no class names, a class without a name, or key points that
            ``data.yaml`` does not describe.
    """
    classes, settings, names_file = _class_names(path, files, names_file)
    shape = settings.get("kpt_shape")
    key_points = 0
    if shape is not None:
        try:
            key_points = int(shape[0]) * int(shape[1])
        except (TypeError, ValueError, LookupError):
            raise InputError(
                f"'{names_file}' has the kpt_shape {shape!r}; give two numbers, such as [17, 3]."
            ) from None
    texts = {file: read_text(file).splitlines() for file in files}
    if not key_points:
        _check_key_points(texts, names_file)
    pictures = []
    corners: set[int] = set()
    for file, lines in texts.items():
        own = file.with_suffix("") if file.suffix.lower() == ".txt" else file
        names: list[str | Path] = [own]
        if own.suffix.lower() in IMAGE_SUFFIXES:  # a.jpg.txt
            names.append(str(own))
        picture = AnnotatedPicture(str(file), names, in_shares=True)
        for index, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file} line {index}"
            try:
                label, rest = _parse(line.split(), key_points)
                coordinates = rest[: -key_points or None]
                if max(map(abs, coordinates)) > _FURTHEST_SHARE:
                    raise ValueError("coordinates that are no shares of the picture from 0 to 1")
                if len(rest) == 5 and not key_points:
                    coordinates = rest[:4]
                    findings.remark("objects with a confidence, which is not used", place)
            except ValueError as error:
                findings.unusable("lines that are no object", f"{place} ({error})")
                continue
            if label not in classes:
                raise InputError(
                    f"'{file}' has class {label} in line {index}, and '{names_file}' has "
                    f"{len(classes)} class names; add the names or correct the numbers (they start "
                    "at 0)."
                )
            if key_points:
                findings.remark("objects with key points, which are not used", place)
            picture.objects.append(_object(place, classes[label], coordinates))
            if len(coordinates) > 4:
                corners.add(len(coordinates) // 2)
        pictures.append(picture)
    if corners == {4}:
        findings.whole_file(
            "remark",
            "all polygons have four corners: if they are rotated boxes, give --task boxes to learn "
            "the upright boxes around them",
        )
    return pictures


def _parse(words: list[str], key_points: int) -> tuple[int, list[float]]:
    label, *rest = [number(word) for word in words]
    if label != int(label) or label < 0:
        raise ValueError(f"{words[0]!r} is no class number")
    if key_points:
        if len(rest) != 4 + key_points:
            raise ValueError(f"{len(words)} numbers; expected {5 + key_points} with key points")
    elif len(rest) not in (4, 5) and (len(rest) < 6 or len(rest) % 2):
        raise ValueError(f"{len(words)} numbers; expected 5, or a class and a polygon")
    return int(label), rest


def _object(place: str, label: str, values: list[float]) -> AnnotatedObject:
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return AnnotatedObject(place, label, box)
    return AnnotatedObject(place, label, box_of(pairs(values)), [values])


def _check_key_points(texts: dict[Path, list[str]], names_file: Path) -> None:
    """Refuse lines that are boxes with key points, of which visibilities are 0, 1 or 2."""
    lines = [line.split() for text in texts.values() for line in text if line.strip()]
    lengths = {len(words) for words in lines}
    if len(lengths) != 1 or (length := lengths.pop()) < 8 or (length - 5) % 3:
        return
    visibilities = {word for words in lines for word in words[7::3]}
    if visibilities <= {"0", "1", "2", "0.0", "1.0", "2.0", "0.000000", "1.000000", "2.000000"}:
        raise InputError(
            f"the labels of '{names_file.parent}' seem to be boxes with {(length - 5) // 3} key "
            f"points; put kpt_shape: [{(length - 5) // 3}, 3] into a data.yaml, so that their "
            "boxes are used."
        )


def _class_names(
    path: Path, files: Sequence[Path], given: Path | None
) -> tuple[dict[int, str], dict[str, Any], Path]:
    """Names by number, the settings of a YAML file, and the file."""
    folders = [path, path.parent, *dict.fromkeys(file.parent for file in files)]
    candidates = [folder / name for name in NAME_FILES for folder in folders]
    for file in [given] if given else candidates:
        if not file.is_file():
            continue
        text = read_text(file)
        if file.suffix in (".txt", ".names"):
            lines = [line.strip() for line in text.rstrip().splitlines()]
            return dict(enumerate(lines)), {}, file
        try:
            settings = yaml.safe_load(text)
            names = settings["names"]
            numbered = names.items() if isinstance(names, dict) else enumerate(names)
            if isinstance(names, str):
                raise TypeError("names is one text")
            return {int(key): str(name).strip() for key, name in numbered}, settings, file
        except KeyError:
            continue  # a YAML file of something else
        except (yaml.YAMLError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"'{file}' has no class names ({reason}); correct it.") from error
    raise InputError(
        f"'{path}' holds YOLO labels and no class names; put a data.yaml with names or a "
        "classes.txt there."
    )
