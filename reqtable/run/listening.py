"""Makes the servers of endpoints, then binds them, with the permissions that their binds name."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from reqtable.config import Config
from reqtable.dispatch import is_resumable
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.run.binds import Bind
from reqtable.run.endpoints import Endpoint
from reqtable.run.placed import Placed
from reqtable.server.classes import TCPServer, UDPServer, remove_dead
from reqtable.table.addresses import address_text
from reqtable.table.snapshot import handler_name

log = logging.getLogger("reqtable")


class _Stream(Placed, TCPServer):
    allow_reuse_address = True


class _Datagram(Placed, UDPServer):
    max_packet_size = 65_535  # the largest datagram: nothing is cut off


def make_server(endpoint: Endpoint, handler: Any, dispatch: str | None, config: Config) -> TCPServer:
    """Make the server of an endpoint, not yet bound. Raises ConfigurationError if the handler can't be served so."""
    base: type[TCPServer] = _Stream if endpoint.kind == socket.SOCK_STREAM else _Datagram
    default = "inline" if is_resumable(handler) else policy_for_blocking()
    own = {"address_family": endpoint.family, "_endpoint": endpoint, "dispatch": default}
    made: type[TCPServer] = type(handler_name(handler), (base,), own)  # operators see the name: that of what is served
    configured = endpoint.bind.configured(config)
    return made(endpoint.address, handler, bind_and_activate=False, dispatch=dispatch, config=configured)


def open_server(server: Any) -> Callable[[], None]:
    """Bind a server and listen, unless its constructor has. Returns a function that removes the socket's file, if any.

    Raises OSError, which names the bind and the mend; ConfigurationError if this user lacks the permission.
    """
    if not server._is_bound:
        server.server_bind()
    _warn_without_host(server._endpoint.bind)
    remove = remover(server)
    try:
        if not server._is_active:
            server.server_activate()
    except BaseException:
        remove()
        raise
    return remove


def _warn_without_host(bind: Bind) -> None:
    """Warn how far a bind without a host reaches: its author may have meant programs on this machine only."""
    host, port = bind.address if isinstance(bind.address, tuple) else (None, None)
    if host == "":
        log.warning(
            "bind %r: no host is given, so it listens on every IPv4 address of this machine: write %s for programs on "
            "this machine only, %s for every IPv4 address, %s for IPv6, too",
            bind.text,
            *(f"{bind.scheme}://{each}:{port}" for each in ("127.0.0.1", "0.0.0.0", "[::]")),
        )


def name_of(server: TCPServer) -> str:
    """Return where a server really listens, as a bind."""
    own = server.socket
    stream = own.type == socket.SOCK_STREAM
    scheme = ("unix" if stream else "unixgram") if own.family == socket.AF_UNIX else ("tcp" if stream else "udp")
    if scheme == "tcp" and server._begins_with_tls:
        scheme = "tls"
    return f"{scheme}://{address_text(server.server_address)}"


def remover(server: Any) -> Callable[[], None]:
    """Return a function that removes the server's Unix socket file, unless another file has taken its place."""
    endpoint: Endpoint = server._endpoint
    if not endpoint.has_file:
        return lambda: None
    own = _file_at(endpoint.address)

    def remove() -> None:
        with contextlib.suppress(OSError):
            if server._is_given_away or _file_at(endpoint.address) != own:
                return
            if server.fileno() >= 0:
                os.unlink(endpoint.address)  # no server replaces it while it is bound
            else:
                remove_dead(endpoint.address)  # a drain has closed ours: another server's may have its inode number

    return remove


def _file_at(path: str) -> tuple[int, int]:
    """Return what identifies the file at `path` as long as it exists: its device and inode number."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino
