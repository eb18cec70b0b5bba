"""Name look-ups of blocking handlers under `suspend_all_sockets`: they run in a thread, off the loop.

An address that is a number already needs no look-up, and so no thread.
"""

from __future__ import annotations

import _socket
import socket
from typing import Any

from reqtable.dispatch.green.replacements import replaces
from reqtable.dispatch.green.waiting import in_thread
from reqtable.net.poll_only import PollOnly

_INTERNET = {socket.AF_INET, socket.AF_INET6}
_NO_NAMES = {"", "<broadcast>"}  # the socket module understands these without a look-up


@replaces(_socket, "getaddrinfo")  # `socket.getaddrinfo` calls it
def _getaddrinfo(
    transport: PollOnly,
    before: Any,
    host: Any,
    port: Any,
    family: int = 0,
    type: int = 0,
    proto: int = 0,
    flags: int = 0,
) -> Any:
    if host is None:
        return before(host, port, family, type, proto, flags)
    try:
        return before(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)
    except socket.gaierror:
        return in_thread(transport, before, host, port, family, type, proto, flags)


@replaces(socket, "gethostbyname")
def _gethostbyname(transport: PollOnly, before: Any, name: Any) -> Any:
    return in_thread(transport, before, name)


@replaces(socket, "gethostbyname_ex")
def _gethostbyname_ex(transport: PollOnly, before: Any, name: Any) -> Any:
    return in_thread(transport, before, name)


@replaces(socket, "gethostbyaddr")
def _gethostbyaddr(transport: PollOnly, before: Any, address: Any) -> Any:
    return in_thread(transport, before, address)


@replaces(socket, "getnameinfo")
def _getnameinfo(transport: PollOnly, before: Any, address: Any, flags: int) -> Any:
    if flags & socket.NI_NUMERICHOST:
        return before(address, flags)
    return in_thread(transport, before, address, flags)


def resolved(sock: Any, address: Any) -> Any:
    """Return an address whose host is a number. `connect` and `sendto` would look a name up by themselves."""
    family = sock.family
    if family not in _INTERNET or not isinstance(address, tuple) or len(address) < 2:
        return address
    host = address[0]
    if not isinstance(host, str | bytes) or host in _NO_NAMES:
        return address
    return _socket.getaddrinfo(host, None, family)[0][4][0], *address[1:]  # this suspends
