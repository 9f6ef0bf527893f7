"""Reading of annotation files in COCO's instances format, each content once."""

from __future__ import annotations

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
_EXPECTED = "name a file in COCO's instances format"
logger = logging.getLogger(__name__)


class Coco(dict[str, list[Any]]):
    """The lists of a file."""

    # For each annotation, whether the check found that nothing of it needs a second look.
    plain: bytearray | None = None


# Contents of the files that were read or written last, so that checks, training, evaluation and
# report parse a file once. Nobody changes them.
_MOST_KEPT = 3
LARGE = 64 * 2**20  # bytes of a file whose content is not kept longer than needed
_SETTLED = 50_000_000  # nanoseconds; clocks of file systems tick every few milliseconds
_kept: dict[tuple[int, ...], Coco] = {}


class Heartbeat:
    """Function that returns its argument, and logs a line after every ten seconds of its calls."""

    seconds, every = 10.0, 1024  # the clock is looked at in every so many calls

    def __init__(self, what: str) -> None:
        self._what, self._count = what, 0
        self._due = time.monotonic() + self.seconds

    def __call__(self, entry: Any) -> Any:
        """Count an entry."""
        self._count += 1
        if self._count % self.every == 0 and time.monotonic() >= self._due:
            self._due = time.monotonic() + self.seconds
            logger.info("%s: %d entries so far.", self._what, self._count)
        return entry


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
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        InputError: the file is missing, unreadable, cut off, or in another encoding.
    """
    path = os.fspath(path)
    try:
        with PathManager.open(path, "rb") as stream:
            data = stream.read()
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
    if len(data) > LARGE:
        logger.info("Reading %s (%d MB).", path, len(data) >> 20)
    if other := describe_content(data):
        raise InputError(f"{path} is not JSON but {other}: {_EXPECTED}.")
    if not data or data.isspace():
        raise InputError(f"{path} is not JSON, it is empty: copy it again.")
    remedy = _EXPECTED
    try:
        with without_garbage_collection():
            text = data.decode(json.detect_encoding(data), "surrogatepass")
            del data  # as large as the text
            return json.loads(text, object_hook=Heartbeat("Reading") if len(text) > LARGE else None)
    except UnicodeDecodeError as error:
        reason, remedy = error, f"{_EXPECTED}, in UTF-8"
    except json.JSONDecodeError as error:
        reason = error
        # A literal such as `false` is reported at its beginning.
        if error.pos > len(error.doc.rstrip()) - 5 or error.msg.startswith("Unterminated string"):
            remedy = "the file ends in the middle of an entry, copy or write it again"
    except (ValueError, RecursionError) as error:
        reason = error
    raise InputError(f"{path} is not JSON ({reason}): {remedy}.")


def read_coco(json_file: str | os.PathLike[str], needed: tuple[str, ...] = COCO_LISTS) -> Coco:
    """Return the lists ``images``, ``annotations`` and ``categories`` of a file, not to be changed.

    A file that was read or written before, and is the same on the disk, is not parsed again. Lists
    that are not among the ``needed`` ones are included if they are there.

    Raises:
        InputError: the file cannot be read or lacks a list.
    """
    identity = _identity(json_file)
    content = _kept.get(identity)
    if content is None:
        lists = read_json(json_file)
        if not isinstance(lists, dict):
            raise InputError(
                f"{json_file} holds a {type(lists).__name__} and is not in COCO format: expected "
                f"an object with the lists {', '.join(COCO_LISTS)}."
            )
        content = Coco({key: lists[key] for key in COCO_LISTS if lists.get(key) is not None})
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
            f"{', '.join(lacking)}: {_EXPECTED}."
        )
    return content


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
