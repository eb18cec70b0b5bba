"""Routes: which method of a handler answers which method and path of HTTP."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote

from reqtable.handlers.resumable import check_called
from reqtable.handlers.transition import Transition
from reqtable.table.errors import HandlerError
from reqtable.table.places import place_of

F = TypeVar("F", bound=Callable[..., Transition])

_PLACE = re.compile(r"\{([^{}]*)\}")


def route(method: str, path: str) -> Callable[[F], F]:
    """Have the decorated method answer `method` on `path`, as in `@route("GET", "/notes/{id}")`.

    A name in braces stands for one segment of the path, and is an argument of the method, without its escapes. A route
    of GET also serves HEAD. A method may have several routes. One that overrides it keeps them, unless it declares its
    own. Raises HandlerError for a path that can't match.
    """
    if not path.startswith("/") or not all(name.isidentifier() for name in _PLACE.findall(path)):
        raise HandlerError(f"a route can't have the path {path!r}: write it as in '/notes/{{id}}'")

    def declare(function: F) -> F:
        function.routes = [*getattr(function, "routes", []), (method.upper(), path)]  # type: ignore[attr-defined]
        return function

    return declare


class Routes:
    """Finds the method that answers a request."""

    def __init__(self, cls: type, awaiting: str) -> None:
        """Raise HandlerError if two methods have one route, or if a method can't be called for its route."""
        self._fixed: dict[str, dict[str, str]] = {}  # path -> method -> name
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, str]]] = {}
        for name in dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base)):
            function = getattr(cls, name, None)
            for method, path in _declared(cls, name) if callable(function) else ():
                known = self._methods_of(path)
                if known.get(method, name) != name:
                    raise HandlerError(
                        f"{cls.__name__}.{name} has the route {method} {path} of {known[method]} ({place_of(function)})"
                    )
                known[method] = name
                check_called(function, ("self",), tuple(_PLACE.findall(path)), awaiting)

    def __bool__(self) -> bool:
        return bool(self._fixed or self._patterns)

    def find(self, path: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return the names of the methods for `path`, by their HTTP methods, and the arguments from the path.

        The first is empty if there is no such path.
        """
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed, {}
        for pattern, methods in self._patterns.values():
            found = pattern.fullmatch(path)
            if found is not None:
                return methods, {name: unquote(value) for name, value in found.groupdict().items()}
        return {}, {}

    def _methods_of(self, path: str) -> dict[str, str]:
        if not _PLACE.search(path):
            return self._fixed.setdefault(path, {})
        if path not in self._patterns:
            literals, names = _PLACE.split(path)[::2], _PLACE.findall(path)
            text = re.escape(literals[0])
            for name, literal in zip(names, literals[1:], strict=True):
                text += f"(?P<{name}>[^/]+){re.escape(literal)}"
            self._patterns[path] = re.compile(text), {}
        return self._patterns[path][1]


def _declared(cls: type, name: str) -> list[tuple[str, str]]:
    """Return the routes of a method. One that overrides another, and declares no routes, has those of the other."""
    found: list[list[tuple[str, str]]] = [getattr(vars(base).get(name), "routes", []) for base in cls.__mro__]
    return next(filter(None, found), [])
