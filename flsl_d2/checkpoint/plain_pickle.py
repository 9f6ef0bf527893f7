"""Reading Detectron2's ``.pkl`` weights without running code from them.

A pickle is a program for a stack machine that can import and call anything. Files of weights need
little of it: containers, strings, numbers and NumPy arrays. This reader follows those instructions
by itself, imports nothing, and refuses the rest by name. The instructions are described in
Python's module ``pickletools``, the form of arrays in NumPy's ``__reduce__``.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from typing import Any

from flsl_d2.checkpoint.pickle_objects import (
    KNOWN_NAMES,
    ForeignObjectError,
    Function,
    Unfinished,
)

__all__ = ["ForeignObjectError", "read_plain_pickle"]

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
