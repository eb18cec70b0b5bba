"""Questions about a request's socket: has it unread input, is it TLS, and did the peer cause its error?"""

from __future__ import annotations

import errno
import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from typing import Any, Final

from reqtable.table.errors import PeerError

INTERNET = (socket.AF_INET, socket.AF_INET6)
_TCP_CLOSE = 7  # from linux/net/tcp_states.h: the kernel no longer has this connection
_PEEK_NOW: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_NO_BYTES: Final = bytes(4)  # the int 0, as ioctl(2) gives it
# Errors of socket calls that neither the peer nor the network causes: the descriptor is closed or is no socket, an
# argument is wrong, or the kernel is out of memory.
_NOT_PEERS = {
    errno.EBADF,
    errno.ENOTSOCK,
    errno.EFAULT,
    errno.EINVAL,
    errno.EMSGSIZE,
    errno.EDESTADDRREQ,
    errno.EOPNOTSUPP,
    errno.ENOMEM,
    errno.ENOBUFS,
}


def has_unread(request: Any, plain: type[socket.socket]) -> bool:
    """Return whether a stream connection has unread input.

    `plain` is the socket class whose methods are called: those of a cooperative socket would wait.
    """
    if not isinstance(request, socket.socket) or request.fileno() < 0:
        return False
    try:
        # The plain number: `request.type` would look up an Enum member.
        if socket.SocketType.type.__get__(request) == socket.SOCK_STREAM:
            if plain.gettimeout(request):
                plain.settimeout(request, 0)  # with a timeout MSG_DONTWAIT waits; the descriptor is non-blocking anyway
            return bool(plain.recv(request, 1, _PEEK_NOW))
    except OSError:
        pass  # nothing to read, or the peer has gone
    return False


def has_bytes(descriptor: int) -> bool:
    """Return whether unread bytes wait at the descriptor of a socket. Needs no socket object, so it is cheap."""
    try:
        return fcntl.ioctl(descriptor, termios.FIONREAD, _NO_BYTES) != _NO_BYTES
    except OSError:
        return False


def is_quiet(connection: socket.socket, plain: type[socket.socket]) -> bool:
    """Return whether nothing has come from the peer of a non-blocking connection: no input, no end and no error.

    `plain` is the socket class whose methods are called: OpenSSL can't peek.
    """
    if not isinstance(connection, socket.socket):
        return True  # a test's own: see testing/wire.py
    if is_tls(connection) and connection.pending():  # type: ignore[attr-defined]
        return False
    try:
        plain.recv(connection, 1, _PEEK_NOW)
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        pass
    return False


def discarded_all(connection: socket.socket, count: int) -> bool:
    """Read and discard up to `count` bytes of input; True at the end of the input."""
    try:
        return not connection.recv(count, socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


def was_reset(connection: socket.socket) -> bool:
    """Return whether `connection`, which the poll reports as failed, was reset, or broken by the network.

    Takes no error from the socket: the thread or the child that has the connection too must meet the error itself.
    """
    if connection.family not in INTERNET or not hasattr(socket, "TCP_INFO"):
        return True
    try:  # the first byte of tcp_info is the state of the connection (tcp(7))
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except OSError:
        return False  # the handler has closed it


def end_request(hook: Callable[[Any], Any], request: Any) -> None:
    """Have a hook of the server close a request. If the hook raises, close the request's socket all the same."""
    try:
        hook(request)
    except BaseException:
        if isinstance(request, socket.socket):
            request.close()
        raise


def is_peers_error(error: OSError) -> bool:
    """Return whether the peer or the network caused the `error` of a call on a connected socket."""
    return error.errno not in _NOT_PEERS


def is_tls(request: socket.socket) -> bool:
    """Return whether `request` is a TLS socket; works without the module ssl."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(request, ssl.SSLSocket)


def is_peers_doing(error: BaseException | None) -> bool:
    """Return whether the peer caused `error`, which then deserves a line in the log but no traceback.

    The peer caused an exception group if it caused all of its exceptions.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(is_peers_doing(each) for each in error.exceptions)
    if isinstance(error, PeerError | ConnectionError | TimeoutError):
        return not isinstance(error, ConnectionRefusedError)  # that is of a connection which the handler opened
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(error, ssl.SSLError)
