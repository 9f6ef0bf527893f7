"""Files that are whole or not there, and folders that are known to be writable beforehand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flsl_d2.errors import InputError

__all__ = ["UNFINISHED", "replaced_file", "writable_folder", "write_text"]

# What the name of a file ends in while it is written.
UNFINISHED = ".part"


@contextmanager
def replaced_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file, open for writing, that takes the place of ``path`` once all of it is on the disk.

    Until then, and after any failure, ``path`` is what it was before.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + UNFINISHED)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a reader finds the old content or the new, never a part.

    Folders on the way to it are made.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        file.write(text.encode("utf-8"))


def writable_folder(path: str | Path, name: str = "") -> Path:
    """Make a folder, and try whether a file can be made in it.

    Args:
        path: of the folder.
        name: of the option or config key that gave the path, for the message.

    Raises:
        InputError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        given = f"{name} is '{path}', which" if name else f"'{path}'"
        raise InputError(
            f"{given} cannot be written ({error.strerror}); give a folder of yours."
        ) from error
    return folder


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a loss of power; not all file systems know how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
