"""Checks that a handler class can serve requests, before anything is bound."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any, get_origin

from reqtable.handlers.checked import faults
from reqtable.handlers.finding import Finding, carrying
from reqtable.handlers.resumable import ResumableHandler
from reqtable.table.errors import ConfigurationError
from reqtable.table.snapshot import handler_name, unwrapped

# The modules whose server hooks make a handler by calling its class.
_OWN_MODULES = ("server.base", "server.mixins", "server.classes", "run.placed")
_STANDARD_HOOKS = {"socketserver", *(f"reqtable.{each}" for each in _OWN_MODULES)}


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
        _refuse(faults(handler_class))
        if own._needs_stream and getattr(server, "socket_type", None) == socket.SOCK_DGRAM:
            raise ConfigurationError(
                f"{handler_name(own)} serves connections, not datagrams: bind tcp://, tls:// or unix://"
            )
    elif not _makes_handlers_itself(server):
        if not callable(own):
            raise ConfigurationError(
                f"{own!r} is not a handler class: give a class derived from reqtable.StateRequestHandler, "
                "AsyncRequestHandler or BaseRequestHandler"
            )
        if isinstance(own, type):
            _refuse(faults(handler_class))


def _refuse(found: Iterable[Finding]) -> None:
    """Raise ConfigurationError if there is a finding."""
    for each in found:
        raise carrying(ConfigurationError, each)


def _makes_handlers_itself(server: object) -> bool:
    hooks = [getattr(type(server), name, None) for name in ("finish_request", "process_request")]
    return any(hook is not None and getattr(hook, "__module__", None) not in _STANDARD_HOOKS for hook in hooks)
