"""Images by number: of a tree of files, or of shards, on this machine or on a server.

A store is a sequence of names, and gives the content of each image. What a run sees follows from
the seed and the numbers, so a run may be resumed with the same images in another kind of store.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from flsl_d2.agreement import check_equal, checked_by_all
from flsl_d2.errors import InputError
from flsl_d2.files import machine_errors, replaced_file
from flsl_d2.images.listing import image_files, named_like_an_image
from flsl_d2.images.remote import LocalCopies, Server

SHARDS_INDEX = "images.index"


class ImageNames(Sequence[str]):
    r"""Names packed into bytes: the common folder with a slash, and the rest of each with ``\0``.

    A list of 1.3 million strings takes 150 MB, and every data worker gets a copy of its own as soon
    as it counts references to them. Bytes are shared after a fork.
    """

    def __init__(self, prefix: str, text: bytes) -> None:
        self.prefix, self.text = prefix, text
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 0)
        self._ends = ends.astype(np.uint32 if len(text) < 2**32 else np.uint64)

    @classmethod
    def from_list(cls, names: Sequence[str]) -> ImageNames:
        """Pack paths or URLs."""
        first, last = min(names, default=""), max(names, default="")
        prefix = os.path.commonprefix([first, last])  # noqa: RUF071 - cut at a slash below
        prefix = prefix[: prefix.rfind("/") + 1]
        return cls(prefix, os.fsencode("".join(f"{name[len(prefix) :]}\0" for name in names)))

    @cached_property
    def digest(self) -> str:
        """Number and hash of the names below their common folder, equal in any folder."""
        return f"{len(self)}, sha256 {hashlib.sha256(self.text[:-1]).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self.prefix + os.fsdecode(self.text[start : int(self._ends[index])])


class ImageStore(Sequence[str]):
    """Images of a tree of files, by their paths."""

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
        """Return the path or the content of an image, for :class:`flsl_d2.images.reader.ImageFile`.

        Raises:
            OSError: this image cannot be read.
            TrainingError: no image can be read, because this machine or the server fails.
        """
        return self.names[index]

    def prefetch(self, indexes: Iterable[int]) -> None:
        """Read images that are asked for next at once, where waiting for each takes long."""


def as_store(images: ImageStore | Sequence[str]) -> ImageStore:
    """Return a store as it is, and a list of paths as a store of files."""
    return images if isinstance(images, ImageStore) else ImageStore(images)


class ShardIndex:
    """Where each image begins in tar files, by the arrays of :func:`write_index`.

    Attributes:
        numbers: (N,) number of each image's shard.
        starts: (N,) its first byte in the shard.
        sizes: (N,) its number of bytes.
        checksums: (N,) its CRC-32.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.names = ImageNames("", arrays["names"].tobytes())
        self.shards = arrays["shards"].tobytes().decode().split("\0")[:-1]
        self.numbers, self.starts = arrays["numbers"], arrays["starts"]
        self.sizes, self.checksums = arrays["sizes"], arrays["checksums"]

    @classmethod
    def read(cls, source: Path | bytes) -> ShardIndex:
        """Read a file of :func:`write_index`, or its content."""
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with np.load(file, allow_pickle=False) as arrays:
                return cls(dict(arrays))
        except Exception as error:  # NumPy raises many kinds for other files
            place = f" '{source}'" if isinstance(source, Path) else ""
            raise InputError(
                f"the index of shards{place} cannot be read ({type(error).__name__}: {error}); "
                "write it anew with tools/make_shards.py --output SHARDS."
            ) from error


def write_index(path: Path, names: Sequence[str], shards: Sequence[str], rows: np.ndarray) -> None:
    """Write the index of shards; names are written without their common folder.

    ``rows`` (N, 4) are number of the shard, first byte, bytes and CRC-32 of each image.
    """
    numbers, starts, sizes, checksums = np.asarray(rows, np.uint64).reshape(-1, 4).T
    text = "".join(f"{shard}\0" for shard in shards).encode()
    with replaced_file(path) as file:
        np.savez(
            file,
            names=np.frombuffer(ImageNames.from_list(names).text, np.uint8),
            shards=np.frombuffer(text, np.uint8),
            numbers=numbers.astype(np.uint32),
            starts=starts,
            sizes=sizes.astype(np.uint32),
            checksums=checksums.astype(np.uint32),
        )


class ShardStore(ImageStore):
    """Images in tar files of a folder, by the range of bytes of each."""

    def __init__(self, root: str, index: ShardIndex) -> None:
        super().__init__(index.names)
        self.root, self.places = root, index

    def source(self, index: int) -> bytes:
        """Read an image and compare its checksum."""
        shard, start, end = self.location(index)
        # Opened for each image: the files of a data set may be more than a process may keep open.
        with machine_errors(shard):
            descriptor = os.open(os.path.join(self.root, shard), os.O_RDONLY)
            try:
                content = os.pread(descriptor, end - start, start)
            finally:
                os.close(descriptor)
        return self.checked(index, content)

    def location(self, index: int) -> tuple[str, int, int]:
        """Return the name of an image's shard, its first byte in it, and that behind its last."""
        start = int(self.places.starts[index])
        shard = self.places.shards[self.places.numbers[index]]
        return shard, start, start + int(self.places.sizes[index])

    def checked(self, index: int, content: bytes) -> bytes:
        """Return the content of an image; raise OSError for another checksum than the index's."""
        if zlib.crc32(content) != self.places.checksums[index]:
            raise OSError("its bytes in the shard are damaged")
        return content


class RemoteStore(ImageStore):
    """Images of a server: files, or ranges of bytes of ``shards``; ``copies`` stay on the disk."""

    def __init__(
        self,
        server: Server,
        names: ImageNames,
        shards: ShardStore | None,
        copies: LocalCopies | None,
    ) -> None:
        super().__init__(names)
        self.server, self.shards, self.copies = server, shards, copies
        self._held: dict[int, bytes | OSError] = {}

    def prefetch(self, indexes: Iterable[int]) -> None:
        """Read images at once, to be asked for next."""
        self._held = {}
        for index in indexes:
            content = self.copies.get(index) if self.copies else None
            if content is not None and not isinstance(self._checked(index, content), OSError):
                self._held[index] = content
        missing = [index for index in indexes if index not in self._held]
        ranges = [self._range(index) for index in missing]
        for index, answer in zip(missing, self.server.read(ranges), strict=True):
            self._held[index] = self._checked(index, answer)
            if self.copies and not isinstance(answer, OSError):
                self.copies.put(index, answer)

    def source(self, index: int) -> bytes:
        """Return an image that was prefetched, or read it."""
        if index not in self._held:
            self.prefetch([index])
        content = self._held.pop(index)
        if isinstance(content, OSError):
            raise content
        return content

    def _range(self, index: int) -> tuple[str, int | None, int | None]:
        return self.shards.location(index) if self.shards else (self.names[index], None, None)

    def _checked(self, index: int, content: bytes | OSError) -> bytes | OSError:
        if isinstance(content, OSError):
            return OSError(f"the server has no such file ({content})")
        try:
            return self.shards.checked(index, content) if self.shards else content
        except OSError as error:
            return error


def open_images(
    root: str = "", name: str = "", cache_dir: str = "", cache_gb: float = 0.0, patience: float = 60
) -> ImageStore:
    """Open the images of a run; every process must call this and gets the same images.

    Args:
        root: folder, pattern or list of images (:func:`flsl_d2.images.listing.search_images`),
            a folder of shards (:mod:`flsl_d2.images.shards`), or the URL of a folder of either.
        name: name of a registered data set, which is taken instead of ``root``.
        cache_dir: folder for images that were read from a URL; empty for the user's cache.
        cache_gb: size of that cache in 10^9 bytes; 0 for none.
        patience: seconds that a failing server is asked again before the run ends.

    Raises:
        InputError: there are no images, machines have different ones, or a server does not answer;
            raised on all processes.
    """

    def find() -> ImageStore:
        if not name and "://" in root:
            return _open_remote(Server(root, patience), cache_dir, cache_gb)
        if not name and Path(root, SHARDS_INDEX).is_file():
            return ShardStore(root, ShardIndex.read(Path(root, SHARDS_INDEX)))
        return ImageStore(image_files(root, name))

    store = checked_by_all(find)
    remedy = "give all machines the same images under the same names"
    check_equal(store.names.digest, "the images", remedy)
    return store


def _open_remote(server: Server, cache_dir: str, cache_gb: float) -> RemoteStore:
    """Open the shards or the tree of images below a URL."""
    shards: ShardStore | None = None
    sizes: np.ndarray | None
    try:
        index = ShardIndex.read(server.read_file(SHARDS_INDEX))
        names, shards, sizes = index.names, ShardStore(server.url, index), index.sizes
    except FileNotFoundError:
        names, sizes = _remote_tree(server)
    copies = None
    if cache_gb:
        copies = LocalCopies(cache_dir, f"{server.url} {names.digest}", sizes, cache_gb)
    return RemoteStore(server, names, shards, copies)


def _remote_tree(server: Server) -> tuple[ImageNames, np.ndarray | None]:
    """Names of the images below a URL, and their sizes; None where the server does not say them."""
    try:
        listed: Mapping[str, Any] = server.list_files()
    except OSError as error:
        raise InputError(
            f"dataset.root is '{server.url}', which cannot be listed ({error}); give the URL of a "
            "folder of shards or images."
        ) from error
    files = named_like_an_image(server.url, sorted(listed))
    if not files:
        raise InputError(
            f"dataset.root is '{server.url}', which holds neither shards ({SHARDS_INDEX}) nor "
            "image files; give the URL of a folder of either."
        )
    sizes = [listed[name] for name in files]
    return ImageNames.from_list(files), None if None in sizes else np.array(sizes, np.uint64)
