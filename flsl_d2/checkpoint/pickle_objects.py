"""The few things that a pickle of weights may name: what they make, without importing them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["KNOWN_NAMES", "ForeignObjectError", "Function", "Unfinished"]


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
