"""The text of an error, with the name that was probably meant in place of a wrong one.

Python has such suggestions only in a traceback, and before 3.12 only in one that it prints itself.
"""

from __future__ import annotations

import builtins
import inspect
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_WRONG_ARGUMENT = re.compile(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'")
_NAMES_MAX = 750  # a longer list takes too long to compare


def text_of(error: BaseException) -> str:
    """Return the text of `error`, and the name that was probably meant if a wrong one has led to the error."""
    try:
        text = str((isinstance(error, SyntaxError) and error.msg) or error)
    except Exception:  # its class may be the user's
        return "<its str() failed>"
    near: list[str] = []
    if isinstance(error, NameError | AttributeError | ImportError | TypeError) and "Did you mean" not in text:
        with suppress(Exception):  # the names are asked of the program's own objects
            near = _near(error, text)
    return f"{text}. Did you mean: '{near[0]}'?" if near else text


def _near(error: Any, text: str) -> list[str]:
    import difflib  # only a mistake needs it

    wrong: str | None = None
    names: Iterable[str] = ()
    if isinstance(error, NameError):
        wrong, names = error.name, _names_at(error)
    elif isinstance(error, AttributeError):
        wrong, names = error.name, dir(error.obj)
    elif isinstance(error, ImportError):
        wrong, names = getattr(error, "name_from", None), dir(sys.modules.get(error.name or ""))
    elif (found := _WRONG_ARGUMENT.fullmatch(text)) is not None:
        called: Any = None
        for number, each in enumerate(found[1].split(".")):
            called = getattr(called, each) if number else _names_at(error)[each]
        wrong, names = found[2], inspect.signature(called).parameters
    known = [each for each in names if each != wrong][:_NAMES_MAX]  # an attribute may be known, but have no value
    return difflib.get_close_matches(wrong, known, n=1) if wrong is not None else []


def _names_at(error: BaseException) -> dict[str, Any]:
    """Return the names, with their values, that the line which raised `error` could use."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return {}
    frame = trace.tb_frame
    # The locals are first because the nearest names are compared first. Their values hide those of the others.
    return {**frame.f_locals, **frame.f_globals, **vars(builtins), **frame.f_locals}
