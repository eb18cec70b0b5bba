"""The methods of `ssl.SSLSocket` that may block, for blocking handlers under `suspend_all_sockets`.

OpenSSL reads and writes the descriptor itself. So the socket has the timeout 0 during a call, and its own timeout again
while the request is suspended.
"""

from __future__ import annotations

import _socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

from reqtable.dispatch.green.handler import note_moved
from reqtable.dispatch.green.replacements import replaces
from reqtable.dispatch.green.waiting import Patience, wait_for_socket
from reqtable.net.poll_only import PollOnly
from reqtable.table.states import READ, WRITE

_plain = _socket.socket


def _until_done(transport: PollOnly, sock: Any, call: Callable[[], Any], timeout_s: float | None) -> Any:
    """Make a call, and again whenever the socket is ready for what OpenSSL wants of it, until it succeeds."""
    own_timeout_s = _plain.gettimeout(sock)
    patience = None
    while True:
        _plain.settimeout(sock, 0.0)
        try:
            return call()
        except ssl.SSLWantReadError:
            interest = READ
        except ssl.SSLWantWriteError:
            interest = WRITE
        finally:
            if sock.fileno() >= 0:
                _plain.settimeout(sock, own_timeout_s)
        patience = patience or Patience(transport, timeout_s)
        wait_for_socket(transport, sock, interest, patience.left())


def _waits(sock: Any) -> bool:
    """Return whether a call on `sock` is encrypted and may wait."""
    return sock._sslobj is not None and _plain.gettimeout(sock) != 0


@replaces(ssl.SSLSocket, "read")
def _read(transport: PollOnly, before: Any, sock: Any, *args: Any, **kwargs: Any) -> Any:
    if not _waits(sock):
        return before(sock, *args, **kwargs)
    data = _until_done(transport, sock, partial(before, sock, *args, **kwargs), _plain.gettimeout(sock))
    note_moved(transport, data if isinstance(data, int) else len(data))
    return data


def _written(transport: PollOnly, before: Any, sock: Any, data: Any, *flags: int) -> int:
    if not _waits(sock):
        return before(sock, data, *flags)  # type: ignore[no-any-return]
    count: int = _until_done(transport, sock, partial(before, sock, data, *flags), _plain.gettimeout(sock))
    note_moved(transport, count)
    return count


replaces(ssl.SSLSocket, "write")(_written)
replaces(ssl.SSLSocket, "send")(_written)


@replaces(ssl.SSLSocket, "do_handshake")
def _do_handshake(transport: PollOnly, before: Any, sock: Any, block: bool = False) -> None:
    timeout_s = _plain.gettimeout(sock)
    if sock._sslobj is None or (timeout_s == 0 and not block):
        before(sock, block)
    else:
        _until_done(transport, sock, partial(before, sock), None if timeout_s == 0 else timeout_s)


@replaces(ssl.SSLSocket, "unwrap")
def _unwrap(transport: PollOnly, before: Any, sock: Any) -> Any:
    if not _waits(sock):
        return before(sock)
    return _until_done(transport, sock, partial(before, sock), _plain.gettimeout(sock))
