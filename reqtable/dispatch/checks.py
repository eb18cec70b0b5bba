"""Checks that a handler class can serve requests, before anything is bound."""

from __future__ import annotations

import inspect
import socket
from functools import lru_cache
from typing import Any, get_origin

from reqtable.handlers.resumable import ResumableHandler
from reqtable.table.errors import ConfigurationError
from reqtable.table.places import owner_of, place_of
from reqtable.table.snapshot import handler_name, unwrapped

# The modules whose server hooks make a handler by calling its class.
_OWN_MODULES = ("server.base", "server.mixins", "server.classes", "run.placed")
_STANDARD_HOOKS = {"socketserver", *(f"reqtable.{each}" for each in _OWN_MODULES)}


@lru_cache(maxsize=1024)
def is_resumable(handler_class: Any) -> bool:
    """Whether a handler class, or a `functools.partial` of one, is a state machine or an async handler."""
    handler_class = unwrapped(handler_class)
    return isinstance(handler_class, type) and issubclass(handler_class, ResumableHandler)


def check_servable(handler_class: Any, server: object = None) -> None:
    """Raise ConfigurationError, with the reason, if that handler class can't serve requests.

    As in `socketserver`, any function may make a blocking handler; it is not looked into. Blocking handlers are not
    checked at all if the server has its own `finish_request` or `process_request`, which may make them as it likes.
    """
    own = unwrapped(handler_class)
    generic = get_origin(own)
    if is_resumable(generic):
        raise ConfigurationError(f"{own!r} is a type hint, not a handler class: give {generic.__name__}")
    if is_resumable(own):
        if (unfit := own._unfit()) is not None:
            raise ConfigurationError(unfit)
        if own._needs_stream and getattr(server, "socket_type", None) == socket.SOCK_DGRAM:
            raise ConfigurationError(
                f"{handler_name(own)} serves connections, not datagrams: bind tcp://, tls:// or unix://"
            )
        _check_call(handler_class, ("entry",), own._begins_in)
    elif not _makes_handlers_itself(server):
        if not callable(own):
            raise ConfigurationError(
                f"{own!r} is not a handler class: give a class derived from reqtable.StateRequestHandler, "
                "AsyncRequestHandler or BaseRequestHandler"
            )
        if isinstance(own, type):
            _check_call(handler_class, ("request", "client_address", "server"), "setup()")
            handle = getattr(own, "handle", None)
            if inspect.iscoroutinefunction(handle):
                raise ConfigurationError(
                    f"{handler_name(own)}.handle is a coroutine, but a blocking handler's handle() is not awaited: "
                    f"derive {handler_name(own)} from reqtable.AsyncRequestHandler ({place_of(handle)})"
                )


def _check_call(handler_class: Any, given: tuple[str, ...], begins_in: str) -> None:
    """Raise ConfigurationError if the handler class can't be called with the arguments `given`."""
    try:
        signature = inspect.signature(handler_class)
    except (TypeError, ValueError):  # perhaps a class written in C
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        own = unwrapped(handler_class)
        place = place_of(vars(owner_of(own, "__init__"))["__init__"])
        raise ConfigurationError(
            f"{handler_name(own)} can't be called with ({', '.join(given)}): {error}: a handler has no parameters of "
            f"its own: declare fields in the class, as in words: int = 0, and prepare them in {begins_in} ({place})"
        ) from None


def _makes_handlers_itself(server: object) -> bool:
    hooks = [getattr(type(server), name, None) for name in ("finish_request", "process_request")]
    return any(hook is not None and getattr(hook, "__module__", None) not in _STANDARD_HOOKS for hook in hooks)
