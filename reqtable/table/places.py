"""Where the user's code is: `file:line` for messages."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial, partialmethod
from types import FrameType, FunctionType, MethodType
from typing import Any, NamedTuple

from reqtable.table.tracebacks import RUNNERS, package_of

_OWN = f"{__name__.partition('.')[0]}."
_WRAPPERS = (FunctionType, MethodType, classmethod, staticmethod, property, partial, partialmethod)


def place_of(thing: Any) -> str:
    """Return `file:line` where a function or a class is defined, or its module if there is no source."""
    for function in functions_in(inspect.unwrap(thing)):
        return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):  # it does not come from a file, or is no class
        return f"module {getattr(thing, '__module__', None) or type(thing).__module__}"


def owner_of(cls: type, name: str) -> type | None:
    """Return the first class in the MRO of `cls` that defines `name`, or None."""
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def place_in(frame: FrameType | None) -> str | None:
    """Return `file:line` of the innermost of the user's lines in a stack; None if the stack has none."""
    while frame is not None and package_of(frame) in RUNNERS:
        frame = frame.f_back
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Place(NamedTuple):
    """Names a line of the user's code: `Notes.command (file:line)`."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


def caller() -> Place:
    """Return the line of the user's code that called into this package."""
    frame = _users_frame()
    return Place(frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno)


def warn_at_caller(message: str) -> None:
    """Warn (RuntimeWarning) of the user's line that called into this package. By default each line is shown once."""
    frame = _users_frame()
    warnings.warn_explicit(
        message,
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _users_frame() -> FrameType:
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").startswith(_OWN) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def functions_in(thing: Any) -> Iterator[FunctionType]:
    """Yield the functions inside a decorated function: `thing` itself, and what it wraps, binds or closes over."""
    waiting = [thing]
    if not isinstance(thing, (*_WRAPPERS, type)):
        waiting += getattr(thing, "__dict__", {}).values()  # a decorator that is a class keeps the function there
    seen = set()
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, _WRAPPERS) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, FunctionType):
            yield each
            waiting += _closed_over(each)
        else:
            waiting += [getattr(each, name, None) for name in ("__func__", "fget", "func")]


def _closed_over(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # the cell is still empty
            yield cell.cell_contents
