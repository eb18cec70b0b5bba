"""Wants that a statement makes and throws away, such as `self.sleep(1)` without `await`: alone they do nothing.

They are found in the byte code when a handler class is made, so that serving pays nothing for it. A `send` without
`await` is found when it matters: above the high-water mark.
"""

from __future__ import annotations

import dis
from collections.abc import Generator, Iterator
from types import FunctionType
from typing import Any

from reqtable.table.errors import HandlerError
from reqtable.table.places import warn_at_caller
from reqtable.table.wants import Want, flushed


class Room:
    """What `send` gives above the high-water mark: awaited, it waits for the peer. A program that drops it is told."""

    __slots__ = ("_is_awaited",)

    def __init__(self) -> None:
        self._is_awaited = False

    def __await__(self) -> Generator[Want[None], Any, None]:
        self._is_awaited = True
        return flushed().__await__()

    def __del__(self) -> None:
        if not self._is_awaited:
            warn_at_caller("more output than high_water_bytes waits for the peer: write await self.send(…) to wait too")


def refuse_discarded(cls: type, style: type, methods: tuple[str, ...] = ()) -> None:
    """Raise HandlerError where a method of `cls`, or of a mix-in, has a statement that is no more than a want.

    `methods` are the names of those methods of every handler of the same `style` that return a want to be awaited.
    """
    own = {name for name in methods if getattr(cls, name) is getattr(style, name)}
    for base in cls.__mro__:
        if base is not cls and issubclass(base, style):
            continue  # it has been looked at
        for function in vars(base).values():
            if isinstance(function, FunctionType):
                for name, line in _discarded(function, own):
                    mend = f"await {name}(…)" if methods else f"return self.name, {name}(…)"
                    raise HandlerError(
                        f"{function.__qualname__}: the statement {name}(…) alone waits for nothing: write {mend} "
                        f"({function.__code__.co_filename}:{line})"
                    )


def _discarded(function: FunctionType, methods: set[str]) -> Iterator[tuple[str, int]]:
    """The calls that make a want and whose result a statement drops: the name of what is called, and the line."""
    code = function.__code__
    own = code.co_varnames[0] if code.co_argcount else None
    called: dict[tuple[int, int], str] = {}  # by where it begins in the source: a call begins where its function does
    before: dis.Instruction | None = None
    for each in dis.get_instructions(code):
        start = _start(each)
        if start is None or before is None:
            pass
        elif each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            called.pop(start, None)  # what it is an attribute of is no statement
            if before.argval == own and each.argval in methods:
                called[start] = f"{own}.{each.argval}"
        elif each.opname == "LOAD_GLOBAL" and _makes_want(function.__globals__.get(each.argval)):
            called[start] = each.argval
        elif each.opname == "POP_TOP" and before.opname.startswith("CALL") and _start(before) in called:
            yield called[start], start[0]
        before = each


def _makes_want(thing: Any) -> bool:
    if not isinstance(thing, FunctionType) or thing.__module__ != Want.__module__:
        return False
    return str(thing.__annotations__.get("return")).startswith("Want[")


def _start(instruction: dis.Instruction) -> tuple[int, int] | None:
    at = instruction.positions
    return None if at is None or at.lineno is None or at.col_offset is None else (at.lineno, at.col_offset)
