"""Finds wants that a statement makes and discards, such as `self.sleep(1)` without `await`, which does nothing.

Finds also a function that makes a want where the want should be, such as `return self.body, line`.

The search goes through the byte code when a handler class is made, so it costs nothing while serving. A `send` without
`await` is reported when it matters: above the high-water mark.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from reqtable.handlers.finding import refusal
from reqtable.handlers.successors import READS
from reqtable.net.connection import connect
from reqtable.table.connecting import StartTLS
from reqtable.table.reaching import Either
from reqtable.table.wants import Nothing

_WANTS = {Nothing.__module__, Either.__module__, StartTLS.__module__, connect.__module__}


def refuse_discarded(cls: type, style: type, methods: tuple[str, ...] = ()) -> None:
    """Raise HandlerError if a method of `cls` or of a mix-in discards a want, or names its function in its place.

    `style` is the handler class of the package that `cls` derives from; `methods` names its methods that return wants.
    """
    own = {name for name in methods if getattr(cls, name) is getattr(style, name)}
    for base in cls.__mro__:
        if base is not cls and issubclass(base, style):
            continue  # it was checked when it was made
        for function in vars(base).values():
            if isinstance(function, FunctionType):
                instructions = list(dis.get_instructions(function.__code__))
                title, file = function.__qualname__, function.__code__.co_filename
                for name, line in _discarded(function, own, instructions):
                    mend = f"await {name}(…)" if methods else f"return self.name, {name}(…)"
                    text = f"{title}: the statement {name}(…) alone does nothing"
                    raise refusal("discarded", f"{file}:{line}", text, f"write {mend}")
                for name, line in _uncalled(function, instructions):
                    text = f"{title}: {name} is a function that makes a want, and no want"
                    raise refusal("want", f"{file}:{line}", text, f"call it, as in {name}(…)")


def _discarded(
    function: FunctionType, methods: set[str], instructions: list[dis.Instruction]
) -> Iterator[tuple[str, int]]:
    """Find the calls that make a want which a statement discards. Yields the name of what is called, and the line."""
    code = function.__code__
    own = code.co_varnames[0] if code.co_argcount else None
    called: dict[tuple[int, int], str] = {}  # by position in the source: a call begins where its function does
    before: dis.Instruction | None = None
    for each in instructions:
        start = _start(each)
        if start is None or before is None:
            pass
        elif each.opname in READS:
            called.pop(start, None)  # an attribute of it is used, so it is no statement
            if before.argval == own and each.argval in methods:
                called[start] = f"{own}.{each.argval}"
            elif name := _of_module(function, before, each):
                called[start] = name
        elif each.opname == "LOAD_GLOBAL" and makes_want(function.__globals__.get(each.argval)):
            called[start] = each.argval
        elif each.opname == "POP_TOP" and before.opname.startswith("CALL") and _start(before) in called:
            yield called[start], start[0]
        before = each


def _uncalled(function: FunctionType, instructions: list[dis.Instruction]) -> Iterator[tuple[str, int]]:
    """Find functions of wants that are returned with a state, or are read. Yields the name, and the line."""
    for number, each in enumerate(instructions[1:-2], 1):
        before, after, last = (instructions[number + offset] for offset in (-1, 1, 2))
        name = _of_module(function, before, each)
        if name is not None:
            before = instructions[number - 2]
        elif each.opname == "LOAD_GLOBAL" and makes_want(function.__globals__.get(each.argval)):
            name = each.argval
        else:
            continue
        is_returned = (after.opname, after.argval, last.opname) == ("BUILD_TUPLE", 2, "RETURN_VALUE")
        is_read = before.argval == "read" and (after.opname, after.argval) in (("PRECALL", 1), ("CALL", 1))
        start = _start(each)
        if start is not None and (is_returned or is_read):
            yield name, start[0]


def _of_module(function: FunctionType, before: dis.Instruction, each: dis.Instruction) -> str | None:
    """Return the name if two instructions read the function of a want from a module, as in `reqtable.line`."""
    module = function.__globals__.get(before.argval) if before.opname == "LOAD_GLOBAL" else None
    if each.opname not in READS or not isinstance(module, ModuleType):
        return None
    return f"{before.argval}.{each.argval}" if makes_want(getattr(module, each.argval, None)) else None


def makes_want(thing: Any) -> bool:
    """Return whether `thing` is a function of this package that makes a want."""
    if not isinstance(thing, FunctionType) or thing.__module__ not in _WANTS:
        return False
    return str(thing.__annotations__.get("return")).startswith(("Want[", "WantOf["))


def _start(instruction: dis.Instruction) -> tuple[int, int] | None:
    at = instruction.positions
    return None if at is None or at.lineno is None or at.col_offset is None else (at.lineno, at.col_offset)
