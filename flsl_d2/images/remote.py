"""Images on servers, by URLs that fsspec knows (s3, gs, http), with a cache on the local disk."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flsl_d2.agreement import check_equal, decided_by_main, in_turns
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import replaced_file, writable_folder
from flsl_d2.images.image_files import IMAGE_SUFFIXES
from flsl_d2.images.image_names import ImageNames, pack_names
from flsl_d2.images.image_store import SHARDS_INDEX, ShardStore, cache_folder, mapped_names

logger = logging.getLogger(__name__)

T = TypeVar("T")
# The first pause before a server is asked again, and the longest, in seconds.
_PAUSES = (0.25, 8.0)
# Answers that another attempt does not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


def open_remote_images(
    url: str, cache_dir: str = "", cache_gb: float = 0.0, patience: float = 60.0
) -> RemoteStore:
    """Open the shards or the tree of images below a URL; every process must call this.

    Args:
        url: URL of the folder.
        cache_dir: folder for images that were read; empty for the user's cache.
        cache_gb: size of that cache in 10^9 bytes; 0 for none.
        patience: seconds that a failing server is asked again.

    Raises:
        InputError: fsspec or the package of the protocol is missing, or there are no images.
    """
    server = Server(url, patience)
    key = hashlib.sha256(server.url.encode()).hexdigest()[:24]
    path = cache_folder() / f"{key}.names"
    digest = decided_by_main(lambda: _found(server, path, "").digest)
    names = in_turns(lambda: _found(server, path, digest))
    check_equal(names.digest, "the images", "give all machines the same URL")
    cache = None
    if cache_gb:
        folder = writable_folder(cache_dir or cache_folder(), "dataset.cache_dir")
        cache = RangeCache(folder / key, names, cache_gb)
    return RemoteStore(names, server, cache)


def _found(server: Server, path: Path, digest: str) -> ImageNames:
    """Map names that were found before if they have this digest; else ask the server."""
    known = mapped_names(path)
    if known and known.digest == digest:
        return known
    try:
        index = server.read_file(SHARDS_INDEX)
    except FileNotFoundError:
        return _found_in_tree(server, path)
    with replaced_file(path) as file:
        file.write(index)
    return ImageNames.from_file(path)


def _found_in_tree(server: Server, path: Path) -> ImageNames:
    try:
        listed = server.list_files()
    except OSError as error:
        raise InputError(
            f"dataset.root is '{server.url}', which cannot be listed ({error}); give the URL of a "
            "folder of shards or images."
        ) from error
    sizes = {
        name: size
        for name, size in listed.items()
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    }
    if not sizes:
        raise InputError(
            f"dataset.root is '{server.url}', which holds neither shards ({SHARDS_INDEX}) nor "
            "image files; give the URL of a folder of either."
        )
    files = sorted(sizes)
    header, arrays = pack_names(files)
    known = [sizes[name] for name in files]
    if None not in known:  # servers of web pages do not say how large files are
        lengths = np.array(known, np.uint32)
        arrays["sizes"] = lengths
        arrays["places"] = np.cumsum(lengths, dtype=np.uint64) - lengths
    names = ImageNames(header, arrays)
    names.save(path, {})
    return ImageNames.from_file(path)


class Server:
    """Files below a URL. A request that fails is repeated for some time.

    Args:
        url: URL of a folder.
        patience: seconds from the first failure of a request to its last repetition.

    Raises:
        InputError: fsspec or the package of the protocol is missing.
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
        """Read a whole file.

        Raises:
            FileNotFoundError: there is no such file.
            TrainingError: the server does not answer.
        """
        (content,) = self.read([(name, None, None)])
        if isinstance(content, OSError):
            raise content
        return content

    def read(self, ranges: Sequence[tuple[str, int | None, int | None]]) -> list[bytes | OSError]:
        """Read ranges of bytes at once.

        Args:
            ranges: name of the file, first byte, and byte behind the last; None for whole files.

        Returns:
            The content of each range, or an error for one that cannot be had.

        Raises:
            TrainingError: the server does not answer.
        """
        answers: list[Any] = [None] * len(ranges)

        def ask() -> None:
            waiting = [i for i, answer in enumerate(answers) if answer is None]
            files, root = self._connection()
            paths = [f"{root}/{ranges[i][0]}" for i in waiting]
            starts, ends = ([ranges[i][part] for i in waiting] for part in (1, 2))
            found = files.cat_ranges(paths, starts, ends, on_error="return")
            failure = None
            for i, answer in zip(waiting, found, strict=True):
                failure = self._note(answers, i, answer, ranges[i]) or failure
            if failure is not None:
                raise failure

        self._repeated(ask)
        return answers

    def _note(
        self,
        answers: list[Any],
        i: int,
        answer: Any,
        wanted: tuple[str, int | None, int | None],
    ) -> Exception | None:
        """Keep an answer that is final; return the failure of another one."""
        _, start, end = wanted
        if isinstance(answer, _FINAL):
            answers[i] = answer
        elif isinstance(answer, Exception):
            return answer
        elif start is not None and end is not None and len(answer) != end - start:
            return OSError(f"{len(answer)} bytes instead of {end - start}")
        else:
            answers[i] = bytes(answer)
        return None

    def list_files(self) -> dict[str, int | None]:
        """Return the names of all files below the folder, and their sizes where they are known.

        Raises:
            TrainingError: the server does not answer.
        """

        def ask() -> dict[str, int | None]:
            files, root = self._connection()
            found = files.find(root, detail=True)
            return {name[len(root) + 1 :]: entry.get("size") for name, entry in found.items()}

        return self._repeated(ask)

    def _repeated(self, ask: Callable[[], T]) -> T:
        pause, longest = _PAUSES
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return ask()
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


class RangeCache:
    """Images of a server on the local disk: those that lie first, as many as fit.

    Which images are kept is fixed by their place, so that processes need not agree, the limit
    holds exactly, and each image that is kept is read from the server once. With images drawn in
    random order this is as good as keeping those that were used last.

    Args:
        path: path of the cache without suffix.
        names: names of the images, with ``places`` and ``sizes``.
        gigabytes: size of the cache in 10^9 bytes.
    """

    def __init__(self, path: Path, names: ImageNames, gigabytes: float) -> None:
        self.path, self.names, self.limit = path, names, int(gigabytes * 10**9)
        self._files: tuple[int, np.ndarray] | None = None
        if "sizes" not in names.arrays:
            logger.warning("The server names no sizes of files, so nothing is cached.")
            self.limit = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def _open(self) -> tuple[int, np.ndarray]:
        """Descriptor of the data, and a checksum for each image, 0 for one that is not there."""
        if self._files is None:
            # The checksums belong to one set of names: another one has files of its own.
            mark = hashlib.sha256(self.names.digest.encode()).hexdigest()[:8]
            data, sums = (f"{self.path}.{mark}.{end}" for end in ("data", "sums"))
            descriptors = [os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for file in (data, sums)]
            os.truncate(descriptors[1], 4 * len(self.names))
            os.close(descriptors[1])
            self._files = descriptors[0], np.memmap(sums, np.uint32, "r+")
        return self._files

    def get(self, index: int) -> bytes | None:
        """Return the content of an image; None if it is not there."""
        place, size = self._range(index)
        if place + size > self.limit:
            return None
        data, sums = self._open()
        if not sums[index]:
            return None
        content = os.pread(data, size, place)
        return content if _checksum(content) == sums[index] else None

    def put(self, index: int, content: bytes) -> None:
        """Keep the content of an image if it has a place; the cache ends where the disk is full."""
        place, size = self._range(index)
        if place + size > self.limit or len(content) != size:
            return
        try:
            data, sums = self._open()
            os.pwrite(data, content, place)
            sums[index] = _checksum(content)
        except OSError as error:
            logger.warning("Nothing more is cached in %s: %s", self.path.parent, error)
            self.limit = 0

    def _range(self, index: int) -> tuple[int, int]:
        if not self.limit:
            return 0, 1
        arrays = self.names.arrays
        return int(arrays["places"][index]), int(arrays["sizes"][index])


def _checksum(content: bytes) -> int:
    return zlib.crc32(content) or 1


class RemoteStore(ShardStore):
    """Images of a server: files, or ranges of bytes of shards.

    Args:
        names: names of the images; those in shards have ``shards`` in their header.
        server: the server.
        cache: cache on the local disk; None for none.
    """

    def __init__(self, names: ImageNames, server: Server, cache: RangeCache | None) -> None:
        self.has_shards = "shards" in names.header
        names.header.setdefault("shards", [])
        super().__init__(names, server.url)
        self.server, self.cache = server, cache
        self._held: dict[int, bytes | OSError] = {}

    def prefetch(self, indexes: Iterable[int]) -> None:
        """Read images at once, to be asked for next."""
        self._held = {}
        for index in indexes:
            content = self.cache.get(index) if self.cache else None
            if content is not None:
                self._held[index] = content
        missing = [index for index in indexes if index not in self._held]
        answers = self.server.read([self._request(index) for index in missing])
        for index, answer in zip(missing, answers, strict=True):
            self._held[index] = answer
            if self.cache and not isinstance(answer, OSError):
                self.cache.put(index, answer)

    def source(self, index: int) -> bytes:
        """Read an image, and compare its checksum where the index has one."""
        if index not in self._held:
            self.prefetch([index])
        content = self._held.pop(index)
        if isinstance(content, OSError):
            raise OSError(f"the server has no such file ({content})")
        return self.checked(index, content) if self.has_shards else content

    def _request(self, index: int) -> tuple[str, int | None, int | None]:
        if not self.has_shards:
            # Names are URLs' ends; the common folder of all is a part of the name.
            return self.names[index], None, None
        shard, start, size = self.location(index)
        return self._files[shard], start, start + size
