"""Reading weight files without running code from them, and saying what is wrong with a file."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from flsl_d2.checkpoint.plain_pickle import ForeignObjectError, read_plain_pickle
from flsl_d2.errors import InputError

__all__ = ["ENCODER_FORMAT", "local_weights_path", "read_weights", "split_weights_path"]

# What encoder files of this project say of themselves.
ENCODER_FORMAT = "flsl_d2 encoder"

# What training scripts store their options in: a plain container of attributes, NumPy's numbers,
# and paths, which are read as pure ones that cannot touch a disk.
_PLAIN_CLASSES = [
    argparse.Namespace,
    *(
        (getattr(pathlib, pure), f"{module}.{name}")
        for pure in ("PurePosixPath", "PureWindowsPath")
        for name in (pure, pure.removeprefix("Pure"))
        for module in ("pathlib", "pathlib._local")
    ),
    *(
        (np.float64(0).__reduce__()[0], f"{package}.multiarray.scalar")
        for package in ("numpy.core", "numpy._core")
    ),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]


def split_weights_path(path: str) -> tuple[str, str | None]:
    """Take the choice of an encoder off a path: ``weights.pth?which=student``.

    Args:
        path: file or URL. ``matching_heuristics``, which Detectron2's paths have, is taken off as
            well; any other query belongs to the URL.

    Returns:
        The path, and ``teacher``, ``student`` or None.

    Raises:
        InputError: another choice.
    """
    base, mark, query = path.rpartition("?")
    options = dict(parse_qsl(query))
    if not mark or not options or not options.keys() <= {"which", "matching_heuristics"}:
        return path, None
    which = options.get("which")
    if which not in (None, "teacher", "student"):
        raise InputError(f"weights {path!r} ask for {which!r}; use which=teacher or which=student.")
    return base, which


def local_weights_path(path: str) -> str:
    """A file on this machine for a path or URL, downloaded if need be.

    Raises:
        InputError: there is no such file, it is a folder, or it is empty.
    """
    path, _ = split_weights_path(path)
    try:
        local = Path(PathManager.get_local_path(path))
    except (OSError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"weights {path!r} cannot be fetched ({reason}); check the address."
        ) from error
    if local.is_dir():
        raise InputError(f"weights {path!r} is a folder; give the file in it.")
    if not local.is_file():
        raise InputError(f"weights {path!r} do not exist; check the path.")
    if local.stat().st_size == 0:
        raise InputError(f"weights {path!r} is an empty file; download or write it again.")
    return str(local)


def read_weights(path: str) -> dict[str, Any]:
    """Read a PyTorch, safetensors or Detectron2 file into CPU memory.

    PyTorch files may hold tensors, plain containers, ``argparse.Namespace``, NumPy's numbers and
    paths, nothing else: what is not data is not loaded. Detectron2's ``.pkl`` files may hold plain
    containers, numbers and NumPy arrays, which become tensors.

    Args:
        path: a ``.safetensors`` or ``.pkl`` file, or any name written by ``torch.save``; URLs are
            fetched.

    Returns:
        The file's outermost dict; for safetensors, its tensors by name, or what
        :func:`flsl_d2.checkpoint.export.write_encoder` was given.

    Raises:
        InputError: a missing, empty or damaged file, or one that holds foreign classes (named).
    """
    path, _ = split_weights_path(path)
    local = local_weights_path(path)
    try:
        content = _read(local, Path(path).suffix)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in every layer of the readers
        foreign = _foreign_classes(local, error)
        if foreign:
            raise InputError(
                f"weights {path!r} hold objects of the classes {', '.join(foreign)}, which could "
                "run code when read; save the tensors alone, e.g. model.state_dict()."
            ) from error
        raise InputError(
            f"weights {path!r} cannot be read ({_reason(error)}): the file is damaged, incomplete "
            "or not written by torch.save, safetensors or Detectron2; download or write it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"weights {path!r} hold a {type(content).__name__}, not a dict of tensors by name; "
            "save model.state_dict()."
        )
    return content


def _read(local: str, suffix: str) -> Any:
    if suffix == ".safetensors":
        return _read_safetensors(local)
    if suffix == ".pkl":
        return _with_tensors(read_plain_pickle(local))
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        return torch.load(local, map_location="cpu", weights_only=True)


def _read_safetensors(path: str) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if metadata.get("format") != ENCODER_FORMAT:
        return tensors
    encoder = json.loads(metadata["encoder"])
    return {"model": tensors, "encoder": encoder, "format": ENCODER_FORMAT}


def _with_tensors(content: Any) -> Any:
    """The same containers with tensors in the place of NumPy arrays."""
    if isinstance(content, dict):
        return {key: _with_tensors(value) for key, value in content.items()}
    if isinstance(content, np.ndarray):
        return torch.from_numpy(np.array(content, dtype=content.dtype.newbyteorder("=")))
    return content


def _foreign_classes(path: str, error: Exception) -> list[str]:
    """Classes in the file that its reader refused; only those that can be found out."""
    if isinstance(error, ForeignObjectError):
        return [str(error)]
    try:
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the old file format, or a damaged file: the error has at most the first
        return re.findall(r"(?i)unsupported global:? (?:global )?(\S+)", str(error))[:1]


def _reason(error: Exception) -> str:
    sentence = re.split(r"[\n:.]", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence[:100]}" if sentence else type(error).__name__
