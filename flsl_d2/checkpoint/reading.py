"""Reading weight files without running code from them, and saying what is wrong with a file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from flsl_d2.errors import InputError

__all__ = ["local_weights_path", "read_weights"]

# Training scripts store their options in this plain container of attributes.
_PLAIN_CLASSES = [argparse.Namespace]


def local_weights_path(path: str) -> str:
    """A file on this machine for a path or URL, downloaded if need be.

    Raises:
        InputError: there is no such file, it is a folder, or it is empty.
    """
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
    """Read a PyTorch or safetensors file into CPU memory.

    PyTorch files may hold tensors, plain containers and ``argparse.Namespace``, nothing else:
    what is not data is not loaded.

    Args:
        path: a ``.safetensors`` file, or any name written by ``torch.save``; URLs are fetched.

    Returns:
        The file's outermost dict; for safetensors, its tensors by name.

    Raises:
        InputError: a missing, empty or damaged file, one that holds foreign classes (named), or
            a ``.pkl``.
    """
    local = local_weights_path(path)
    if path.endswith(".pkl"):
        raise InputError(
            f"weights {path!r} is a pickle, which can run code when it is read, so it is refused; "
            "use a .pth or .safetensors version of these weights."
        )
    try:
        content = _read_safetensors(local) if path.endswith(".safetensors") else _read_torch(local)
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
            "or not written by torch.save or safetensors; download or write it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"weights {path!r} hold a {type(content).__name__}, not a dict of tensors by name; "
            "save model.state_dict()."
        )
    return content


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: str) -> Any:
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        return torch.load(path, map_location="cpu", weights_only=True)


def _foreign_classes(path: str, error: Exception) -> list[str]:
    """Classes in the file that its reader refused; only those that can be found out."""
    try:
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the old file format, or a damaged file: the error has at most the first
        return re.findall(r"(?i)unsupported global:? (?:global )?(\S+)", str(error))[:1]


def _reason(error: Exception) -> str:
    sentence = re.split(r"[\n:.]", str(error).strip(), maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence[:100]}" if sentence else type(error).__name__
