"""Arrays in one file that processes map into their memory, so that all share one copy of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flsl_d2.files import replaced_file

_MAGIC = b"FLSLARR1"
_ALIGNMENT = 64


def write_arrays(path: str | Path, header: Mapping[str, Any], **arrays: np.ndarray) -> None:
    """Write arrays of one dimension with a header; a reader finds the old or the new file.

    Args:
        path: path of the file.
        header: values that JSON can hold.
        arrays: the arrays by name.

    Raises:
        OSError: the file cannot be written.
    """
    shapes = [[name, array.dtype.str, len(array)] for name, array in arrays.items()]
    text = json.dumps({"header": header, "arrays": shapes}).encode()
    with replaced_file(path) as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(np.ascontiguousarray(array).data)


def map_arrays(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Map a file of :func:`write_arrays` into memory.

    Returns:
        The header, and the arrays by name, which cannot be written to.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, or lacks a part.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r")
    start = len(_MAGIC) + 8
    if content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise ValueError("it is not a file of arrays")
    end = start + int.from_bytes(content[len(_MAGIC) : start].tobytes(), "little")
    described = json.loads(content[start:end].tobytes())
    arrays = {}
    for name, dtype, length in described["arrays"]:
        first = end + -end % _ALIGNMENT
        end = first + length * np.dtype(dtype).itemsize
        if end > len(content):
            raise ValueError("its end is missing")
        arrays[name] = np.asarray(content[first:end]).view(dtype)
    return described["header"], arrays
