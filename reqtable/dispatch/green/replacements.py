"""Replaces functions of the standard library while a server has the option `suspend_all_sockets`.

A replacement first asks whether its caller is part of such a server's blocking handler. If not, it calls what it has
replaced, with the same arguments. So in other threads, in the loop, and in the rest of the program nothing changes.

Methods of `socket.socket` and `ssl.SSLSocket` are replaced in the class, so that existing sockets, and those of
subclasses, have them too. A function of a module is replaced in the module. A library that has imported the function by
its name (`from time import sleep`) keeps the original.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import finalize

from reqtable.dispatch.green.handler import suspending

_ABSENT = object()  # the owner has inherited the name


class Replacements:
    """Holds all replacements, and the policies that need them. They are in place while there is such a policy."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Callable[[Any], Any]]] = []
        self._needed_by: dict[int, finalize[..., Any]] = {}  # by the policy's id: what releases it if it is garbage
        self._in_place: list[tuple[Any, str, Any, Any]] = []  # owner, name, replacement, what the owner had before
        self._lock = threading.RLock()  # a policy may become garbage while its thread installs another

    def add(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Have `owner.name` replaced by what `make` returns, which is called with what is to be replaced."""
        self._made.append((owner, name, make))

    def install(self, policy: Any) -> None:
        """Put the replacements in place, until `policy` is released or garbage."""
        with self._lock:
            garbage = self._needed_by[id(policy)] = finalize(policy, self._forget, id(policy))
            garbage.atexit = False
            if not self._in_place:
                for owner, name, make in self._made:
                    replacement = make(getattr(owner, name))
                    self._in_place.append((owner, name, replacement, vars(owner).get(name, _ABSENT)))
                    setattr(owner, name, replacement)

    def release(self, policy: Any) -> None:
        """Note that `policy` no longer needs the replacements. May be called again."""
        with self._lock:
            garbage = self._needed_by.get(id(policy))
            if garbage is not None:
                garbage()

    def _forget(self, key: int) -> None:
        """Put everything back, if no policy is left. Replacements by other code stay in place."""
        with self._lock:
            self._needed_by.pop(key, None)
            while self._in_place and not self._needed_by:
                owner, name, replacement, before = self._in_place.pop()
                if vars(owner).get(name) is not replacement:
                    continue
                if before is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)


REPLACEMENTS = Replacements()


def replaces(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that replaces `owner.name` for blocking handlers.

    The function is called with the transport of the handler's request, with what it replaces, and with the arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(before: Any) -> Any:
            @wraps(before, updated=())
            def replacement(*args: Any, **kwargs: Any) -> Any:
                transport = suspending()
                if transport is None:
                    return before(*args, **kwargs)
                return function(transport, before, *args, **kwargs)

            return replacement

        REPLACEMENTS.add(owner, name, make)
        return function

    return decorate
