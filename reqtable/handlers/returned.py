"""Finds transitions that can't be taken, and output that is no bytes, in the source of a handler class.

What refuses the class fails each time that its line runs.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import reprlib
from collections.abc import Collection, Iterable, Iterator
from types import FunctionType
from typing import Any

from reqtable.handlers.coroutine import AsyncRequestHandler
from reqtable.handlers.declaration import is_state, why_no_state
from reqtable.handlers.discarded import makes_want
from reqtable.handlers.finding import Finding
from reqtable.handlers.source import (
    Sources,
    authors_functions,
    authors_methods,
    end_of,
    global_of,
    is_authors,
    names_set,
    of_self,
    statements,
)
from reqtable.handlers.state import StateRequestHandler
from reqtable.table.places import place_of
from reqtable.table.wants import NOTHING

# The methods that return a transition, beside the states.
_HOOKS = ("start", "on_timeout", "on_eof", "on_limit", "on_error")
_NO_TRANSITIONS = (
    ast.JoinedStr,
    ast.List,
    ast.Dict,
    ast.Set,
    ast.ListComp,
    ast.DictComp,
    ast.SetComp,
    ast.GeneratorExp,
    ast.Lambda,
)
# A state of these parts alone raises no exception.
_IDLE = (
    ast.Return,
    ast.If,
    ast.IfExp,
    ast.Assign,
    ast.AnnAssign,
    ast.Pass,
    ast.Expr,
    ast.Constant,
    ast.Attribute,
    ast.Name,
    ast.Tuple,
    ast.expr_context,
)
# A method that uses one of these may set attributes whose names its source does not show.
_DYNAMIC = {"setattr", "__dict__", "vars"}


class Returned:
    """Looks at what the states and the hooks of a class return. `lost` are the states to which nothing leads."""

    def __init__(self, cls: type[StateRequestHandler], sources: Sources, lost: Collection[str]) -> None:
        self._cls = cls
        self._sources = sources
        self._lost = lost
        self._set = _may_have(cls, sources)  # None: any name may be set

    def wrong(self) -> Iterator[Finding]:
        """Yield a finding for each transition that can't be taken."""
        is_good = True
        for function, node in self._functions():
            for value, want in _transitions(node):
                problem = self._problem(value, want, function, node)
                if problem is None:
                    continue
                is_good = False
                text = f"{self._cls.__name__}.{function.__name__} returns {problem[0]}"
                yield Finding("transition", f"{function.__code__.co_filename}:{value.lineno}", text, problem[1])
        if is_good and self._leads_nowhere():
            text = f"{self._cls.__name__} declares no state, but start returns one"
            yield Finding("no-state", place_of(self._cls), text, "put @state(line()) before a method")

    def unknown(self) -> Iterator[Finding]:
        cls = self._cls
        if self._set is None or hasattr(cls, "__getattr__"):
            return
        for function, node in self._functions():
            for value, _ in _transitions(node):
                name = of_self(value, node)
                if name is None or hasattr(cls, name) or name in self._set:
                    continue
                near = difflib.get_close_matches(name, cls._declared(), n=1)
                mend = f"did you mean self.{near[0]}?" if near else f"define the state {name}"
                text = f"{cls.__name__}.{function.__name__} returns self.{name}, but the class has no {name}"
                yield Finding("attribute", f"{function.__code__.co_filename}:{value.lineno}", text, mend, False)

    def endless(self) -> Iterator[Finding]:
        """Yield a finding for each transition that closes a circle of states which wait for nothing, and do nothing.

        States that do more may raise an exception. States that send for ever wait for room in the output.
        """
        circle = self._never_waiting()
        if not self._does_more(circle):
            yield from self._closing(circle, refuses=True)

    def without_want(self) -> Iterator[Finding]:
        """Yield a finding for each circle that does more, and for each state that uses its item, but waits for none."""
        circle = self._never_waiting()
        if self._does_more(circle):
            yield from self._closing(circle, refuses=False)
        for name, function, node in self._without_want():
            item = function.__code__.co_varnames[1:2]
            if name in circle or not any(isinstance(each, ast.Name) and each.id in item for each in statements(node)):
                continue
            for value, want in _transitions(node):
                if want is None and of_self(value, node) == name and not self._may_be_set(name):
                    yield self._no_want(name, name, value, refuses=False)

    def _closing(self, circle: dict[str, list[tuple[str, ast.expr]]], refuses: bool) -> Iterator[Finding]:
        order = list(circle)
        for name, values in circle.items():
            for target, value in values:
                if order.index(target) <= order.index(name):
                    yield self._no_want(name, target, value, refuses)

    def _does_more(self, names: Iterable[str]) -> bool:
        """Return whether one of these states does anything but to look at attributes, to set them, and to return."""
        return any(
            not isinstance(each, _IDLE)
            for name, _, node in self._without_want()
            if name in names
            for each in statements(node)
        )

    def _never_waiting(self) -> dict[str, list[tuple[str, ast.expr]]]:
        """Return the states that wait for nothing and lead only to such states, with their transitions."""
        found = {}
        for name, _, node in self._without_want():
            values = [(of_self(each, node) or "", each) for each, want in _transitions(node) if want is None]
            has_other_end = end_of(node.body, lambda _: False) is not None or any(
                isinstance(each, ast.Raise) or (isinstance(each, ast.Return) and each.value is None)
                for each in statements(node)
            )
            if values and len(values) == len([*_transitions(node)]) and not has_other_end:
                found[name] = values
        while left := [
            name
            for name, values in found.items()
            if any(target not in found or self._may_be_set(target) for target, _ in values)
        ]:
            for name in left:
                del found[name]
        return found

    def _without_want(self) -> Iterator[tuple[str, FunctionType, Any]]:
        """Yield the states whose decorators name no want, with their sources."""
        declared = self._cls._declared()
        for function, node in self._functions():
            name = function.__name__
            if name in declared and name not in self._lost and declared[name].want is NOTHING:
                yield name, function, node

    def _no_want(self, name: str, target: str, value: ast.expr, refuses: bool) -> Finding:
        function: Any = getattr(self._cls, name)
        text = f"{self._cls.__name__}.{name} returns self.{target}, which waits for nothing"
        mend = f"write @state(line()) before {target}, or return self.{target}, line()"
        return Finding("no-want", f"{function.__code__.co_filename}:{value.lineno}", text, mend, refuses)

    def _functions(self) -> Iterator[tuple[FunctionType, Any]]:
        for name in dict.fromkeys((*self._cls._declared(), *_HOOKS)):
            function = getattr(self._cls, name)
            if is_authors(function) and not hasattr(function, "__wrapped__"):  # a decorator may return something else
                node = self._sources.function(function)
                if node is not None:
                    yield function, node

    def _problem(
        self, value: ast.expr, want: ast.expr | None, function: FunctionType, node: Any
    ) -> tuple[str, str] | None:
        """Return what is wrong with a target or its want, and the mend; None if both may be right."""
        name = of_self(value, node)
        if name is not None and (found := self._method(name)) is not None and not is_state(found):
            which, mend = why_no_state(found)
            return f"self.{name}, {which}", mend
        if isinstance(value, ast.Call):
            return self._problem_of_call(value, want, function, node)
        if _is_literal(value):
            text = getattr(value, "value", None)
            state = text if isinstance(text, str) and text in self._cls._declared() else self._cls._example
            return _shown(value), f"return a state, as in return self.{state}, or None to close"
        if want is None or _is_none(want):
            return None
        if _is_none(value):
            return f"None, {_shown(want)}", "return None alone to close, or a state in its place"
        if _is_literal(want) or self._method(of_self(want, node) or "") is not None:
            return f"{_shown(want)} as the want of {_shown(value)}", "return a want, such as line() or exactly(n)"
        return None

    def _problem_of_call(
        self, value: ast.Call, want: ast.expr | None, function: FunctionType, node: Any
    ) -> tuple[str, str] | None:
        """Return what is wrong with a call in place of a state, and the mend; None if it may be right."""
        if makes_want(global_of(value.func, function)):
            name = of_self(want, node) or self._cls._example
            return f"{_shown(value)} in place of a state", f"write return self.{name}, {_shown(value)}"
        called = of_self(value.func, node)
        state = self._method(called or "")
        if value.args or value.keywords or state is None or not is_state(state) or not _needs_item(state):
            return None
        return (
            f"self.{called}(), which runs that state at once, without its item",
            f"write return self.{called}, and the engine runs it with the item of its want",
        )

    def _method(self, name: str) -> FunctionType | None:
        """Return the method of that name; None if there is none, or if a request may have something else there."""
        found = inspect.getattr_static(self._cls, name, None)
        return found if isinstance(found, FunctionType) and not self._may_be_set(name) else None

    def _may_be_set(self, name: str) -> bool:
        return self._set is None or name in self._set

    def _leads_nowhere(self) -> bool:
        """Return whether `start` returns transitions although there is no state."""
        start: Any = self._cls.start
        if self._cls._declared() or not is_authors(start):
            return False
        node = self._sources.function(start)
        return node is not None and any(not _is_none(each) for each, _ in _transitions(node))


def texts(cls: type, sources: Sources) -> Iterator[Finding]:
    """Yield a finding for each text that a method sends in place of bytes."""
    sends: Any = getattr(cls, "send", None)
    if sends not in (StateRequestHandler.send, AsyncRequestHandler.send):
        return
    for function in authors_methods(cls):
        node = sources.function(function) if "send" in function.__code__.co_names else None
        for each in statements(node) if node is not None else ():
            if not isinstance(each, ast.Call) or len(each.args) != 1 or of_self(each.func, node) != "send":
                continue
            (data,) = each.args
            is_text = isinstance(data, ast.Constant) and isinstance(data.value, str)
            if not is_text and not isinstance(data, ast.JoinedStr):
                continue
            if "send" in names_set(cls, sources):
                return
            given = ast.unparse(data)
            mend = f"write self.send(b{given})" if is_text and given.isascii() else f"write self.send({given}.encode())"
            text = f"{cls.__name__}.{function.__name__}: send() takes bytes, not str"
            yield Finding("text", f"{function.__code__.co_filename}:{each.lineno}", text, mend)


def _transitions(node: Any) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Yield what the `return` statements of a function return: a target, and the want if there is one."""
    for each in statements(node):
        if isinstance(each, ast.Return) and each.value is not None:
            for value in _choices(each.value):
                if isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    yield from ((target, value.elts[1]) for target in _choices(value.elts[0]))
                else:
                    yield value, None


def _choices(value: ast.expr) -> Iterator[ast.expr]:
    """Yield the expressions of which `value` is one."""
    if isinstance(value, ast.IfExp):
        yield from _choices(value.body)
        yield from _choices(value.orelse)
    else:
        yield value


def _is_literal(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return value.value is not None
    if isinstance(value, ast.Tuple):
        return not any(isinstance(each, ast.Starred) for each in value.elts)
    return isinstance(value, _NO_TRANSITIONS)


def _shown(value: ast.expr) -> str:
    """Return the source of an expression, shortened."""
    return reprlib.repr(ast.unparse(value))[1:-1]


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _needs_item(state: FunctionType) -> bool:
    try:
        inspect.signature(state).bind("self")
    except TypeError:
        return True
    return False


def _may_have(cls: type[StateRequestHandler], sources: Sources) -> set[str] | None:
    """Return the names that requests of a class may have as attributes of their own; None if any may be."""
    names = {*cls._savable, *(name for base in cls.__mro__ for name in inspect.get_annotations(base))}
    if any(_DYNAMIC.intersection(each.__code__.co_names) for each in authors_functions(cls)):
        return None
    return names | names_set(cls, sources)
