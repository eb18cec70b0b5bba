"""Finds mistakes in a handler class: one list of findings, for `reqtable check` and for a server that starts.

A fault is certain: a server refuses the class. A doubt is probable: a server that starts logs a warning.
What a class can't even be made with is raised where the class is made, as a HandlerError that carries its finding.
"""

from __future__ import annotations

import ast
import dis
import inspect
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

from reqtable.handlers.coroutine import AsyncRequestHandler
from reqtable.handlers.field_types import why_no_data
from reqtable.handlers.finding import Finding
from reqtable.handlers.misspelt import misspelt_hooks
from reqtable.handlers.reached import unreached
from reqtable.handlers.resumable import ResumableHandler, log
from reqtable.handlers.returned import Returned, texts
from reqtable.handlers.source import (
    Function,
    Sources,
    annotating,
    authors_methods,
    end_of,
    global_of,
    is_authors,
    is_ours,
    of_self,
    statements,
)
from reqtable.handlers.state import StateRequestHandler
from reqtable.handlers.unset import unset
from reqtable.table.places import owner_of, place_of
from reqtable.table.snapshot import handler_name, unwrapped
from reqtable.table.wants import Line, Parsed, Rest, Until

_LIMITED = (Line, Until, Parsed, Rest)  # the wants whose limit a client can exceed
_NEVER = {"NoReturn", "Never"}


def findings(handler_class: Any, sources: Sources) -> list[Finding]:
    """Return all that is wrong with a handler class, or with a `functools.partial` of one."""
    return [*_when_made(handler_class), *_in_source(unwrapped(handler_class), sources)]


def faults(handler_class: Any) -> Iterator[Finding]:
    """Yield why handlers of that class can't serve."""
    yield from _when_made(handler_class)
    yield from (each for each in _in_source_once(unwrapped(handler_class)) if each.refuses)


@lru_cache(maxsize=1024)
def warn_of_doubts(cls: type) -> None:
    """Log a warning for each doubt about a handler class: once in a process, and not again in its workers."""
    for each in _in_source_once(cls):
        if not each.refuses:
            log.warning("%s", each)


@lru_cache(maxsize=1024)
def _in_source_once(cls: type) -> tuple[Finding, ...]:
    """Return what `_in_source` finds. A server looks for faults first, then for doubts: its source is parsed once."""
    return tuple(_in_source(cls, Sources()))


def _when_made(handler_class: Any) -> Iterator[Finding]:
    """Yield why no handler of that class can be made, or begin."""
    own = unwrapped(handler_class)
    if issubclass(own, ResumableHandler):
        if (unfit := own._unfit()) is not None:
            yield unfit
        yield from list(_call_fault(handler_class, ("entry",), own._begins_in)) or _init_fault(own)
        return
    yield from _call_fault(handler_class, ("request", "client_address", "server"), "setup()")
    handle = getattr(own, "handle", None)
    if inspect.iscoroutinefunction(handle):
        name = handler_name(own)
        text = f"{name}.handle is a coroutine, but a blocking handler's handle() is not awaited"
        yield Finding("async", place_of(handle), text, f"derive {name} from reqtable.AsyncRequestHandler")


def _in_source(cls: type, sources: Sources) -> Iterator[Finding]:
    """Yield what the source of a handler class shows: lines that always fail, then probable mistakes."""
    if not issubclass(cls, ResumableHandler):
        return
    yield from texts(cls, sources)
    never_set = unset(cls, sources)
    if issubclass(cls, StateRequestHandler):
        yield from _State(cls, sources).findings(never_set)
    else:
        yield from _not_awaited(cls, sources)
    yield from never_set.values()
    yield from misspelt_hooks(cls)
    yield from _absent_files(cls, sources)


def _call_fault(handler_class: Any, given: tuple[str, ...], begins_in: str) -> Iterator[Finding]:
    """Yield a finding if the handler class can't be called with the arguments `given`."""
    try:
        signature = inspect.signature(handler_class)
    except (TypeError, ValueError):  # perhaps a class written in C
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        own: Any = unwrapped(handler_class)
        yield _not_made(
            own,
            own.__new__ if is_authors(own.__new__) else own.__init__,
            f"{handler_name(own)} can't be called with ({', '.join(given)}): {error}",
            "a handler has no parameters of its own: declare fields in the class, as in words: int = 0, and prepare "
            f"them in {begins_in}",
        )


def _init_fault(own: Any) -> Iterator[Finding]:
    """Yield a finding if an `__init__` leaves out that of its base, by the names in its code.

    A function that it calls may call that of the base.
    """
    owner: Any = owner_of(own, "__init__")
    init = vars(owner)["__init__"]
    if not is_authors(init) or hasattr(init, "__wrapped__"):
        return
    names = init.__code__.co_names
    used = inspect.getclosurevars(init)
    helpers = [*used.globals.values(), *used.nonlocals.values(), *(getattr(own, each, None) for each in names)]
    if "__init__" not in names and not any(map(is_authors, helpers)):
        text = f"{owner.__name__}.__init__ does not call that of its base"
        yield _not_made(owner, init, text, "write super().__init__(entry)")


def _not_made(cls: type, maker: Any, text: str, mend: str) -> Finding:
    """Return the finding about the `__new__` or the `__init__` of a class. It is at the class if nobody wrote it."""
    is_written = is_authors(maker) and maker.__code__.co_filename != "<string>"
    if is_dataclass(cls) and not is_written:
        mend = "leave out @dataclass, and give each field a default"
    return Finding("init", place_of(maker if is_written else cls), text, mend)


class _State:
    """Looks for mistakes in a state machine."""

    def __init__(self, cls: type[StateRequestHandler], sources: Sources) -> None:
        self._cls = cls
        self._sources = sources

    def findings(self, never_set: Collection[str]) -> Iterator[Finding]:
        lost = unreached(self._cls)
        returned = Returned(self._cls, self._sources, lost)
        yield from returned.wrong()
        yield from returned.endless()
        yield from self._unreached(lost)
        yield from returned.unknown()
        yield from returned.without_want()
        yield from self._ends()
        yield from self._limit()
        yield from self._undeclared(never_set)
        yield from self._no_data()

    def _unreached(self, lost: list[str]) -> Iterator[Finding]:
        for name in lost:
            text = f"{self._cls.__name__}.{name}: no method leads to this state"
            yield Finding(
                "unreached",
                place_of(getattr(self._cls, name)),
                text,
                f"return self.{name} somewhere, or remove it",
                False,
            )

    def _ends(self) -> Iterator[Finding]:
        """Find states, and a `start`, that may come to their end without a `return`."""
        for name in (*self._cls._declared(), "start"):
            function = getattr(self._cls, name)
            if not is_authors(function) or hasattr(function, "__wrapped__"):  # a decorator may return something else
                continue
            node = self._sources.function(function)
            if node is None or _says_none(node):
                continue
            end = end_of(node.body, partial(_never_returns, self._cls, function, node))
            if end is not None:
                yield Finding(
                    "no-return",
                    f"{function.__code__.co_filename}:{end.lineno}",
                    f"{self._cls.__name__}.{name} may end here without a return, which closes the connection",
                    f"write return self.{self._cls._example} for the next state, or return None to close",
                    False,
                )

    def _limit(self) -> Iterator[Finding]:
        """Find an `on_limit` that goes back to a state which can't take the input either."""
        function: Any = self._cls.on_limit
        node = self._sources.function(function) if is_authors(function) else None
        if node is None or "state_name" in function.__code__.co_names:  # it looks which state it was
            return
        declared = self._cls._declared()
        for each in statements(node):
            if not isinstance(each, ast.Return):
                continue
            target = of_self(each.value, node)
            if target in declared and isinstance(declared[target].want, _LIMITED):
                text = (
                    f"{self._cls.__name__}.on_limit goes to {target}, but what exceeded the limit of {target} is still "
                    "unread, and would exceed the limit again"
                )
                mend = "go to a state that takes it, as in return self.skipped, skip_line()"
                yield Finding("limit", f"{function.__code__.co_filename}:{each.lineno}", text, mend, False)

    def _undeclared(self, never_set: Collection[str]) -> Iterator[Finding]:
        """Find attributes that methods set, but that the class does not declare. Those `never_set` are told already."""
        cls, seen = self._cls, {*self._cls._savable, *never_set}
        for function in authors_methods(cls):
            node = self._sources.function(function)
            for each in statements(node) if node is not None else ():
                if not isinstance(each, ast.Attribute) or not isinstance(each.ctx, ast.Store):
                    continue
                name = of_self(each, node)
                if name is None or name in seen or hasattr(type(inspect.getattr_static(cls, name, None)), "__set__"):
                    continue
                seen.add(name)
                mend = "annotate it in the class, as in words: int = 0"
                if name[0] == "_":
                    mend = f"{mend}, under a name without an underscore"
                text = (
                    f"{cls.__name__}.{name} is no declared field: a request that has it can't move to another process"
                )
                yield Finding("undeclared", f"{function.__code__.co_filename}:{each.lineno}", text, mend, False)

    def _no_data(self) -> Iterator[Finding]:
        """Find declared fields that can't be data."""
        cls = self._cls
        for name in cls._fields:
            owner = annotating(cls, name)
            if owner is None or is_ours(owner.__module__):
                continue
            problem = why_no_data(cls, owner, name)
            if problem is not None:
                reason, mend = problem
                yield Finding(
                    "field",
                    self._sources.place_of_field(owner, name),
                    f"{cls.__name__}.{name}: {reason}: a request that has one can't move to another process",
                    mend,
                    False,
                )


def _not_awaited(cls: type, sources: Sources) -> Iterator[Finding]:
    """Find calls of coroutines, and of `send`, that are statements without `await`."""
    for function in authors_methods(cls):
        node = sources.function(function)
        for each in statements(node) if isinstance(node, ast.AsyncFunctionDef) else ():
            if not isinstance(each, ast.Expr) or not isinstance(each.value, ast.Call):
                continue
            name = of_self(each.value.func, node)
            called = getattr(cls, name or "", None)
            if inspect.iscoroutinefunction(called):
                problem = "does nothing without await"
            elif called is AsyncRequestHandler.send:
                problem = "without await does not wait for a slow client, whose output grows up to its limit"
            else:
                continue
            text = f"{cls.__name__}.{function.__name__}: self.{name}(…) {problem}"
            place = f"{function.__code__.co_filename}:{each.lineno}"
            yield Finding("not-awaited", place, text, f"write await self.{name}(…)", False)


def _absent_files(cls: type, sources: Sources) -> Iterator[Finding]:
    """Find files that `start_tls(cert="…", key="…")` names, but that are absent."""
    for function in authors_methods(cls):
        node = sources.function(function) if "start_tls" in function.__code__.co_names else None
        for each in statements(node) if node is not None else ():
            if not isinstance(each, ast.Call) or "start_tls" not in (
                getattr(each.func, "id", None),
                getattr(each.func, "attr", None),
            ):
                continue
            for option in each.keywords:
                path = option.value.value if isinstance(option.value, ast.Constant) else None
                if option.arg not in ("cert", "key", "ca") or not isinstance(path, str) or os.path.exists(path):
                    continue
                text = f"{cls.__name__}.{function.__name__}: start_tls() names the file {path}, which is absent"
                place = f"{function.__code__.co_filename}:{option.lineno}"
                yield Finding("file", place, text, "make the file, or give the path from the root", False)


def _says_none(node: Function) -> bool:
    """Return whether the annotation says that the function returns None: it is a last state, and meant to be."""
    return isinstance(node.returns, ast.Constant) and node.returns.value in (None, "None")


def _never_returns(cls: type, function: FunctionType, node: Function, call: ast.Call) -> bool:
    """Return whether a call always raises: its function has no `return`, or is annotated so."""
    own = of_self(call.func, node)
    called = global_of(call.func, function) if own is None else getattr(cls, own, None)
    if called is sys.exit:
        return True
    if not isinstance(called, FunctionType):
        return False
    returned = called.__annotations__.get("return")
    if getattr(returned, "__name__", str(returned)).rpartition(".")[2] in _NEVER:
        return True
    return not any(each.opname.startswith("RETURN_") for each in dis.get_instructions(called))
