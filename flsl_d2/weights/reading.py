"""Reading weight files without running code from them, and saying what is wrong with a file."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import safe_open

from flsl_d2.errors import InputError
from flsl_d2.files import describe_content
from flsl_d2.weights import shipped  # noqa: F401  (makes flsl_d2:// an address)
from flsl_d2.weights.plain_pickle import ForeignObjectError, read_plain_pickle

# Value of the key ``format`` in this project's encoder files.
ENCODER_FORMAT = "flsl_d2 encoder"

# Training scripts store their options in these: a plain container of attributes, NumPy's numbers,
# and paths, which are read as pure ones because those cannot touch a disk.
_PLAIN_CLASSES: list[Any] = [
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
    """Take the choice of a set of weights off a path: ``weights.pth?which=student``.

    Args:
        path: file or URL. ``matching_heuristics``, which Detectron2's paths have, is taken off as
            well; any other query belongs to the URL.

    Returns:
        The path, with ``~`` replaced by the home folder, and the name of the set or None.
    """
    base, mark, query = path.rpartition("?")
    options = dict(parse_qsl(query))
    if not mark or not options or not options.keys() <= {"which", "matching_heuristics"}:
        return os.path.expanduser(path), None
    return os.path.expanduser(base), options.get("which")


def local_weights_path(path: str) -> str:
    """Find the file on this machine for a path or URL; download it if need be.

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
    """Read a weight file into CPU memory without running code from it.

    PyTorch files may hold tensors, plain containers, ``argparse.Namespace``, NumPy's numbers and
    paths. Detectron2's ``.pkl`` files may hold plain containers, numbers and NumPy arrays. Arrays
    become tensors.

    Args:
        path: ``.safetensors``, ``.pkl``, ``.npz``, or a file of ``torch.save`` by any other name;
            URLs are fetched.

    Returns:
        The file's outermost dict; for safetensors and ``.npz``, its tensors by name, or what
        :func:`flsl_d2.weights.writing.write_encoder` was given.

    Raises:
        InputError: the file is missing, empty or damaged, or holds other classes (named).
    """
    path, _ = split_weights_path(path)
    local = local_weights_path(path)
    try:
        content = _read(local, Path(path).suffix)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in every layer of the readers
        classes = _foreign_classes(local, error)
        if classes:
            raise InputError(
                f"weights {path!r} hold objects of the classes {', '.join(classes)}, which could "
                "run code when read; save the tensors alone, e.g. model.state_dict()."
            ) from error
        if "TorchScript" in str(error):
            raise InputError(
                f"weights {path!r} are a TorchScript archive, which is a program; open it by "
                "torch.jit.load and save its state_dict()."
            ) from error
        other = _other_content(local)
        if other:
            raise InputError(f"weights {path!r} cannot be read: the file is {other}.") from error
        raise InputError(
            f"weights {path!r} cannot be read ({_reason(error)}): the file is damaged, incomplete "
            "or not written by torch.save, safetensors, NumPy or Detectron2; download or write it "
            "again."
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
        return read_plain_pickle(local)
    if suffix == ".npz" or _is_numpy_archive(local):
        with np.load(local, allow_pickle=False) as archive:
            return {name: _from_numpy(archive[name]) for name in archive.files}
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        return torch.load(local, map_location="cpu", weights_only=True)


def _other_content(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(256)
    # A file of torch.save is a ZIP archive, too, and may be damaged.
    return "" if start.startswith(b"PK") else describe_content(start)


def _is_numpy_archive(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if array.dtype == np.dtype("V2"):  # JAX stores bfloat16 so
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _read_safetensors(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if metadata.get("format") != ENCODER_FORMAT:
        return tensors
    known = {key: json.loads(metadata[key]) for key in ("encoder", "input") if key in metadata}
    return {"model": tensors, **known, "format": ENCODER_FORMAT}


def _foreign_classes(path: str, error: Exception) -> list[str]:
    """Names of the classes that the file's reader refused, as far as they can be found out."""
    if isinstance(error, ForeignObjectError):
        return [str(error)]
    if "Object arrays" in str(error):
        return ["object (in a NumPy array)"]
    try:
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the old file format, or a damaged file: the error has at most the first
        return re.findall(r"(?i)unsupported global:? (?:global )?(\S+)", str(error))[:1]


def _reason(error: Exception) -> str:
    sentence = re.split(r"[\n:.]", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence[:100]}" if sentence else type(error).__name__
