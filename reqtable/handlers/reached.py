"""Finds states to which nothing leads: no code that can run names them. `words_of` has all words of a class."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from reqtable.handlers.declaration import is_state
from reqtable.handlers.source import is_ours
from reqtable.table.places import functions_in, owner_of

# Code that uses one of these may go to a state whose name it works out.
_DYNAMIC = {"getattr", "attrgetter", "methodcaller", "__dict__", "vars", "getmembers", "__getattribute__"}
_DEPTH_MAX = 8  # of functions that call each other


def unreached(cls: Any) -> list[str]:
    """Return the names of the author's states that no method leads to, as far as the code shows.

    A state is reached if it is the first, or if a method that is no state or a reached state has its name, as an
    attribute or as a word. Nothing is found if such a method may work out the name of a state.
    """
    names = set(cls._declared())
    found: set[str] = set(cls._entered())
    waiting = [each for each in _attributes(cls) if each not in names or each in found]
    seen = set(waiting)
    while waiting:
        words = set(_words_at(cls, waiting.pop()))
        if words & _DYNAMIC:
            return []
        found |= words & names
        waiting += words & names - seen
        seen |= words & names
    left = [each for each in cls._declared() if each not in found and not is_ours(getattr(cls, each).__module__)]
    return [each for each in left if _is_its_own(cls, each)]


def words_of(cls: Any) -> set[str] | None:
    """Return the words of all that the author's classes define; None if some code may work out other names."""
    words = {word for name in _attributes(cls) for word in _words_at(cls, name)}
    return None if words & _DYNAMIC else words


def _is_its_own(cls: Any, name: str) -> bool:
    """Return whether `cls` is to blame: it declares the state, or the base that does leads nowhere to it, too."""
    owner: Any = owner_of(cls, name)
    return owner is cls or (hasattr(owner, "_declared") and name in unreached(owner))


def _attributes(cls: type) -> list[str]:
    """Return the names of what the author's classes define, without what the package keeps there."""
    ours = {name for base in cls.__mro__ if is_ours(base.__module__) for name in vars(base) if name[0] == "_"}
    found = {name for base in cls.__mro__ if not is_ours(base.__module__) for name in vars(base)}
    return list(found - ours)


def _words_at(cls: type, name: str) -> Iterator[str]:
    """Yield the words of all that `cls` and its bases have as their `name`: an override may call what it overrides."""
    for base in cls.__mro__:
        if name in vars(base) and not is_ours(base.__module__):
            yield from _words_in(vars(base)[name], set(), 0)


def _words_in(thing: Any, seen: set[int], depth: int) -> Iterator[str]:
    """Yield the words of a value: the names and the strings in its code, and in what that code uses."""
    if id(thing) in seen or depth > _DEPTH_MAX:
        return
    seen.add(id(thing))
    if isinstance(thing, str):
        yield thing
    elif isinstance(thing, dict):
        yield from _words_in_all([*thing, *thing.values()], seen, depth)
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from _words_in_all(thing, seen, depth)
    else:
        for function in functions_in(thing):
            if is_state(function) and depth:  # in a table of states
                yield function.__name__
            elif not is_ours(function.__module__):
                yield from _words_of(function, seen, depth)


def _words_in_all(values: Iterable[Any], seen: set[int], depth: int) -> Iterator[str]:
    for each in values:
        yield from _words_in(each, seen, depth + 1)


def _words_of(function: FunctionType, seen: set[int], depth: int) -> Iterator[str]:
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        for each in code.co_consts:
            if isinstance(each, CodeType):
                codes.append(each)
            else:
                yield from _words_in(each, seen, depth + 1)
        yield from code.co_names
        used = (function.__globals__[each] for each in code.co_names if each in function.__globals__)
        yield from _words_in_all([each for each in used if _is_looked_into(each)], seen, depth)


def _is_looked_into(thing: Any) -> bool:
    if isinstance(thing, FunctionType):
        return not _is_foreign(thing.__module__ or "")
    return isinstance(thing, dict | list | tuple | set | frozenset)


def _is_foreign(module: str) -> bool:
    return is_ours(module) or module.partition(".")[0] in sys.stdlib_module_names
