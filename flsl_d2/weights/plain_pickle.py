"""Pickles of weights, as Detectron2's model zoo has them, read through an allow-list.

``find_class`` gives out the few functions below and nothing else. None of NumPy's own constructors
is among them: they accept sizes and data types that no weight needs.
"""

from __future__ import annotations

import mmap
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ForeignObjectError(ValueError):
    """The pickle asks for something that is not data; the text is its name."""


class _Function:
    """A callable whose attributes a pickle cannot set."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ForeignObjectError("the state of a function")


class _Pairs(OrderedDict[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        raise ForeignObjectError("the state of an OrderedDict")


class _DataType:
    """Stands for ``numpy.dtype`` until its state gives the byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc]\d+", code):
            raise ForeignObjectError(f"numpy.dtype({code!r})")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # The state begins with the version of its format and the byte order.
        self.numpy = self.numpy.newbyteorder(state[1] if state[1] in "<>" else "|")


class _Array:
    """Stands for ``numpy.ndarray`` until its state gives the numbers."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.values = _values(data, dtype, shape, "F" if is_fortran else "C")


def _values(data: Any, dtype: _DataType, shape: tuple[int, ...], order: Any) -> np.ndarray:
    values = np.frombuffer(_bytes(data), dtype.numpy).reshape(shape, order=order)
    return values.astype(dtype.numpy.newbyteorder("="))


def _array_from_buffer(data: Any, dtype: _DataType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.values = _values(data, dtype, shape, order)
    return array


def _scalar(dtype: _DataType, data: Any) -> Any:
    return np.frombuffer(_bytes(data), dtype.numpy)[0].item()


def _bytes(data: Any = b"", *_: Any) -> bytes:
    """Raw data; Python 2 wrote it as a string."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise ValueError("the pickle has no raw data where an array needs them")
    return bytes(data)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ForeignObjectError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


_ALLOWED = {
    "collections.OrderedDict": _Function(_Pairs),
    "_codecs.encode": _Function(_encode),
    **{
        f"{module}.{name}": _Function(_bytes)
        for module in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    },
    "numpy.dtype": _Function(_DataType),
    "numpy.ndarray": _Function(lambda: _Array()),  # named as an argument of _reconstruct only
    **{
        f"{package}.{name}": _Function(call)
        for package in ("numpy.core", "numpy._core")
        for name, call in (
            ("multiarray._reconstruct", lambda *_: _Array()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array_from_buffer),
        )
    },
}


# The C implementation reserves memory for whatever memo index a damaged file names.
class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get(f"{module}.{name}")
        if known is None:
            raise ForeignObjectError(f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise ForeignObjectError(f"a persistent object ({pid!r})")


def read_plain_pickle(path: str) -> Any:
    """Read the data in a pickle of any protocol: containers, strings, numbers, NumPy arrays.

    Returns:
        The content, with tensors in the place of arrays.

    Raises:
        ForeignObjectError: the pickle asks for anything else; the text names it.
        Exception: any type of exception, where the file is damaged.
    """
    # A map of the file ends where the file does, whatever size an instruction claims to have.
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file:
        content = _PlainUnpickler(file, encoding="latin1").load()
    return _without_stand_ins(content, {})


def _without_stand_ins(content: Any, seen: dict[int, Tensor]) -> Any:
    if isinstance(content, dict):
        return {key: _without_stand_ins(value, seen) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_without_stand_ins(value, seen) for value in content)
    if isinstance(content, _Array) and content.values is not None:
        return seen.setdefault(id(content), torch.from_numpy(content.values))
    if isinstance(content, (_Array, _DataType, _Function)):
        raise ValueError("the pickle has an unfinished array")
    return content
