"""Reading Detectron2's ``.pkl`` weights without running code from them.

A pickle is a program for a stack machine that can import and call anything. Files of weights need
little of it: containers, strings, numbers and NumPy arrays. This reader follows those instructions
by itself, imports nothing, and refuses the rest by name. The instructions are described in
Python's module ``pickletools``, the form of arrays in NumPy's ``__reduce__``.
"""

from __future__ import annotations

import mmap
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["ForeignObjectError", "read_plain_pickle"]


class ForeignObjectError(ValueError):
    """A pickle asks for something that is not data; its text is the name."""


class _Function:
    """Stands for the one thing that a name of :data:`_KNOWN` may do."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class _Unfinished:
    """An array or data type between its creation and the instruction that fills it."""

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self.finish = finish
        self.memo_keys: list[int] = []


def _dtype(code: Any, *_: Any) -> _Unfinished:
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[biufc]\d+", code):
        raise ForeignObjectError(f"numpy.dtype({code!r})")
    kind = np.dtype(code)
    # The state begins with the version of its format and the byte order.
    return _Unfinished(lambda state: kind.newbyteorder(state[1] if state[1] in "<>" else "|"))


def _array(*_: Any) -> _Unfinished:
    def finish(state: tuple) -> np.ndarray:
        _, shape, dtype, is_fortran, data = state
        return _from_buffer(data, dtype, shape, "F" if is_fortran else "C")

    return _Unfinished(finish)


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


_KNOWN: dict[str, _Function | type] = {
    "collections.OrderedDict": _Function(lambda *pairs: OrderedDict(*pairs)),
    "_codecs.encode": _Function(_encode),
    "builtins.bytes": _Function(_byte_string),
    "__builtin__.bytes": _Function(_byte_string),
    "builtins.bytearray": _Function(_byte_string),
    "__builtin__.bytearray": _Function(_byte_string),
    "numpy.dtype": _Function(_dtype),
    "numpy.ndarray": np.ndarray,  # an argument only
    **{
        f"{package}.{name}": _Function(call)
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
        if self.num_unfinished or self.marks or isinstance(result, (_Function, type)):
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
        if isinstance(value, _Unfinished):
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
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise ForeignObjectError(f"{module}.{name}")
        self.stack.append(known)

    def _do_reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise ForeignObjectError(f"a call of {function!r}")
        value = function.call(*arguments)
        self.num_unfinished += isinstance(value, _Unfinished)
        self.stack.append(value)

    def _do_build(self, _: Any) -> None:
        state, unfinished = self.stack.pop(), self.stack.pop()
        if not isinstance(unfinished, _Unfinished):
            raise ForeignObjectError(f"the state of a {type(unfinished).__name__}")
        value = unfinished.finish(state)
        self.num_unfinished -= 1
        self.stack.append(value)
        for key in unfinished.memo_keys:
            self.memo[key] = value
