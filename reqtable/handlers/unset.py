"""Finds attributes that a handler reads, but that nothing sets: each request that reads one fails."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import CodeType
from typing import Any

from reqtable.handlers.finding import Finding
from reqtable.handlers.source import (
    Sources,
    annotating,
    authors_functions,
    authors_methods,
    is_ours,
    names_set,
    of_self,
    statements,
)

# A class that uses one of these may set attributes whose names its source does not show, or expect that one is unset.
_DYNAMIC = {"setattr", "__dict__", "vars", "AttributeError"}


def unset(cls: Any, sources: Sources) -> dict[str, Finding]:
    """Return a finding for each attribute that is read, but that nothing sets, by the attribute's name."""
    words = set(_words(cls))
    if words & _DYNAMIC or hasattr(cls, "__getattr__"):
        return {}
    read: dict[str, str] = {}  # the name -> the place
    changed: dict[str, str] = {}  # by `+=` and the like
    for function in authors_methods(cls):
        node = sources.function(function)
        found = [*statements(node)] if node is not None else []
        augmented = {id(each.target) for each in found if isinstance(each, ast.AugAssign)}
        for each in found:
            name = of_self(each, node)
            if name is None or hasattr(cls, name):
                continue
            place = f"{function.__code__.co_filename}:{getattr(each, 'lineno', 0)}"
            (changed if id(each) in augmented else read).setdefault(name, place)
    fields, is_set = _without_default(cls), names_set(cls, sources)
    made = {}
    for name, place in ({**read, **changed}).items():
        if name in is_set or name in words:
            continue
        mend = f"give it a value in the class, as in {name}: int = 0"
        if name in fields:
            text = f"{cls.__name__}.{name} has no default, and nothing sets it"
            made[name] = Finding("unset", sources.place_of_field(fields[name], name), text, mend, False)
        elif name in changed and annotating(cls, name) is None:
            text = f"{cls.__name__}.{name} is read before anything sets it"
            made[name] = Finding("unset", place, text, mend, False)
    return made


def _without_default(cls: Any) -> dict[str, type]:
    """Return the author's fields without a default, each with the class that declares it."""
    found = {}
    for name in cls._fields:
        owner = annotating(cls, name)
        if owner is not None and not hasattr(cls, name) and not is_ours(owner.__module__):
            found[name] = owner
    return found


def _words(cls: type) -> Iterator[str]:
    """Yield the strings in the code of the author's functions, and the names of the functions that the code uses."""
    codes = [each.__code__ for each in authors_functions(cls)]
    while codes:
        code = codes.pop()
        yield from code.co_names if _DYNAMIC.intersection(code.co_names) else ()
        for each in code.co_consts:
            if isinstance(each, CodeType):
                codes.append(each)
            elif isinstance(each, str):
                yield each
            elif isinstance(each, tuple | frozenset):
                yield from (word for word in each if isinstance(word, str))
