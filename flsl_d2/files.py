"""Paths that users give, contents by their first bytes, whole files, and writable folders."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from flsl_d2.errors import InputError, MachineError

# The ending of a file's name while the file is written.
UNFINISHED = ".part"

# First bytes of files that people give by mistake: what they are, with the remedy.
_CONTENTS = {
    rb"version https://git-lfs\.": "a pointer of Git LFS (`git lfs pull` fetches the file itself)",
    rb"(?i)\s*<(!doctype|html|head)\b": "a web page (download the file from its direct address)",
    rb"\x1f\x8b": "compressed by gzip (unpack it)",
    rb"PK\x03\x04": "a ZIP archive (unpack it)",
    rb"(?s)....ftyp(hei|hev|mif1|msf1)": "a HEIC image (convert it to JPEG or PNG)",
    rb"(?s)....ftypavi[fs]": "an AVIF image (convert it to JPEG or PNG)",
    rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51": "a JPEG 2000 image (convert it to JPEG or PNG)",
    rb"\x93NUMPY": "a single NumPy array",
    rb"\x89HDF\r\n": "an HDF5 file, which Keras writes",
}


# Errors of the system that say nothing about the file which was to be read, and what helps.
_MACHINE_ERRORS = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to read it"),
    errno.ENOMEM: "use fewer workers, smaller batches or more memory",
    **dict.fromkeys(
        (
            *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
            *(errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN, errno.ENODEV),
        ),
        "check the disk, or the mount it lies on",
    ),
}


@contextmanager
def machine_errors(path: str = "") -> Iterator[None]:
    """Raise errors that are the machine's and not the file's as :class:`MachineError`.

    They are too many open files, no permission, a lost mount, and no memory. ``path`` is the file
    that is read, for the message; empty for the file that the error names.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        raise MachineError(
            f"'{path or error.filename}' cannot be read ({error.strerror}), which says nothing "
            f"about its content; {_MACHINE_ERRORS[error.errno]}"
        ) from error
    except MemoryError as error:
        raise MachineError(
            f"there is no memory left to read '{path}'; {_MACHINE_ERRORS[errno.ENOMEM]}"
        ) from error


def expand_home(value: Any) -> Any:
    """Replace a leading ``~`` by the home folder, in one path, in lists and in ``name=~/path``.

    A shell expands ``~`` only at the start of a word, so ``--weights=~/a.pth`` and ``key=~/a.pth``
    arrive as they were typed. Other values than texts and paths are returned unchanged.
    """
    if isinstance(value, list):
        return [expand_home(each) for each in value]
    if isinstance(value, Path):
        return value.expanduser()
    if not isinstance(value, str) or "~" not in value:
        return value
    name, equals, path = value.rpartition("=")
    if equals and path.startswith("~"):
        return f"{name}={os.path.expanduser(path)}"
    return os.path.expanduser(value)


def plain_line(text: object) -> str:
    """Replace what must not reach a terminal, a figure or a page as it is.

    White space of any kind becomes a blank; other control characters, lone surrogates and marks
    that turn the direction of writing become U+FFFD.
    """
    return "".join(" " if c.isspace() else "\ufffd" if _is_control(c) else c for c in str(text))


def _is_control(c: str) -> bool:
    turns = "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"
    return turns or unicodedata.category(c) in ("Cc", "Cs")


def describe_content(data: bytes) -> str:
    """Say what a file of these first bytes is, where its reader expects something else.

    Returns:
        A phrase that follows "the file is", with the remedy in brackets; empty where the content
        is none of those that are given by mistake.
    """
    return next((text for start, text in _CONTENTS.items() if re.match(start, data[:256])), "")


@contextmanager
def replaced_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces ``path`` once all of it is on the disk.

    Until then, and after any failure, ``path`` is what it was before. Several processes may write
    the same path at once: each has a temporary file of its own, and the last one to finish wins.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
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
    """Write a text file and its parent folders; a reader finds the old or the new content."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        file.write(text.encode("utf-8"))


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def writable_folder(path: str | Path, name: str = "") -> Path:
    """Make a folder, or raise an InputError with the option or key ``name`` that gave it."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        given = f"{name} is '{path}', which" if name else f"'{path}'"
        raise InputError(
            f"{given} cannot be written ({error.strerror}); give a folder that you may write."
        ) from error
    return folder


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a loss of power, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Longest name of a file without suffix, in bytes of UTF-8; file systems allow 255 with it.
_MAX_NAME = 180
_UNSAFE = re.compile(r'[<>:"/\\|?*]')


class OutputNames:
    """Allocator of names in one output folder: each unique, short enough, and fit for any system.

    Names that differ by letter case alone count as equal, because some file systems mix them up.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def free(self, stem: str, suffix: str = "") -> str:
        """Return a name without suffix for a stem of any characters and length."""
        shown = "".join(c if c.isprintable() else "_" for c in stem)
        plain = _UNSAFE.sub("_", shown).strip(" .") or "unnamed"
        plain = plain.encode("utf-8", "replace")[:_MAX_NAME].decode("utf-8", "ignore").rstrip(" .")
        name, count = plain, 1
        while f"{name}{suffix}".casefold() in self._taken:
            count += 1
            name = f"{plain}-{count}"
        self._taken.add(f"{name}{suffix}".casefold())
        return name
