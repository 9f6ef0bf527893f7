"""Reading of annotation files in COCO's instances format."""

from __future__ import annotations

import codecs
import gc
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.utils.file_io import PathManager

from flsl_d2.errors import InputError
from flsl_d2.files import describe_content, write_text

COCO_LISTS = ("images", "annotations", "categories")


class Coco(dict[str, list[Any]]):
    """The lists of a file.

    Attributes:
        plain: for each annotation, whether the check found that nothing of it needs a second
            look; None before the check.
    """

    plain: bytearray | None = None


logger = logging.getLogger(__name__)

# Contents of the files that were read or written last, so that checks, training, evaluation and
# report parse a file once. Nobody changes them.
_MOST_KEPT = 3
LARGE = 64 * 2**20  # bytes of a file whose content is not kept longer than needed
_SETTLED = 50_000_000  # nanoseconds; clocks of file systems tick every few milliseconds
_kept: dict[tuple[int, ...], Coco] = {}

# Little-endian UTF-32 begins with the mark of UTF-16.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Context for code that makes millions of containers, of which collecting doubles the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file is missing, unreadable, cut off, or in another encoding.
    """
    path = os.fspath(path)
    try:
        with PathManager.open(path, "rb") as stream:
            data = stream.read()
        if len(data) > LARGE:
            logger.info("Reading %s (%d MB).", path, len(data) >> 20)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"the annotation file {path} does not exist: put it there or set "
            "DETECTRON2_DATASETS to the folder that holds the data sets."
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the annotation file {path} cannot be read ({reason}): "
            "name a readable file in COCO format."
        ) from None
    text = _decode(data, path)
    del data  # as large as the text
    return _parse(text, path)


def _decode(data: bytes, path: str) -> str:
    other = describe_content(data)
    if other:
        raise InputError(f"{path} is not JSON but {other}: name a file in COCO's instances format.")
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise InputError(
                f"{path} is not JSON in UTF-8 but in {encoding}, as its byte order mark says: "
                "save it in UTF-8."
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not JSON ({error}): name a file in COCO's instances format, in UTF-8."
        ) from None


def _parse(text: str, path: str) -> Any:
    with without_garbage_collection():
        return _loads(text, path)


def _loads(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise InputError(f"{path} is not JSON, it is empty: copy it again.") from None
        # A literal such as `false` is reported at its beginning.
        cut = error.pos > len(text.rstrip()) - 5 or error.msg.startswith("Unterminated string")
        remedy = (
            "the file ends in the middle of an entry, copy or write it again"
            if cut
            else "name a file in COCO's instances format"
        )
        raise InputError(f"{path} is not JSON ({error}): {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}): name a file in COCO's instances format."
        ) from None


def read_coco(json_file: str | os.PathLike[str], needed: tuple[str, ...] = COCO_LISTS) -> Coco:
    """Return the lists ``images``, ``annotations`` and ``categories`` of a file, not to be changed.

    A file that was read or written before, and is the same on the disk, is not parsed again.

    Args:
        json_file: path of the file.
        needed: lists that the file must have; others are included if they are there.

    Raises:
        InputError: the file cannot be read or lacks a list.
    """
    identity = _identity(json_file)
    content = _kept.get(identity)
    if content is None:
        content = _lists(read_json(json_file), json_file)
        # A file that is written this very moment may change without another time of change.
        if identity and time.time_ns() - identity[-1] > _SETTLED:
            _keep(identity, content)
    lacking = [
        key
        for key in COCO_LISTS
        if not isinstance(content.get(key), list) and (key in needed or key in content)
    ]
    if lacking:
        raise InputError(
            f"{json_file} is not in COCO format, it lacks the list{'s' * (len(lacking) > 1)} "
            f"{', '.join(lacking)}: name a file in COCO's instances format."
        )
    return content


def _lists(content: Any, json_file: str | os.PathLike[str]) -> Coco:
    if not isinstance(content, dict):
        raise InputError(
            f"{json_file} holds a {type(content).__name__} and is not in COCO format: expected an "
            f"object with the lists {', '.join(COCO_LISTS)}."
        )
    return Coco({key: content[key] for key in COCO_LISTS if content.get(key) is not None})


def write_coco(path: str | os.PathLike[str], content: dict[str, list[Any]]) -> None:
    """Write a file, and keep its content for :func:`read_coco`."""
    write_text(os.fspath(path), json.dumps(content))
    keep_coco(path, Coco(content))


def keep_coco(path: str | os.PathLike[str], content: Coco) -> None:
    """Keep the content of a file, such as one that was moved, for :func:`read_coco`."""
    _keep(_identity(path), content)


def release_coco(json_file: str | os.PathLike[str]) -> None:
    """Free the content of a large file, of which the last reader has taken what it needs."""
    identity = _identity(json_file)
    if identity and identity[2] > LARGE:
        _kept.pop(identity, None)


def _identity(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return what differs between two files or two states of one; empty where it is unknown."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _keep(identity: tuple[int, ...], content: Coco) -> None:
    if identity:
        _kept.pop(identity, None)
        _kept[identity] = content
        while len(_kept) > _MOST_KEPT:
            del _kept[next(iter(_kept))]
