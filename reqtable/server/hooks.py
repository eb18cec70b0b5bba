"""The hooks of a program: methods of its server class, and class methods of its handler class.

A class may use the name of a hook for itself. So a method that takes other arguments is not called as a hook.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from reqtable.handlers.blocking import BaseRequestHandler
from reqtable.handlers.resumable import ResumableHandler, check_called
from reqtable.server.hosted import Hosted
from reqtable.table.places import place_of
from reqtable.table.snapshot import unwrapped

log = logging.getLogger("reqtable")

_SECTIONS = {
    "on_start": "docs/how-to/do-work-at-start-and-end.md",
    "on_stop": "docs/how-to/do-work-at-start-and-end.md",
    "save_state": "docs/how-to/keep-shared-data.md",
    "restore_state": "docs/how-to/keep-shared-data.md",
}


class Hook:
    """Calls a hook. Its text is the hook's name."""

    def __init__(self, function: Any, given: tuple[Any, ...] = ()) -> None:
        self._function = function
        self._given = given

    def __call__(self, *args: Any) -> Any:
        return self._function(*self._given, *args)

    def __str__(self) -> str:
        return str(self._function.__qualname__)

    @property
    def place(self) -> str:
        """Where the hook is, as `file:line`."""
        return place_of(self._function)


def owners_of(server: Hosted) -> Iterator[tuple[str, Callable[[str], Any], tuple[Any, ...]]]:
    """Yield the server, then its handler class: the word for it, how to find its hooks, and what these are given."""
    yield "server", server._hook, ()
    yield "handler", finder(server.RequestHandlerClass), (server,)


def finder(handler: Any) -> Callable[[str], Any]:
    """Return a function that finds the hooks of a handler class: its class methods, if the class is one of ours."""
    kind = unwrapped(handler)

    def find(name: str) -> Any:
        if isinstance(kind, type) and issubclass(kind, ResumableHandler | BaseRequestHandler):
            hook = getattr(kind, name, None)
            if getattr(hook, "__self__", None) is kind:
                return hook
        return None  # a blocking handler may have a method of that name for itself

    return find


def bound(find: Callable[[str], Any], name: str, given: tuple[Any, ...], named: tuple[str, ...] = ()) -> Hook | None:
    """Return the hook `name` with the arguments `given`; the caller gives those `named`. None if there is no such hook.

    Warns if the program uses the name for something else. Raises HandlerError if the hook is async.
    """
    hook = find(name)
    if hook is None:
        return None
    try:
        inspect.signature(hook).bind(*given, *named)
    except TypeError as error:
        log.warning(
            "%s is not called as a hook, because it takes other arguments (%s): see %s",
            hook.__qualname__,
            error,
            _SECTIONS[name],
        )
        return None
    check_called(hook, (*given, *named))
    return Hook(hook, given)
