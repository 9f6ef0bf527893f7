"""The record of a picture with its objects that the reader of every format makes."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flsl_d2.annotations.findings import Findings
from flsl_d2.errors import InputError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
_ROUND_CORNERS = 64  # corners of the polygon that stands for a circle or an ellipse
TURNED = "rotated boxes, replaced by the upright boxes around them"


@dataclass(slots=True)
class AnnotatedObject:
    """One object."""

    place: str  # file and line or number of the object, for messages
    label: str
    box: Box  # in pixels, or in shares of the picture
    polygons: list[list[float]] = field(default_factory=list)  # x0, y0, x1, y1, ...
    mask: dict[str, Any] | None = None  # COCO's run-length mask of the whole picture
    group: str = ""  # number of the object whose parts several shapes are


@dataclass(slots=True)
class AnnotatedPicture:
    """A picture that annotations describe, before it is looked for."""

    place: str  # annotation file, and entry in it, for messages
    # Most trusted first: paths with suffix, or a Path without its suffix, which any suffix fits.
    names: list[str | Path]
    objects: list[AnnotatedObject] = field(default_factory=list)
    size: tuple[int, int] | None = None  # height and width that the annotations state
    in_shares: bool = False  # coordinates are shares of the picture from 0 to 1

    def add(
        self, place: str, make: Callable[[], AnnotatedObject | None], findings: Findings
    ) -> None:
        """Add what ``make`` returns, or note why the object cannot be read."""
        try:
            made = make()
        except InputError:  # of the whole file
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            plain = type(error) is ValueError
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            name = "" if plain or isinstance(error, KeyError) else f"{type(error).__name__}: "
            findings.unusable("objects that cannot be read", f"{place} ({name}{reason})")
        else:
            if made is not None:
                self.objects.append(made)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is no text in UTF-8 (byte {error.start}); save it in UTF-8."
        ) from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}); copy it again.") from error


def number(text: object) -> float:
    """Return a finite number; anything else is a ValueError."""
    try:
        value = math.nan if isinstance(text, bool) else float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{str(text)[:40]!r} is no number")
    return value


def label_of(text: object) -> str:
    """Return the name of a class; a missing or empty one is a ValueError."""
    if type(text) not in (str, int) or not str(text).strip():
        raise ValueError("it has no label")
    return str(text).strip()


def stated_size(height: object, width: object) -> tuple[int, int] | None:
    """Return the stated size of a picture; tools write 0 or nothing where they do not know it."""
    try:
        size = int(number(height)), int(number(width))
    except ValueError:
        return None
    return size if min(size) > 0 else None


def simplified(name: str) -> str:
    """Return a name in one Unicode form, without differences of case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def box_of(points: Sequence[Sequence[float]] | Sequence[float]) -> Box:
    """Return the upright box around points (x, y), or x0, y0, x1, y1, ..."""
    corners = np.reshape(np.asarray(points, float), (-1, 2))
    (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
    return x0, y0, x1, y1


def turned(box: Box, radians: float) -> Box:
    """Return the upright box around one that is turned clockwise about its centre."""
    x0, y0, x1, y1 = box
    sine, cosine = abs(math.sin(radians)), abs(math.cos(radians))
    dx = abs(x1 - x0) / 2 * cosine + abs(y1 - y0) / 2 * sine
    dy = abs(x1 - x0) / 2 * sine + abs(y1 - y0) / 2 * cosine
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - dx, y - dy, x + dx, y + dy


def ellipse(
    x: float, y: float, rx: float, ry: float, radians: float = 0.0
) -> tuple[Box, list[float]]:
    """Return the box around an ellipse, and a polygon for it."""
    sine, cosine = math.sin(radians), math.cos(radians)
    angle = np.linspace(0, 2 * np.pi, _ROUND_CORNERS, endpoint=False)
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    points = np.stack([x + u * cosine - v * sine, y + u * sine + v * cosine], axis=1)
    dx, dy = math.hypot(rx * cosine, ry * sine), math.hypot(rx * sine, ry * cosine)
    return (x - dx, y - dy, x + dx, y + dy), points.ravel().tolist()


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

    def agrees(picture: AnnotatedPicture) -> bool:
        own, stated = (simplified(os.path.basename(str(name))) for name in picture.names)
        return own in (stated, os.path.splitext(stated)[0])

    both = [picture for picture in pictures if len(picture.names) == 2]
    agreeing = [agrees(picture) for picture in both]
    for picture, same in zip(both, agreeing, strict=True):
        if same or 2 * sum(agreeing) < len(both):
            picture.names.reverse()
        else:
            findings.remark(
                "files that state another picture than their own name, which is trusted",
                f"{picture.place} with {os.path.basename(str(picture.names[1]))}",
            )
