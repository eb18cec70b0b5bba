"""Servers of endpoints: each is made, then bound, with the permissions that its bind names."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reqtable.config import Config
from reqtable.dispatch import is_resumable
from reqtable.dispatch.policies.greenlet import policy_for_blocking
from reqtable.run.binds import Bind
from reqtable.run.endpoints import Endpoint, reason_of, socket_at
from reqtable.server.classes import TCPServer, UDPServer, remove_dead
from reqtable.table.addresses import address_text

log = logging.getLogger("reqtable")

_FORBIDDEN = {errno.EACCES, errno.EPERM}


class _Placed:
    """In front of a server class: it binds to its `endpoint`."""

    endpoint: Endpoint
    daemon_threads = (
        True  # requests have had `drain_timeout_s` to end: a thread that never does must not hold up the exit
    )

    if TYPE_CHECKING:  # what the class behind it has
        socket: socket.socket
        server_address: Any
        _begins_with_tls: bool

    def _prepared(self, config: Config) -> tuple[Callable[[], None], Callable[[], None]]:
        return super()._prepared(self.endpoint.bind.configured(config))  # type: ignore[misc,no-any-return]

    def server_bind(self) -> None:
        endpoint = self.endpoint
        if endpoint.descriptor is not None:
            self.socket.close()
            self.socket = socket_at(endpoint.descriptor)
            self.server_address = self.socket.getsockname()
            return
        if endpoint.family == socket.AF_INET6:  # whatever the machine's default is
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.v6only)
        if endpoint.mode is not None:
            with contextlib.suppress(OSError):  # only Linux; elsewhere streams are safe, as nothing listens yet
                os.fchmod(self.socket.fileno(), endpoint.mode & 0o700)
        super().server_bind()  # type: ignore[misc]
        if endpoint.has_file:
            self._permit(endpoint)

    def _permit(self, endpoint: Endpoint) -> None:
        """Give the file, which was made with its owner's permissions alone, to whom it is for; then open it to them."""
        try:
            if (endpoint.owner, endpoint.group) != (-1, -1):
                os.chown(endpoint.address, endpoint.owner, endpoint.group, follow_symlinks=False)
            if endpoint.mode is not None:
                os.chmod(endpoint.address, endpoint.mode)
        except BaseException:
            os.unlink(endpoint.address)
            raise


class _Stream(_Placed, TCPServer):
    allow_reuse_address = True


class _Datagram(_Placed, UDPServer):
    max_packet_size = 65_535  # the largest there is: nothing is cut


def make_server(endpoint: Endpoint, handler: Any, dispatch: str | None, config: Config) -> TCPServer:
    """The server of an endpoint, not bound. Raises ConfigurationError where the handler can't be served so."""
    base: type[TCPServer] = _Stream if endpoint.kind == socket.SOCK_STREAM else _Datagram
    default = "inline" if is_resumable(handler) else policy_for_blocking()
    own = {"address_family": endpoint.family, "endpoint": endpoint, "dispatch": default}
    made: type[TCPServer] = type(base.__name__, (base,), own)
    configured = endpoint.bind.configured(config)
    return made(endpoint.address, handler, bind_and_activate=False, dispatch=dispatch, config=configured)


def open_server(server: TCPServer) -> Callable[[], None]:
    """Bind it. Returns what removes the file that this made, if it did.

    Raises OSError, naming the bind and the mend; ConfigurationError where this user may not.
    """
    endpoint: Endpoint = server.endpoint  # type: ignore[attr-defined]
    try:
        server.server_bind()
        server._keep_alive()  # also where workers serve: a supervisor that reads the configuration again must know it
        _warn_without_host(endpoint.bind)
        remove = _remover(server)
        try:
            server.server_activate()
        except BaseException:
            remove()
            raise
        return remove
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise endpoint.bind.error(f"{reason_of(error)}: choose a place that this user may have") from error
        mend = "stop what is there, or choose another one" if error.errno == errno.EADDRINUSE else "choose another one"
        raise OSError(error.errno, f"bind {endpoint.bind.text!r}: {reason_of(error)}: {mend}") from error


def _warn_without_host(bind: Bind) -> None:
    """Say how far a bind without a host reaches: its author may have meant programs on this machine only."""
    host, port = bind.address if isinstance(bind.address, tuple) else (None, None)
    if host == "":
        log.warning(
            "bind %r: no host is given, so it listens on every IPv4 address of this machine: write %s for programs on "
            "this machine only, %s for every IPv4 address, %s for IPv6, too",
            bind.text,
            *(f"{bind.scheme}://{each}:{port}" for each in ("127.0.0.1", "0.0.0.0", "[::]")),
        )


def name_of(server: TCPServer) -> str:
    """Where it really listens, as a bind."""
    own = server.socket
    stream = own.type == socket.SOCK_STREAM
    scheme = ("unix" if stream else "unixgram") if own.family == socket.AF_UNIX else ("tcp" if stream else "udp")
    if scheme == "tcp" and server._begins_with_tls:
        scheme = "tls"
    return f"{scheme}://{address_text(server.server_address)}"


def _remover(server: TCPServer) -> Callable[[], None]:
    """What removes a Unix socket's file, unless someone else has put theirs in its place."""
    endpoint: Endpoint = server.endpoint  # type: ignore[attr-defined]
    if not endpoint.has_file:
        return lambda: None
    own = _file_at(endpoint.address)

    def remove() -> None:
        with contextlib.suppress(OSError):
            if _file_at(endpoint.address) != own:
                return
            if server.fileno() >= 0:
                os.unlink(endpoint.address)  # no server replaces it while it is bound
            else:
                remove_dead(endpoint.address)  # closed by a drain: a file of the same number may be another server's

    return remove


def _file_at(path: str) -> tuple[int, int]:
    """What tells one file from another, as long as both are there."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino
