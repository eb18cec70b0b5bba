"""Makes the servers of endpoints, then binds them, with the permissions that their binds name."""

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
    """Makes the server class behind it bind to `endpoint`."""

    endpoint: Endpoint
    # Requests have `drain_timeout_s` to end. A thread that never ends must not hold up the exit.
    daemon_threads = True

    if TYPE_CHECKING:  # attributes of the class behind it
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
            with contextlib.suppress(OSError):  # only Linux can; elsewhere streams are safe, as nothing listens yet
                os.fchmod(self.socket.fileno(), endpoint.mode & 0o700)
        super().server_bind()  # type: ignore[misc]
        if endpoint.has_file:
            self._permit(endpoint)

    def _permit(self, endpoint: Endpoint) -> None:
        """Give the socket's file to its owner and group, then open it to them. Until now, only this user has access."""
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
    max_packet_size = 65_535  # the largest datagram: nothing is cut off


def make_server(endpoint: Endpoint, handler: Any, dispatch: str | None, config: Config) -> TCPServer:
    """Make the server of an endpoint, not yet bound. Raises ConfigurationError if the handler can't be served so."""
    base: type[TCPServer] = _Stream if endpoint.kind == socket.SOCK_STREAM else _Datagram
    default = "inline" if is_resumable(handler) else policy_for_blocking()
    own = {"address_family": endpoint.family, "endpoint": endpoint, "dispatch": default}
    made: type[TCPServer] = type(base.__name__, (base,), own)
    configured = endpoint.bind.configured(config)
    return made(endpoint.address, handler, bind_and_activate=False, dispatch=dispatch, config=configured)


def open_server(server: TCPServer) -> Callable[[], None]:
    """Bind a server and listen. Returns a function that removes the socket's file, if this made one.

    Raises OSError, which names the bind and the mend; ConfigurationError if this user lacks the permission.
    """
    endpoint: Endpoint = server.endpoint  # type: ignore[attr-defined]
    try:
        server.server_bind()
        server._keep_alive()  # not only in workers: the supervisor must know what is set when it reloads
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
            raise endpoint.bind.error(f"{reason_of(error)}: choose an address that this user may use") from error
        mend = "stop what uses it, or choose another one" if error.errno == errno.EADDRINUSE else "choose another one"
        raise OSError(error.errno, f"bind {endpoint.bind.text!r}: {reason_of(error)}: {mend}") from error


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


def _remover(server: TCPServer) -> Callable[[], None]:
    """Return a function that removes the server's Unix socket file, unless another file has taken its place."""
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
                remove_dead(endpoint.address)  # a drain has closed ours: another server's may have its inode number

    return remove


def _file_at(path: str) -> tuple[int, int]:
    """Return what identifies the file at `path` as long as it exists: its device and inode number."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino
