"""The record of a picture with its objects that the reader of every format makes."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flsl_d2.annotations.findings import Findings
from flsl_d2.errors import InputError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
# Corners of the polygon that stands for a circle or an ellipse.
_ROUND_CORNERS = 64


@dataclass(slots=True)
class AnnotatedObject:
    """One object.

    Attributes:
        place: file and line or number of the object, for messages.
        label: name of the class.
        box: corners in pixels, or in shares of the picture.
        polygons: outlines x0, y0, x1, y1, ... in the unit of the box; empty without any.
        mask: COCO's run-length mask of the whole picture, if there is one.
    """

    place: str
    label: str
    box: Box
    polygons: list[list[float]] = field(default_factory=list)
    mask: dict[str, Any] | None = None


@dataclass(slots=True)
class AnnotatedPicture:
    """A picture that annotations describe, before it is looked for.

    Attributes:
        place: annotation file, and entry in it, for messages.
        names: names that the picture may have, most trusted first: paths with suffix, or a
            ``Path`` without its suffix, which any suffix fits.
        objects: its objects.
        size: height and width that the annotations state.
        in_shares: whether coordinates are shares of the picture from 0 to 1.
    """

    place: str
    names: list[str | Path]
    objects: list[AnnotatedObject] = field(default_factory=list)
    size: tuple[int, int] | None = None
    in_shares: bool = False


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is no text in UTF-8 (byte {error.start}); save it in UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}); copy it again.") from error


def number(text: object) -> float:
    """Return a finite number.

    Raises:
        ValueError: the text is none.
    """
    if not isinstance(text, str | int | float) or isinstance(text, bool):
        raise ValueError(f"{text!r} is no number")
    try:
        value = float(text)
    except (ValueError, OverflowError):
        raise ValueError(f"{str(text)[:40]!r} is no number") from None
    if not math.isfinite(value):
        raise ValueError(f"{str(text)[:40]!r} is no number")
    return value


def simplified(name: str) -> str:
    """Return a name in one Unicode form, without differences of case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def box_of(points: Iterable[Sequence[float]]) -> Box:
    """Return the upright box around points (x, y)."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def turned(box: Box, radians: float) -> Box:
    """Return the upright box around one that is turned clockwise about its centre."""
    x0, y0, x1, y1 = box
    half_width, half_height = abs(x1 - x0) / 2, abs(y1 - y0) / 2
    sine, cosine = abs(math.sin(radians)), abs(math.cos(radians))
    dx = half_width * cosine + half_height * sine
    dy = half_width * sine + half_height * cosine
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - dx, y - dy, x + dx, y + dy


def ellipse(
    x: float, y: float, rx: float, ry: float, radians: float = 0.0
) -> tuple[Box, list[float]]:
    """Return the box around an ellipse, and a polygon for it."""
    sine, cosine = math.sin(radians), math.cos(radians)
    points: list[float] = []
    for step in range(_ROUND_CORNERS):
        angle = 2 * math.pi * step / _ROUND_CORNERS
        u, v = rx * math.cos(angle), ry * math.sin(angle)
        points += [x + u * cosine - v * sine, y + u * sine + v * cosine]
    dx, dy = math.hypot(rx * cosine, ry * sine), math.hypot(rx * sine, ry * cosine)
    return (x - dx, y - dy, x + dx, y + dy), points


def pairs(values: Sequence[float]) -> list[Sequence[float]]:
    """Split x0, y0, x1, y1, ... into points."""
    return [values[i : i + 2] for i in range(0, len(values), 2)]


def names_of(file: Path, stated: object) -> list[str | Path]:
    """List the names of a file's picture: the file's own without suffix, and the one it states."""
    own: list[str | Path] = [file.with_suffix("")]
    if not isinstance(stated, str) or not stated.strip():
        return own
    return [*own, str(file.parent / stated.strip().replace("\\", "/"))]


def trust_names(pictures: Sequence[AnnotatedPicture], findings: Findings) -> None:
    """Order the two names of :func:`names_of` by trust.

    Where they agree, the stated one comes first, because it has a suffix. Files that were copied
    or renamed state an old picture; so where most files agree with what they state, the name of
    the file is trusted in the others, and else what they state.
    """
    both = [picture for picture in pictures if len(picture.names) == 2]

    def agrees(picture: AnnotatedPicture) -> bool:
        own, stated = picture.names
        plain = os.path.basename(str(stated))
        same = {simplified(plain), simplified(os.path.splitext(plain)[0])}
        return simplified(os.path.basename(str(own))) in same

    agreeing = {id(picture) for picture in both if agrees(picture)}
    for picture in both:
        if id(picture) in agreeing:
            picture.names.reverse()
        elif 2 * len(agreeing) >= len(both):
            findings.remark(
                "files that state another picture than their own name, which is trusted",
                f"{picture.place} with {os.path.basename(str(picture.names[1]))}",
            )
        else:
            picture.names.reverse()
