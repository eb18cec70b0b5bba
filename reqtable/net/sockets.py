"""What may be asked of a request's socket: what it holds unread, whose fault an error is, whether it is TLS."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from reqtable.table.errors import PeerError

_PEEK_NOW: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
# What a call on a socket fails with though the peer and the network have done nothing: the descriptor is closed or no
# socket, an argument is wrong, or the kernel is out of memory.
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
    """Whether a stream connection has input that nobody has read.

    `plain` is the class whose calls are made: a cooperative socket's would wait.
    """
    if not isinstance(request, socket.socket) or request.fileno() < 0:
        return False
    try:
        # As a number: for `request.type` a member of an Enum is looked up.
        if socket.SocketType.type.__get__(request) == socket.SOCK_STREAM:
            if plain.gettimeout(request):
                plain.settimeout(request, 0)  # with a timeout MSG_DONTWAIT waits; the descriptor is non-blocking then
            return bool(plain.recv(request, 1, _PEEK_NOW))
    except OSError:
        pass  # nothing is there, or nobody is
    return False


def discarded_all(connection: socket.socket, count: int) -> bool:
    """Throw away up to `count` bytes of input; True at its end."""
    try:
        return not connection.recv(count, socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


def end_request(hook: Callable[[Any], Any], request: Any) -> None:
    """Have a hook of the server close a request. Where the hook raises, its socket is closed all the same."""
    try:
        hook(request)
    except BaseException:
        if isinstance(request, socket.socket):
            request.close()
        raise


def is_peers_error(error: OSError) -> bool:
    """Whether a call on a connected socket failed by the peer's doing, or the network's."""
    return error.errno not in _NOT_PEERS


def is_tls(request: socket.socket) -> bool:
    """Whether it is a TLS socket. There may be no ssl here."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(request, ssl.SSLSocket)


def is_peers_doing(error: BaseException | None) -> bool:
    """Whether the other end has brought it about: worth a line, and no traceback.

    A group is the other end's doing if all of its exceptions are.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(is_peers_doing(each) for each in error.exceptions)
    if isinstance(error, PeerError | ConnectionError | TimeoutError):
        return not isinstance(error, ConnectionRefusedError)  # it is that of a connection which the handler made
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(error, ssl.SSLError)
