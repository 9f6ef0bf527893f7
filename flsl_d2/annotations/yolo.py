"""Reader of YOLO labels: one ``.txt`` a picture, a line an object, coordinates in shares of it.

A line is a class number and a box (centre, width, height), a polygon, or a box with key points
where ``data.yaml`` has ``kpt_shape``, as Ultralytics documents the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import (
    AnnotatedObject,
    AnnotatedPicture,
    box_of,
    number,
    read_text,
)
from flsl_d2.errors import InputError
from flsl_d2.images.opening import IMAGE_SUFFIXES

NAME_FILES = (
    *("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "_classes.txt"),
    "_darknet.labels",
)
# Shares beyond this are no rounding at the border but coordinates in pixels.
_FURTHEST_SHARE = 1.5


def is_yolo_line(line: str) -> bool:
    """Whether a line looks like an object."""
    try:
        values = [number(word) for word in line.split()]
    except ValueError:
        return False
    return len(values) >= 5 and values[0] >= 0


def read_yolo(
    path: Path, files: Sequence[Path], findings: Findings, names_file: Path | None = None
) -> list[AnnotatedPicture]:
    """Read label files; class names are looked for beside the labels unless a file is named.

    Raises:
        InputError: there are no class names, a class without a name, or key points that
            ``data.yaml`` does not describe.
    """
    classes, settings, names_file = _class_names(path, files, names_file)
    shape = settings.get("kpt_shape")
    try:
        key_points = 0 if not shape else int(shape[0]) * int(shape[1])
    except (TypeError, ValueError, LookupError):
        raise InputError(
            f"'{names_file}' has the kpt_shape {shape!r}; give two numbers, such as [17, 3]."
        ) from None
    texts = {file: read_text(file).splitlines() for file in files}
    if not key_points:
        _check_key_points(texts, names_file)
    pictures = []
    corners: set[int] = set()
    used: set[int] = set()

    def read_line(line: str, place: str) -> AnnotatedObject:
        label, values = _parse(line.split(), key_points)
        if max(map(abs, values)) > _FURTHEST_SHARE:
            raise ValueError("coordinates that are no shares of the picture from 0 to 1")
        if len(values) == 5:
            findings.remark("objects with a confidence, which is not used", place)
        if not classes.get(label):
            raise InputError(
                f"{place} has class {label}, and '{names_file}' has {len(classes)} class names and "
                "none for it; add the names or correct the numbers (they start at 0)."
            )
        used.add(label)
        if key_points:
            findings.remark("objects with key points, which are not used", place)
        if len(values) > 5:
            corners.add(len(values) // 2)
            return AnnotatedObject(place, classes[label], box_of(values), [values])
        x, y, width, height = values[:4]
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return AnnotatedObject(place, classes[label], box)

    for file, lines in texts.items():
        own = file.with_suffix("") if file.suffix.lower() == ".txt" else file
        with_suffix = own.suffix.lower() in IMAGE_SUFFIXES  # a.jpg.txt
        names: list[str | Path] = [own, str(own)] if with_suffix else [own]
        picture = AnnotatedPicture(str(file), names, in_shares=True)
        for index, line in enumerate(lines, 1):
            place = f"{file} line {index}"
            if line.strip():
                picture.add(place, partial(read_line, line, place), findings)
        pictures.append(picture)
    for label in sorted(classes.keys() - used):
        findings.remark("classes without an object, not learned from these labels", classes[label])
    for name, count in Counter(classes.values()).items():
        if count > 1:
            findings.remark("class names that several numbers have, learned as one class", name)
    if settings.get("nc", str(len(classes))) != str(len(classes)):
        sentence = f"'{names_file}' has nc {settings['nc']} and {len(classes)} names"
        findings.whole_file("remark", sentence)
    if corners == {4}:
        findings.whole_file(
            "remark",
            "all polygons have four corners: if they are rotated boxes, give --task boxes to learn "
            "the upright boxes around them",
        )
    return pictures


def _parse(words: list[str], key_points: int) -> tuple[int, list[float]]:
    """Read the class number and the coordinates of a line, without its key points."""
    label, *rest = [number(word) for word in words]
    if label != int(label) or label < 0:
        raise ValueError(f"{words[0]!r} is no class number")
    if key_points:
        if len(rest) != 4 + key_points:
            raise ValueError(f"{len(words)} numbers; expected {5 + key_points} with key points")
    elif len(rest) not in (4, 5) and (len(rest) < 6 or len(rest) % 2):
        raise ValueError(f"{len(words)} numbers; expected 5, or a class and a polygon")
    return int(label), rest[: -key_points or None]


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
    # The file lies beside labels/train in the layout of Ultralytics: two folders further up.
    folders = [path, path.parent, path.parent.parent, *dict.fromkeys(f.parent for f in files)]
    candidates = [folder / name for name in NAME_FILES for folder in folders]
    for file in [given] if given else filter(Path.is_file, candidates):
        text = read_text(file)
        if file.suffix.lower() not in (".yaml", ".yml"):
            lines = [line.strip() for line in text.rstrip().splitlines()]
            return dict(enumerate(lines)), {}, file
        try:
            settings = yaml.load(text, yaml.BaseLoader)  # of texts: a class may be called no
            names = settings["names"]
            if isinstance(names, str):
                raise TypeError("names is one text")
            numbered = names.items() if isinstance(names, dict) else enumerate(names)
            # JSON, which is read as YAML, may write a character as two halves.
            texts = {int(k): str(v).encode("utf-16", "surrogatepass") for k, v in numbered}
            return {k: text.decode("utf-16").strip() for k, text in texts.items()}, settings, file
        except KeyError:
            continue  # a YAML file of something else
        except (yaml.YAMLError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"'{file}' has no class names ({reason}); correct it.") from error
    raise InputError(
        f"'{path}' holds YOLO labels and no class names; put a data.yaml with names or a "
        "classes.txt there."
    )
