"""Names of images in one array of bytes, which the processes of a machine share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from flsl_d2.images.array_file import map_arrays, write_arrays


def pack_names(names: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    r"""Pack names into a header and arrays, for :func:`write_arrays`.

    Args:
        names: paths or URLs.

    Returns:
        Header: ``prefix``, the common folder of all, and ``digest``, the number of names and a hash
        of what follows the prefix. Arrays: ``name_bytes``, those ends in UTF-8, each with ``\0``
        behind it, and ``name_starts``, where each begins, with the length as one more entry.
    """
    first, last = min(names, default=""), max(names, default="")
    prefix = os.path.commonprefix([first, last])  # noqa: RUF071 - cut at a slash below
    prefix = prefix[: prefix.rfind("/") + 1]
    text = os.fsencode("".join(f"{name[len(prefix) :]}\0" for name in names))
    name_bytes = np.frombuffer(text, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(name_bytes == 0) + 1]).astype(np.uint64)
    if len(name_bytes) < 2**32:
        starts = starts.astype(np.uint32)
    digest = f"{len(names)}, sha256 {hashlib.sha256(text[:-1]).hexdigest()[:16]}"
    return {"prefix": prefix, "digest": digest}, {"name_bytes": name_bytes, "name_starts": starts}


class ImageNames(Sequence[str]):
    """Names as a sequence of strings, of which each is made when it is asked for.

    A list of 1.3 million strings takes 150 MB, and every data worker gets a copy of its own as soon
    as it counts references to them. Names that are mapped from a file exist once for all processes,
    with any method of starting them: the file's path is what is pickled.

    Attributes:
        digest: number and hash of the names below their common folder. Data sets in different
            folders have the same digest if their names are the same.
        header: header of the file, with its other entries.
        arrays: arrays of the file, with its other arrays.

    Args:
        header: header of :func:`pack_names`.
        arrays: arrays of :func:`pack_names`.
        path: path of the file that they are mapped from; empty if they are in memory.
    """

    def __init__(
        self, header: dict[str, Any], arrays: dict[str, np.ndarray], path: str = ""
    ) -> None:
        self.header, self.arrays, self.path = header, arrays, path
        self.digest: str = header["digest"]
        self._prefix = os.fsencode(header["prefix"])
        self._bytes, self._starts = arrays["name_bytes"], arrays["name_starts"]

    @classmethod
    def from_list(cls, names: Sequence[str]) -> ImageNames:
        """Pack names in memory."""
        return cls(*pack_names(names))

    @classmethod
    def from_file(cls, path: str | Path) -> ImageNames:
        """Map names from a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is another file, or lacks a part.
        """
        header, arrays = map_arrays(path)
        if "digest" not in header or "name_starts" not in arrays:
            raise ValueError("it holds no names of images")
        return cls(header, arrays, str(path))

    def save(self, path: str | Path, header: dict[str, Any]) -> None:
        """Write the names to a file.

        Args:
            path: path of the file.
            header: further entries of the header.

        Raises:
            OSError: the file cannot be written.
        """
        write_arrays(path, {**self.header, **header}, **self.arrays)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = int(self._starts[index]), int(self._starts[index + 1]) - 1
        return os.fsdecode(self._prefix + self._bytes[start:end].tobytes())

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path:
            return ImageNames.from_file, (self.path,)
        return ImageNames, (self.header, self.arrays)
