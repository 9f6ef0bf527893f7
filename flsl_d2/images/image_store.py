"""Images by number: of a tree of files, or of shards, on this machine or on a server.

A store is a sequence of names, and gives the content of each image. What a run sees follows from
the seed and the numbers, so a run may be resumed with the same images in another kind of store.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from flsl_d2.agreement import check_equal, checked_by_all, decided_by_main, in_turns
from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder
from flsl_d2.images.image_files import FoundImages, search_images
from flsl_d2.images.image_files import image_files as registered_files
from flsl_d2.images.image_names import ImageNames

logger = logging.getLogger(__name__)

SHARDS_INDEX = "images.index"
_SAME_IMAGES = "give all machines the same images under the same names"

# Names of fewer images are found by each process, in less time than it takes to start.
MIN_SHARED = 10_000
# A folder that changed so short a time before it was listed may have changed again unnoticed.
_CLOCK_NANOSECONDS = 2 * 10**9
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


class ImageStore(Sequence[str]):
    """Images of a tree of files.

    Args:
        names: paths of the files.

    Attributes:
        names: names of the images; a list is packed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names if isinstance(names, ImageNames) else ImageNames.from_list(names)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.names[index]

    def source(self, index: int) -> str | bytes:
        """Return the path or the content of an image, for :class:`flsl_d2.images.images.ImageFile`.

        Raises:
            OSError: this image cannot be read.
            TrainingError: no image can be read, because the server stays away.
        """
        return self.names[index]

    def prefetch(self, indexes: Iterable[int]) -> None:
        """Read images that are asked for next at once, where waiting for each takes long."""


def as_store(images: ImageStore | Sequence[str]) -> ImageStore:
    """Return a store as it is, and a list of paths as a store of files."""
    return images if isinstance(images, ImageStore) else ImageStore(images)


def open_images(
    root: str = "", name: str = "", cache_dir: str = "", cache_gb: float = 0.0, patience: float = 60
) -> ImageStore:
    """Open the images of a run; every process must call this and gets the same images.

    Args:
        root: folder, pattern or list of images (:func:`flsl_d2.images.image_files.search_images`),
            a folder of shards (:mod:`flsl_d2.images.shards`), or the URL of a folder of either.
        name: name of a registered data set, which is taken instead of ``root``.
        cache_dir: folder for images that were read from a URL; empty for the user's cache.
        cache_gb: size of that cache in 10^9 bytes; 0 for none.
        patience: seconds that a failing server is asked again before the run ends.

    Raises:
        InputError: there are no images, machines have different ones, or a server does not answer;
            raised on all processes.
    """
    if not name and "://" in root:
        from flsl_d2.images.remote import open_remote_images  # needs the extra of URLs

        return open_remote_images(root, cache_dir, cache_gb, patience)
    if not name and Path(root, SHARDS_INDEX).is_file():
        names = checked_by_all(lambda: read_index(Path(root, SHARDS_INDEX)))
        store: ImageStore = ShardStore(names, root)
    else:
        store = ImageStore(_shared_names(root, name))
    check_equal(store.names.digest, "the images", _SAME_IMAGES)
    return store


def read_index(path: Path) -> ImageNames:
    """Map the index of shards.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return ImageNames.from_file(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the index of shards '{path}' cannot be read ({error}); write it anew with "
            "tools/make_shards.py."
        ) from error


class ShardStore(ImageStore):
    """Images in tar files of this machine, by the range of bytes of each.

    Args:
        names: names of the images, with the arrays and the header that
            :func:`flsl_d2.images.shards.make_shards` writes: ``places``, where each image begins
            among the bytes of all shards, ``sizes``, ``checksums`` (CRC-32), and ``shards``, the
            name and the size of each file.
        root: folder of the files.
    """

    def __init__(self, names: ImageNames, root: str) -> None:
        super().__init__(names)
        self.root = root
        shards = names.header["shards"]
        self._files = [name for name, _ in shards]
        self._begins = np.cumsum([0, *(size for _, size in shards)])
        self._descriptors: dict[int, int] = {}

    def source(self, index: int) -> bytes:
        """Read an image and compare its checksum."""
        shard, start, size = self.location(index)
        if shard not in self._descriptors:  # reading by place, they may be shared after a fork
            self._descriptors[shard] = os.open(Path(self.root, self._files[shard]), os.O_RDONLY)
        return self.checked(index, os.pread(self._descriptors[shard], size, start))

    def location(self, index: int) -> tuple[int, int, int]:
        """Return the number of an image's shard, its first byte in it, and its size."""
        place = int(self.names.arrays["places"][index])
        shard = int(np.searchsorted(self._begins, place, side="right")) - 1
        return shard, place - int(self._begins[shard]), int(self.names.arrays["sizes"][index])

    def checked(self, index: int, content: bytes) -> bytes:
        """Return the content of an image.

        Raises:
            OSError: its checksum is not that of the index.
        """
        if zlib.crc32(content) != self.names.arrays["checksums"][index]:
            raise OSError("its bytes in the shard are damaged")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}


def _shared_names(root: str, name: str) -> ImageNames:
    """Find the images on rank 0, or in a file that a run before has left; share it on a machine."""
    key = hashlib.sha256(os.fsencode(f"{os.path.abspath(root)}\0{name}")).hexdigest()[:24]
    path = cache_folder() / f"{key}.names"
    digest = decided_by_main(lambda: _find_or_map(root, name, path).digest)
    return in_turns(lambda: _find_or_map(root, name, path, digest))


def _find_or_map(root: str, name: str, path: Path, digest: str = "") -> ImageNames:
    """Map the names of a file where they are current, else find the images and write it.

    Args:
        root: folder, pattern or list.
        name: name of a registered data set.
        path: path of the file.
        digest: digest of names that are current; empty if that is not known.
    """
    known = mapped_names(path)
    if known and (known.digest == digest if digest else _is_current(known.header)):
        found_before = known.header.get("left_out")
        if found_before and not digest:
            logger.warning("%s: %s.", root, found_before)
        return known
    start = time.time_ns()
    found = FoundImages(registered_files(name=name)) if name else search_images(root)
    if found.left_out():
        logger.warning("%s: %s.", root, found.left_out())
    names = ImageNames.from_list(found.files)
    if len(names) < MIN_SHARED:
        return names
    watched = {} if name else {folder: os.stat(folder).st_mtime_ns for folder in found.watched}
    header = {"watched": watched, "found": start, "left_out": found.left_out()}
    return saved_names(names, path, header)


def _is_current(header: dict[str, Any]) -> bool:
    """Whether no folder has changed since the images were found.

    Adding, removing or renaming a file changes the time of its folder.
    """
    watched: dict[str, int] = header.get("watched", {})
    try:
        return bool(watched) and all(
            os.stat(folder).st_mtime_ns == changed < header["found"] - _CLOCK_NANOSECONDS
            for folder, changed in watched.items()
        )
    except OSError:
        return False


def mapped_names(path: Path) -> ImageNames | None:
    """Map names from a file; None where there is no such file."""
    try:
        return ImageNames.from_file(path)
    except (OSError, ValueError):
        return None


def saved_names(names: ImageNames, path: Path, header: dict[str, Any]) -> ImageNames:
    """Write names to a file and map it; names that cannot be written stay in memory."""
    try:
        names.save(path, header)
        return ImageNames.from_file(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): each process has its own names.", path, error)
        return names


@cache
def cache_folder() -> Path:
    """Make the folder of lists of names: the user's, or a temporary one if it is read-only."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flsl_d2/images"
    try:
        return writable_folder(folder)
    except InputError:
        _temporary.append(tempfile.TemporaryDirectory(prefix="flsl_d2_images_"))
        return Path(_temporary[0].name)
