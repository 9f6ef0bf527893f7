"""Reading weight files: their content decides on the format, and no code in them is run."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from safetensors import safe_open

from flsl_d2.errors import InputError
from flsl_d2.files import describe_content
from flsl_d2.weights.pickles import CommandError, read_archive, read_pickle_file

logger = logging.getLogger(__name__)

# Value of the key ``format`` in this project's encoder files.
ENCODER_FORMAT = "flsl_d2 encoder"
# Beginning of the addresses of the encoders that the package ships, wherever weights are named.
SHIPPED_PREFIX = "flsl_d2://"
# Files that stand for their folder, as Hugging Face's ``save_pretrained`` and a run write them.
_IN_FOLDERS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "teacher_backbone.pth"),
)


class _ShippedEncoders(PathHandler):
    """Files of the package by the addresses of :func:`shipped_encoders`."""

    folder = Path(__file__).with_name("encoders")

    def _get_supported_prefixes(self) -> list[str]:
        return [SHIPPED_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        if path not in shipped_encoders():
            raise ValueError(f"the package ships {', '.join(shipped_encoders())}")
        return str(self.folder / path.removeprefix(SHIPPED_PREFIX))

    def _isfile(self, path: str, **_: Any) -> bool:
        return path in shipped_encoders()

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering)


def shipped_encoders() -> list[str]:
    """List the encoders of the package, as ``flsl_d2://NAME.safetensors``."""
    files = sorted(_ShippedEncoders.folder.glob("*.safetensors"))
    return [SHIPPED_PREFIX + file.name for file in files]


PathManager.register_handler(_ShippedEncoders(), allow_override=True)


def split_weights_path(path: str) -> tuple[str, str | None]:
    """Split ``weights.pth?which=student`` into the path, ``~`` expanded, and the name or None.

    ``matching_heuristics``, which Detectron2's paths have, is taken off as well; any other query
    belongs to the URL.
    """
    base, mark, query = path.rpartition("?")
    options = dict(parse_qsl(query))
    if not mark or not options or not options.keys() <= {"which", "matching_heuristics"}:
        return os.path.expanduser(path), None
    return os.path.expanduser(base), options.get("which")


def local_weights_path(path: str) -> str:
    """Find the file on this machine for a path or URL; download it if need be.

    A folder stands for the weights that Hugging Face's libraries or a run write into it.

    Raises:
        InputError: there is no such file, it is a folder without weights, or it is empty.
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
        found = [name for name in _IN_FOLDERS if (local / name).is_file()]
        if not found:
            raise InputError(f"weights {path!r} is a folder; give the file in it.")
        local = local / found[0]
    if not local.is_file():
        raise InputError(f"weights {path!r} do not exist; check the path.")
    if local.stat().st_size == 0:
        raise InputError(f"weights {path!r} is an empty file; download or write it again.")
    return str(local)


def read_weights(path: str) -> dict[str, Any]:
    """Read a weight file into CPU memory without running code from it.

    Formats are those of ``torch.save`` (both), safetensors, NumPy's ``.npz``, Detectron2's pickles,
    and the index of a file in several shards. Arrays become tensors; objects of other classes
    than tensors and containers become plain dicts of their attributes, and their classes are
    logged.

    Args:
        path: file by any name, or a URL.

    Returns:
        The file's outermost dict; for safetensors and ``.npz``, its tensors by name, or what
        :func:`flsl_d2.weights.write_encoder` was given.

    Raises:
        InputError: the file is missing, empty, damaged, one of several shards, or names a function
            that runs commands.
    """
    path, _ = split_weights_path(path)
    local = local_weights_path(path)
    _refuse_single_shard(path, Path(local))
    try:
        content, unread = _read(local, path)
    except (InputError, MemoryError):
        raise
    except CommandError as error:
        raise InputError(
            f"weights {path!r} name {error}, which runs commands and has no place in weights; "
            "nothing was run, and you should not open this file with other programs."
        ) from error
    except Exception as error:  # damaged files fail in every layer of the readers
        sentence = re.split(r"[\n:.]", str(error).strip(), maxsplit=1)[0]
        reason = f"{type(error).__name__}{': ' * bool(sentence)}{sentence[:100]}"
        raise InputError(
            f"weights {path!r} cannot be read ({reason}): the file is damaged, incomplete or not "
            "written by torch.save, safetensors, NumPy or Detectron2; download or write it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"weights {path!r} hold a {type(content).__name__}, not a dict of tensors by name; "
            "save model.state_dict()."
        )
    if unread:
        classes = ", ".join(sorted(unread))
        logger.info("weights %r also hold objects of %s, which were not built.", path, classes)
    return content


def _read(local: str, path: str) -> tuple[Any, set[str]]:
    """Return a file's content, and the names of the classes in it that were not built."""
    with open(local, "rb") as file:
        start = file.read(256)
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(local) as archive:
            names = archive.namelist()
            if all(name.endswith(".npy") for name in names):
                return _read_npz(local, path), set()
            if any(name.split("/")[1:2] == ["code"] for name in names):
                raise InputError(
                    f"weights {path!r} are a TorchScript archive, which is a program; open it by "
                    "torch.jit.load and save its state_dict()."
                )
            if any(name.split("/")[1:] == ["data.pkl"] for name in names):
                return read_archive(archive)
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(local):
        return _read_safetensors(local), set()
    elif start.lstrip()[:1] == b"{" and b'"' in start:
        return _read_index(local, path), set()
    if described := describe_content(start):
        raise InputError(f"weights {path!r} cannot be read: the file is {described}.")
    return read_pickle_file(local)


def _read_npz(local: str, path: str) -> dict[str, Any]:
    try:
        with np.load(local, allow_pickle=False) as archive:
            return {name: _from_numpy(archive[name]) for name in archive.files}
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise InputError(
            f"weights {path!r} hold an array of Python objects, which only running code could "
            "read; save arrays of numbers alone."
        ) from error


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


def _read_index(local: str, path: str) -> dict[str, Any]:
    """Read all shards that an index (``*.index.json``) lists."""
    content = json.loads(Path(local).read_text("utf-8-sig"))
    shards = content.get("weight_map")
    if not isinstance(shards, Mapping):
        raise InputError(
            f"weights {path!r} is a JSON file without weight_map, so it lists no shards; give the "
            "file of the weights."
        )
    folder = path if Path(path).is_dir() else path.rpartition("/")[0]
    state: dict[str, Any] = {}
    for name in dict.fromkeys(shards.values()):
        if "/" in name or "\\" in name:
            raise InputError(f"the index {path!r} names {name!r}, which is not beside it.")
        shard = f"{folder}/{name}" if folder else name
        state |= _read(local_weights_path(shard), shard)[0]
    missing = [name for name in shards if name not in state]
    if missing:
        raise InputError(
            f"the shards that the index {path!r} lists lack {len(missing)} of its "
            f"{len(shards)} tensors, first {missing[0]!r}; download them again."
        )
    return state


def _refuse_single_shard(path: str, local: Path) -> None:
    """Refuse a file whose name, or an index beside it, says that it is one of several."""
    indexes = []
    for index in local.parent.glob("*.index.json"):
        try:
            if local.name in json.loads(index.read_text()).get("weight_map", {}).values():
                indexes.append(index.name)
        except (OSError, ValueError, AttributeError):
            continue
    numbered = re.search(r"-(\d{5})-of-(\d{5})\.", local.name)
    if not indexes and (numbered is None or int(numbered[2]) < 2):
        return
    part = f"part {int(numbered[1])} of {int(numbered[2])}" if numbered else "one of several shards"
    remedy = indexes[0] if indexes else "the index (*.index.json) beside all parts"
    raise InputError(f"weights {path!r} are {part} of a model; give {remedy}.")
