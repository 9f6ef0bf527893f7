"""Pickles of weights, read as data: files of ``torch.save`` (both formats) and of Detectron2.

No name in a pickle is imported. The few functions of :data:`_KNOWN` stand for those that tensors,
arrays and containers need; everything else becomes :class:`Unread`, which runs nothing. NumPy's
random state or the options of a training script therefore do not keep a file from being read.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

# First object in a file of torch.save before PyTorch 1.6.
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
# Functions that a pickle of weights never names; one that does was made to run commands.
_COMMANDS = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|runpy|pty|importlib|ctypes)\..*"
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|__import__)"
)
_DTYPES = {
    **{f"{kind}Storage": getattr(torch, kind.lower()) for kind in ("Double", "Float", "Half")},
    **{f"{kind}Storage": getattr(torch, kind.lower()) for kind in ("BFloat16", "Long", "Int")},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "UntypedStorage": torch.uint8, "QInt8Storage": torch.int8},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


class CommandError(ValueError):
    """The pickle names a function that runs commands; the text is its name."""


class Unread(dict[Any, Any]):
    """Stands for an object of any other class; holds its attributes and items, as data."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        for each in arguments:
            self.build(each)

    def build(self, state: Any) -> None:
        """Keep the attributes of an object's state."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)

    def append(self, _: Any) -> None:
        """Leave out the items of lists and sets."""

    extend = add = append


class _Storage(NamedTuple):
    """Memory of tensors: bytes, and the type of a value."""

    values: Tensor
    dtype: torch.dtype


class _DataType:
    """Stands for ``numpy.dtype`` until its state gives the byte order."""

    def __init__(self, code: str) -> None:
        self.numpy = np.dtype(code)

    def build(self, state: tuple[Any, ...]) -> None:
        """Take the byte order, which follows the version of the state's format."""
        self.numpy = self.numpy.newbyteorder(state[1] if state[1] in "<>" else "|")


class _Array:
    """Stands for ``numpy.ndarray`` until its state gives the numbers."""

    tensor: Tensor | None = None

    def build(self, state: tuple[Any, ...]) -> None:
        """Take shape, type, order and numbers."""
        _, shape, dtype, is_fortran, data = state
        self.tensor = _array(data, dtype, shape, "F" if is_fortran else "C").tensor


def _array(data: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> _Array:
    array = _Array()
    if isinstance(dtype, _DataType):  # arrays of objects or texts are no weights
        values = np.frombuffer(_bytes(data), dtype.numpy).reshape(shape, order=order)
        array.tensor = torch.from_numpy(values.astype(dtype.numpy.newbyteorder("=")))
    return array


def _data_type(code: Any, *_: Any) -> _DataType | Unread:
    known = isinstance(code, str) and re.fullmatch(r"[<>|=]?[biufc]\d+", code)
    return _DataType(code) if known else Unread()


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _DataType):
        return None
    return np.frombuffer(_bytes(data), dtype.numpy)[0].item()


def _bytes(data: Any = b"", *_: Any) -> bytes:
    """Raw data; Python 2 wrote it as a string."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("no raw data where an array needs them")
    return bytes(data)


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # as_strided refuses sizes beyond the storage, where set_ would make the storage larger.
    return storage.values.view(storage.dtype).as_strided(tuple(size), tuple(stride), offset)


def _typed_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    return _tensor(_Storage(storage.values, rest[2]), offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "collections.Counter": lambda counts=(): Counter(counts),
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    **{f"{m}.{n}": _bytes for m in ("builtins", "__builtin__") for n in ("bytes", "bytearray")},
    "numpy.dtype": _data_type,
    **{
        f"{package}.{name}": call
        for package in ("numpy.core", "numpy._core")
        for name, call in (
            ("multiarray._reconstruct", lambda *_: _Array()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array),
        )
    },
    "torch.Size": lambda size=(): tuple(size),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_qtensor": _tensor,  # its values are integers, which are refused later
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._tensor._rebuild_from_type_v2": lambda call, _, arguments, *rest: _call(call, arguments),
    "torch.storage._load_from_bytes": lambda data: read_pickle(io.BytesIO(data))[0],
}
_CALLABLE = {id(function) for function in _KNOWN.values()}
# Containers of options, whose content is kept whole.
_PLAIN = {"argparse.Namespace", "collections.defaultdict"}


def _call(function: Any, arguments: Any) -> Any:
    return function(*arguments) if id(function) in _CALLABLE else Unread(*arguments)


# The C implementation reserves memory for whatever memo index a damaged file names.
class _Unpickler(pickle._Unpickler):
    """Calls the functions of :data:`_KNOWN` alone, and changes no object but its stand-ins.

    Args:
        stream: the pickle.
        storage: function from the key, type and number of values of a storage to its data.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: Any

    def __init__(
        self, stream: Any, storage: Callable[[str, torch.dtype, int], _Storage] | None = None
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self.storage = storage
        self.unread: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]
        if _COMMANDS.fullmatch(full):
            raise CommandError(full)
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full not in _PLAIN:
            self.unread.add(full)
        return Unread

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None:
            raise ValueError(f"a persistent object ({str(pid)[:40]})")
        if pid[0] != "storage":  # a module, with its source
            return _first(*pid[1:2])
        _, dtype, key, _, count, *view = pid
        if any(each is not None for each in view):
            raise ValueError("views of storages, which PyTorch wrote before version 0.4")
        return self.storage(key, dtype if isinstance(dtype, torch.dtype) else torch.uint8, count)

    def load_newobj(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, arguments))

    def load_newobj_ex(self) -> None:
        named, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, (*arguments, named)))

    def _instantiate(self, function: Any, arguments: Any) -> None:
        self.stack.append(_call(function, arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Unread | _Array | _DataType):
            target.build(state)

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.REDUCE[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build


def read_pickle_file(path: str) -> tuple[Any, set[str]]:
    """Read a file that is a pickle, as :func:`read_pickle` does."""
    # A map of the file ends where the file does, whatever size an instruction claims to have.
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file:
        return read_pickle(file)


def read_pickle(stream: Any) -> tuple[Any, set[str]]:
    """Read a pickle of any protocol, or a file of ``torch.save`` from before PyTorch 1.6.

    Returns:
        The content, with tensors in the place of arrays, and the names of the classes that were
        not read.

    Raises:
        CommandError: the pickle names a function that runs commands.
        Exception: any type of exception, where the file is damaged.
    """
    first = _Unpickler(stream)
    content = first.load()
    if content != _OLD_MAGIC:
        return _finished(content), first.unread
    for _ in range(2):  # version and sizes of numbers
        _Unpickler(stream).load()
    size = len(stream) if isinstance(stream, mmap.mmap) else stream.getbuffer().nbytes
    storages: dict[str, _Storage] = {}

    def reserve(key: str, dtype: torch.dtype, count: int) -> _Storage:
        if key not in storages:
            width = dtype.itemsize * count
            if not 0 <= width <= size:
                raise ValueError("a tensor is larger than the file")
            storages[key] = _Storage(torch.empty(width, dtype=torch.uint8), dtype)
        return storages[key]

    unpickler = _Unpickler(stream, reserve)
    content = unpickler.load()
    for key in _Unpickler(stream).load():
        stream.read(8)  # the number of values
        values = storages[key].values
        data = stream.read(len(values))
        if len(data) < len(values):
            raise ValueError("the file ends within a tensor")
        values.copy_(_memory(data))
    return _finished(content), unpickler.unread


def read_archive(archive: zipfile.ZipFile) -> tuple[Any, set[str]]:
    """Read a file of ``torch.save``, which is a ZIP archive; see :func:`read_pickle`."""
    names = archive.namelist()
    main = next(name for name in names if name.split("/")[1:] == ["data.pkl"])
    root = main.removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big":
        raise ValueError("numbers are stored with the highest byte first")
    storages: dict[str, _Storage] = {}

    def read(key: str, dtype: torch.dtype, _: int) -> _Storage:
        if key not in storages:
            storages[key] = _Storage(_memory(archive.read(f"{root}data/{key}")), dtype)
        return storages[key]

    unpickler = _Unpickler(io.BytesIO(archive.read(main)), read)
    return _finished(unpickler.load()), unpickler.unread


def _memory(data: bytes) -> Tensor:
    if not data:  # frombuffer refuses it
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _finished(content: Any, seen: dict[int, Any] | None = None) -> Any:
    """Put tensors in the place of arrays; every container is changed in place, once."""
    seen = {} if seen is None else seen
    if id(content) in seen:
        return seen[id(content)]
    if isinstance(content, _Array):
        return content.tensor
    if isinstance(content, dict | list):
        seen[id(content)] = content
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in list(items):
            content[key] = _finished(value, seen)
    elif type(content) is tuple:
        seen[id(content)] = tuple(_finished(value, seen) for value in content)
        return seen[id(content)]
    return None if isinstance(content, _DataType) else content
