"""Files of a server, by URLs that fsspec knows (s3, gs, http), and copies on the local disk."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import writable_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Name of a file, first byte, and byte behind the last; None for whole files.
Range = tuple[str, int | None, int | None]
# The first pause before a server is asked again, and the longest, in seconds.
_PAUSES = (0.25, 8.0)
# Answers that another attempt does not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)
# Share of the patience after which a request without an answer is given up and made anew.
_PATIENCE_OF_A_REQUEST = 0.45
_PATIENCE_OF_A_LIST = 10.0
_COPIES_IN_A_FOLDER = 1000


class Server:
    """Files below a URL. A request that fails or gets no answer is repeated.

    ``patience`` is the time in seconds from the start of a request to its last repetition.
    """

    def __init__(self, url: str, patience: float) -> None:
        self.url, self.patience = url.rstrip("/"), patience
        self._opened: tuple[int, Any, str] | None = None
        self._connection()

    def _connection(self) -> tuple[Any, str]:
        """Return fsspec's file system and the path in it; a process needs its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                self._opened = (os.getpid(), *url_to_fs(self.url))
            except (ImportError, ValueError) as error:
                raise InputError(
                    f"'{self.url}' cannot be opened ({error}); install flsl-d2[remote], and s3fs "
                    "for s3:// or gcsfs for gs://."
                ) from error
        return self._opened[1], self._opened[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read_file(self, name: str) -> bytes:
        """Read a whole file; one that is not there is a FileNotFoundError."""
        (content,) = self.read([(name, None, None)])
        if isinstance(content, OSError):
            raise content
        return content

    def read(self, ranges: Sequence[Range]) -> list[bytes | OSError]:
        """Return the content of each range of bytes, or an error for one that cannot be had.

        Raises:
            TrainingError: the server does not answer.
        """
        answers: dict[int, bytes | OSError] = {}

        def ask() -> None:
            waiting = [i for i in range(len(ranges)) if i not in answers]
            files, root = self._connection()
            names, starts, ends = zip(*(ranges[i] for i in waiting), strict=True)
            paths = [f"{root}/{name}" for name in names]
            found = files.cat_ranges(paths, list(starts), list(ends), on_error="return")
            failures = []
            for i, answer, start, end in zip(waiting, found, starts, ends, strict=True):
                if isinstance(answer, _FINAL):
                    answers[i] = answer
                elif isinstance(answer, Exception):
                    failures.append(answer)
                elif start is not None and end is not None and len(answer) != end - start:
                    failures.append(OSError(f"{len(answer)} bytes instead of {end - start}"))
                else:
                    answers[i] = bytes(answer)
            if failures:
                raise failures[0]

        if ranges:
            self._repeated(ask)
        return [answers[i] for i in range(len(ranges))]

    def list_files(self) -> dict[str, int | None]:
        """Return the names of all files below the folder, and their sizes where they are known."""

        def ask() -> dict[str, int | None]:
            files, root = self._connection()
            found = files.find(root, detail=True)
            return {name[len(root) + 1 :]: entry.get("size") for name, entry in found.items()}

        return self._repeated(ask, _PATIENCE_OF_A_LIST * self.patience)

    def _repeated(self, ask: Callable[[], T], limit: float = 0.0) -> T:
        """Ask until there is an answer; a request that takes longer than a limit has failed."""
        pause, longest = _PAUSES
        limit = limit or self.patience * _PATIENCE_OF_A_REQUEST
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return _within(limit, ask)
            except _FINAL:
                raise
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
            if time.monotonic() + pause > deadline:
                raise TrainingError(
                    f"'{self.url}' did not answer for {self.patience:g} seconds ({reason}); check "
                    "the address and the network"
                )
            logger.warning("%s: %s; asking again in %g s.", self.url, reason, pause)
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _within(seconds: float, function: Callable[[], T]) -> T:
    """Run a function in a thread of its own, which is left alone when the time is over."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError as error:
        if done.done():  # the function's own
            raise
        raise OSError(f"no answer within {seconds:g} seconds") from error


class LocalCopies:
    """Images of a server on the local disk: those that come first, as many as fit.

    Which images are kept follows from their numbers, so that processes need not agree, the limit
    holds exactly, and each image that is kept is read from the server once. With images drawn in
    random order this is as good as keeping those that were used last.

    Args:
        folder: folder of the copies of all data sets; empty for the user's cache.
        key: text that names the server and its images.
        sizes: (N,) number of bytes of each image; None if they are not known.
        gigabytes: size of the cache in 10^9 bytes.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: str, key: str, sizes: np.ndarray | None, gigabytes: float) -> None:
        parent = folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "flsl_d2/images")
        self.folder = writable_folder(Path(parent).expanduser(), "dataset.cache_dir")
        self.folder /= hashlib.sha256(key.encode()).hexdigest()[:24]
        self.sizes, self.kept = sizes, 0
        if sizes is None:
            logger.warning("The server names no sizes of files, so nothing is cached.")
        else:
            ends = np.cumsum(sizes, dtype=np.uint64)
            self.kept = int(np.searchsorted(ends, int(gigabytes * 10**9), side="right"))

    def get(self, index: int) -> bytes | None:
        """Return the content of an image; None if it is not there."""
        if index >= self.kept or self.sizes is None:
            return None
        try:
            content = self._path(index).read_bytes()
        except OSError:
            return None
        return content if len(content) == self.sizes[index] else None

    def put(self, index: int, content: bytes) -> None:
        """Keep the content of an image if it has a place; the cache ends where the disk is full."""
        if index >= self.kept or self.sizes is None or len(content) != self.sizes[index]:
            return
        path = self._path(index)
        part = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            logger.warning("Nothing more is cached in %s: %s", self.folder, error)
            self.kept = 0
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.folder / str(index // _COPIES_IN_A_FOLDER) / str(index)
