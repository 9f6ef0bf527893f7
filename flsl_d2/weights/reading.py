"""Reading weight files without running code from them, and saying what is wrong with a file."""

from __future__ import annotations

import argparse
import json
import mmap
import pathlib
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from flsl_d2.errors import InputError

__all__ = [
    "ENCODER_FORMAT",
    "KNOWN_NAMES",
    "ForeignObjectError",
    "Function",
    "Unfinished",
    "local_weights_path",
    "read_plain_pickle",
    "read_weights",
    "split_weights_path",
]


class ForeignObjectError(ValueError):
    """A pickle asks for something that is not data; its text is the name."""


class Function:
    """Stands for the one thing that a name of :data:`KNOWN_NAMES` may do."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Unfinished:
    """An array or data type between its creation and the instruction that fills it."""

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self.finish = finish
        self.memo_keys: list[int] = []


def _dtype(code: Any, *_: Any) -> Unfinished:
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc]\d+", code):
        raise ForeignObjectError(f"numpy.dtype({code!r})")
    kind = np.dtype(code)
    # The state begins with the version of its format and the byte order.
    return Unfinished(lambda state: kind.newbyteorder(state[1] if state[1] in "<>" else "|"))


def _array(*_: Any) -> Unfinished:
    def finish(state: tuple) -> np.ndarray:
        _, shape, dtype, is_fortran, data = state
        return _from_buffer(data, dtype, shape, "F" if is_fortran else "C")

    return Unfinished(finish)


def _from_buffer(data: Any, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(_bytes(data), dtype).reshape(shape, order=order).copy()


def _scalar(dtype: np.dtype, data: Any) -> Any:
    return np.frombuffer(_bytes(data), dtype)[0].item()


def _bytes(data: Any) -> bytes:
    """Raw data; Python 2 wrote it as a string."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError("raw data is expected")
    return bytes(data)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ForeignObjectError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def _byte_string(content: bytes | str = b"", *_: Any) -> bytes:
    return _bytes(content)


KNOWN_NAMES: dict[str, Function | type] = {
    "collections.OrderedDict": Function(lambda *pairs: OrderedDict(*pairs)),
    "_codecs.encode": Function(_encode),
    "builtins.bytes": Function(_byte_string),
    "__builtin__.bytes": Function(_byte_string),
    "builtins.bytearray": Function(_byte_string),
    "__builtin__.bytearray": Function(_byte_string),
    "numpy.dtype": Function(_dtype),
    "numpy.ndarray": np.ndarray,  # an argument only
    **{
        f"{package}.{name}": Function(call)
        for package in ("numpy.core", "numpy._core")
        for name, call in (
            ("multiarray._reconstruct", _array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}


# Instructions that push their argument, those that push a constant, and those without effect here.
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    }
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_IGNORED = frozenset({"PROTO", "FRAME"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(path: str) -> Any:
    """The data in a pickle of any protocol: containers, strings, numbers and NumPy arrays.

    Raises:
        ForeignObjectError: it asks for anything else; the text names it.
        Exception: of any type, where the file is damaged.
    """
    # A map of the file ends where the file does, whatever size an instruction claims to have.
    with (
        open(path, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return _Machine().run(pickletools.genops(content))


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.num_unfinished = 0

    def run(self, instructions: Any) -> Any:
        for opcode, argument, _ in instructions:
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        (result,) = self.stack
        if self.num_unfinished or self.marks or isinstance(result, (Function, type)):
            raise ValueError("the pickle is incomplete")
        return result

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _PUTS:
            self._remember(argument)
        elif name == "MEMOIZE":
            self._remember(len(self.memo))
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name not in _IGNORED:
            handler = getattr(self, f"_do_{name.lower()}", None)
            if handler is None:
                detail = f" {argument}" if isinstance(argument, str) else ""
                raise ForeignObjectError(f"the pickle instruction {name}{detail}")
            handler(argument)

    def _remember(self, key: int) -> None:
        value = self.stack[-1]
        self.memo[key] = value
        if isinstance(value, Unfinished):
            value.memo_keys.append(key)

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _do_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _do_pop(self, _: Any) -> None:
        self.stack.pop()

    def _do_pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _do_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _do_list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _do_dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _do_append(self, _: Any) -> None:
        value = self.stack.pop()
        self._target(list).append(value)

    def _do_appends(self, _: Any) -> None:
        items = self._since_mark()
        self._target(list).extend(items)

    def _do_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._target(dict)[key] = value

    def _do_setitems(self, _: Any) -> None:
        items = self._since_mark()
        self._target(dict).update(zip(items[::2], items[1::2], strict=True))

    def _target(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError("the pickle fills something that is no container")
        return self.stack[-1]

    def _do_global(self, argument: str) -> None:
        self._find(*argument.split(" ", 1))

    def _do_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        known = KNOWN_NAMES.get(f"{module}.{name}")
        if known is None:
            raise ForeignObjectError(f"{module}.{name}")
        self.stack.append(known)

    def _do_reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise ForeignObjectError(f"a call of {function!r}")
        value = function.call(*arguments)
        self.num_unfinished += isinstance(value, Unfinished)
        self.stack.append(value)

    def _do_build(self, _: Any) -> None:
        state, unfinished = self.stack.pop(), self.stack.pop()
        if not isinstance(unfinished, Unfinished):
            raise ForeignObjectError(f"the state of a {type(unfinished).__name__}")
        value = unfinished.finish(state)
        self.num_unfinished -= 1
        self.stack.append(value)
        for key in unfinished.memo_keys:
            self.memo[key] = value


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
        :func:`flsl_d2.weights.export.write_encoder` was given.

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
