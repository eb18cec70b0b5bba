"""The source of a handler class as syntax trees: where a method ends, and at which line a field is declared.

A class without source, as one typed at a prompt, has no trees. Then nothing is found.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from reqtable.table.places import functions_in, place_of

Function = ast.FunctionDef | ast.AsyncFunctionDef

_PACKAGE = __name__.partition(".")[0]


class Sources:
    """Finds the syntax trees of functions and of classes. Each file is parsed once."""

    def __init__(self) -> None:
        # file -> the line of a function, or the name of a class -> its tree
        self._files: dict[str, dict[int | str, ast.AST]] = {}

    def function(self, function: FunctionType) -> Function | None:
        """Return the tree of a function; None if there is no source, or if the file has changed since."""
        code = function.__code__
        found = self._of(code.co_filename).get(code.co_firstlineno)
        return found if isinstance(found, Function) and found.name == code.co_name else None

    def place_of_field(self, cls: type, name: str) -> str:
        """Return `file:line` of the annotation that declares a field in the body of `cls`; else that of the class."""
        file = getattr(sys.modules.get(cls.__module__), "__file__", None) or ""
        for each in getattr(self._of(file).get(cls.__qualname__), "body", ()):
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.target.id == name:
                return f"{file}:{each.lineno}"
        return place_of(cls)

    def _of(self, file: str) -> dict[int | str, ast.AST]:
        if file not in self._files:
            try:
                tree = ast.parse("".join(linecache.getlines(file)))
            except (SyntaxError, ValueError, RecursionError):  # it is no Python any more
                tree = ast.Module([], [])
            self._files[file] = dict(_keyed(tree))
        return self._files[file]


def statements(node: Function) -> Iterator[ast.AST]:
    """Yield the nodes of a function, without those of functions and of classes within."""
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        each = waiting.pop(0)
        yield each
        if not isinstance(each, (*_SCOPES, ast.Lambda)):
            waiting[:0] = ast.iter_child_nodes(each)


def authors_methods(cls: type) -> Iterator[FunctionType]:
    """Yield the methods that the author has written for `cls`, those of its bases and mix-ins included."""
    for base in cls.__mro__:
        if not is_ours(base.__module__):
            yield from (each for each in vars(base).values() if isinstance(each, FunctionType) and is_authors(each))


def authors_functions(cls: type) -> Iterator[FunctionType]:
    """Yield the functions of the author's classes, those inside of decorators, class methods and properties, too."""
    values = (value for base in cls.__mro__ if not is_ours(base.__module__) for value in vars(base).values())
    return (each for value in values for each in functions_in(value) if is_authors(each))


def names_set(cls: type, sources: Sources) -> set[str]:
    """Return the names of the attributes that the author's functions set, of whatever object. `+=` does not count."""
    nodes = [each for each in map(sources.function, authors_functions(cls)) if each is not None]
    found = [each for node in nodes for each in ast.walk(node)]
    augmented = {id(each.target) for each in found if isinstance(each, ast.AugAssign)}
    stored = (each for each in found if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store))
    return {each.attr for each in stored if id(each) not in augmented}


def is_authors(function: Any) -> bool:
    return isinstance(function, FunctionType) and not is_ours(function.__module__)


def is_ours(module: str | None) -> bool:
    """Return whether a module of that name belongs to this package."""
    return (module or "").partition(".")[0] == _PACKAGE


def annotating(cls: type, name: str) -> type | None:
    """Return the first class in the MRO of `cls` that annotates `name`, or None."""
    return next((base for base in cls.__mro__ if name in inspect.get_annotations(base)), None)


def of_self(node: ast.AST | None, function: Any) -> str | None:
    """Return the name of the attribute if `node` is an attribute of the first argument of `function`."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and arguments:
        return node.attr if node.value.id == arguments[0].arg else None
    return None


def global_of(node: ast.AST, function: FunctionType) -> Any:
    """Return what `function` has by a global name, or by an attribute of a module or class; None if it has nothing.

    Other objects are not asked for their attributes, because that may run code or raise anything.
    """
    code = function.__code__
    if isinstance(node, ast.Name):
        is_local = node.id in (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        return None if is_local else function.__globals__.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    holder = global_of(node.value, function)
    return getattr(holder, node.attr, None) if isinstance(holder, ModuleType | type) else None


def end_of(body: Iterable[ast.stmt], known: Any) -> ast.stmt | None:
    """Return the first statement after which these statements come to their end; None if they never do.

    `known(call)` tells of a call whether it always raises. Where this can't be told, a block of `with` and the body of
    a `try` are taken to do what they are written to do: the context manager suppresses nothing.
    """
    last = None
    for each in body:
        last = _end_of(each, known)
        if last is None:
            return None
    return last


def _end_of(each: ast.stmt, known: Any) -> ast.stmt | None:
    """Return where a path through one statement ends, so that what follows runs; None if no path does."""
    if isinstance(each, ast.Return | ast.Raise | ast.Continue | ast.Break):
        return None
    if isinstance(each, ast.Expr) and isinstance(each.value, ast.Call) and known(each.value):
        return None
    if isinstance(each, ast.Assert) and isinstance(each.test, ast.Constant) and not each.test.value:
        return None
    if isinstance(each, ast.If):
        return _end_of_if(each, known)
    if isinstance(each, ast.While):
        is_endless = isinstance(each.test, ast.Constant) and bool(each.test.value)
        return _break_in(each.body) or (None if is_endless else _after_loop(each, known))
    if isinstance(each, ast.For | ast.AsyncFor):
        return _break_in(each.body) or _after_loop(each, known)
    if isinstance(each, ast.With | ast.AsyncWith):
        if any(_suppresses(item.context_expr) for item in each.items):
            return each
        return end_of(each.body, known)
    if isinstance(each, ast.Try | ast.TryStar):
        return _end_of_try(each, known)
    if isinstance(each, ast.Match):
        return _end_of_match(each, known)
    return each


def _end_of_if(each: ast.If, known: Any) -> ast.stmt | None:
    while True:  # a chain of `elif` may be longer than Python's stack is deep
        end = end_of(each.body, known)
        if end is not None:
            return end
        if not each.orelse:
            return each
        first, *more = each.orelse
        if more or not isinstance(first, ast.If):
            return end_of(each.orelse, known)
        each = first


def _after_loop(loop: ast.While | ast.For | ast.AsyncFor, known: Any) -> ast.stmt | None:
    return end_of(loop.orelse, known) if loop.orelse else loop


def _end_of_try(each: ast.Try | ast.TryStar, known: Any) -> ast.stmt | None:
    if each.finalbody and end_of(each.finalbody, known) is None:
        return None
    blocks = [[*each.body, *each.orelse], *(handler.body for handler in each.handlers)]
    return next((end for block in blocks if (end := end_of(block, known)) is not None), None)


def _end_of_match(each: ast.Match, known: Any) -> ast.stmt | None:
    ends = (end for case in each.cases if (end := end_of(case.body, known)) is not None)
    is_whole = any(case.guard is None and _takes_all(case.pattern) for case in each.cases)
    return next(ends, None if is_whole else each)


def _takes_all(pattern: ast.pattern) -> bool:
    if isinstance(pattern, ast.MatchOr):
        return any(map(_takes_all, pattern.patterns))
    return isinstance(pattern, ast.MatchAs) and (pattern.pattern is None or _takes_all(pattern.pattern))


def _break_in(body: Iterable[ast.stmt]) -> ast.stmt | None:
    """Return the first `break` that leaves the loop with this body."""
    waiting = [*body]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, ast.Break):
            return each
        if isinstance(each, ast.For | ast.AsyncFor | ast.While):
            waiting[:0] = each.orelse  # a break in its body leaves that loop
        elif not isinstance(each, _SCOPES):
            waiting[:0] = _statements_in(each)
    return None


def _statements_in(each: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements directly within a statement, those of its clauses included."""
    for child in ast.iter_child_nodes(each):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            yield from child.body


def _suppresses(manager: ast.expr) -> bool:
    """Return whether a context manager is `contextlib.suppress(…)`, as far as its name tells."""
    function = manager.func if isinstance(manager, ast.Call) else manager
    return getattr(function, "attr", getattr(function, "id", None)) == "suppress"


def _keyed(tree: ast.AST) -> Iterator[tuple[int | str, ast.AST]]:
    """Yield the functions of a tree by their first lines, and its classes by their qualified names."""
    waiting = [(tree, "")]
    while waiting:
        each, above = waiting.pop()
        if isinstance(each, Function):
            yield min([each.lineno, *(found.lineno for found in each.decorator_list)]), each
            above = f"{above}{each.name}.<locals>."
        elif isinstance(each, ast.ClassDef):
            yield f"{above}{each.name}", each
            above = f"{above}{each.name}."
        waiting += [(inner, above) for inner in _statements_in(each)][::-1]  # the last class of a name counts


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
