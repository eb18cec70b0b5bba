"""The methods of `socket.socket` that may block, for blocking handlers under `suspend_all_sockets`.

Each method first makes the system call without blocking. If it would block, the method suspends the request until the
socket is ready. The descriptor keeps its mode, because other code may use it too.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any

from reqtable.dispatch.green.handler import note_moved
from reqtable.dispatch.green.names import resolved
from reqtable.dispatch.green.replacements import REPLACEMENTS, replaces
from reqtable.dispatch.green.waiting import Patience, sleep, wait_for_socket, wake_waiting
from reqtable.net.poll_only import PollOnly
from reqtable.table.states import READ, WRITE

_plain = _socket.socket  # its methods make the system calls
_timeout = _plain.gettimeout
# Read as plain numbers: the properties of `socket.socket` make members of enums, which takes a microsecond.
_family, _type, _proto = (vars(_plain)[name].__get__ for name in ("family", "type", "proto"))
_STREAM = int(socket.SOCK_STREAM)
_Poll = select.poll
_DONTWAIT, _PEEK, _WAITALL = int(socket.MSG_DONTWAIT), int(socket.MSG_PEEK), int(socket.MSG_WAITALL)
_RETRY_S = 0.005


def _waits(sock: Any, flags: int) -> bool:
    """Return whether a call on `sock` may wait at all."""
    return _timeout(sock) != 0 and not flags & _DONTWAIT and sock.fileno() >= 0


def _once(sock: Any, call: Callable[..., Any], *args: Any) -> Any:
    """Make a call that has MSG_DONTWAIT, so that it does not wait.

    On a socket with a timeout, even such a call first polls the descriptor, so another object makes the call.
    """
    if _timeout(sock) is None or sock.fileno() < 0:
        return call(sock, *args)
    twin = _twin(sock)
    try:
        return call(twin, *args)
    finally:
        twin.detach()


def _once_without_flags(sock: Any, call: Callable[..., Any], *args: Any) -> Any:
    """Make a call that has no flags, so that it does not wait."""
    fd = sock.fileno()
    if _timeout(sock) is None:
        was_blocking = os.get_blocking(fd)
        os.set_blocking(fd, False)
        try:
            return call(sock, *args)
        finally:
            os.set_blocking(fd, was_blocking)
    twin = _twin(sock)
    try:
        twin.settimeout(0.0)
        return call(twin, *args)
    finally:
        twin.detach()


def _twin(sock: Any) -> Any:
    """Return a plain socket of the same descriptor, which is non-blocking, because `sock` has a timeout."""
    twin = _plain(_family(sock), _type(sock), _proto(sock), sock.fileno())
    if socket.getdefaulttimeout() is not None:
        twin.settimeout(0.0)
    return twin


def _until_done(transport: PollOnly, sock: Any, interest: int, call: Callable[..., Any], *args: Any) -> Any:
    """Make a call, and again whenever the socket is ready, until it would not block."""
    patience = None
    while True:
        try:
            return _once(sock, call, *args)
        except BlockingIOError:
            if patience is not None:  # it was ready, and is not: a full Unix datagram socket says so again and again
                sleep(transport, min(patience.left() or _RETRY_S, _RETRY_S))
            patience = patience or Patience(transport, _timeout(sock))
        wait_for_socket(transport, sock, interest, patience.left())


# -- reading ----------------------------------------------------------------------------------------------------------


@replaces(socket.socket, "recv")
def _recv(transport: PollOnly, before: Any, sock: Any, bufsize: int, flags: int = 0) -> bytes:
    if not _waits(sock, flags):
        return before(sock, bufsize, flags)  # type: ignore[no-any-return]
    if flags & _WAITALL:
        buffer = bytearray(bufsize)
        return bytes(buffer[: _received_into(transport, sock, buffer, 0, flags)])
    data: bytes = _until_done(transport, sock, READ, _plain.recv, bufsize, flags | _DONTWAIT)
    note_moved(transport, len(data))
    return data


@replaces(socket.socket, "recv_into")
def _recv_into(transport: PollOnly, before: Any, sock: Any, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
    if not _waits(sock, flags):
        return before(sock, buffer, nbytes, flags)  # type: ignore[no-any-return]
    return _received_into(transport, sock, buffer, nbytes, flags)


def _received_into(transport: PollOnly, sock: Any, buffer: Any, nbytes: int, flags: int) -> int:
    count: int = _until_done(transport, sock, READ, _plain.recv_into, buffer, nbytes, flags | _DONTWAIT)
    note_moved(transport, count)
    if flags & _WAITALL and not flags & _PEEK and _timeout(sock) is None:  # MSG_DONTWAIT undoes MSG_WAITALL
        view = memoryview(buffer).cast("B")
        view, more = view[: nbytes or len(view)], count
        while more and count < len(view):
            more = _until_done(transport, sock, READ, _plain.recv_into, view[count:], 0, _DONTWAIT)
            note_moved(transport, more)
            count += more
    return count


@replaces(socket.socket, "recvfrom")
def _recvfrom(transport: PollOnly, before: Any, sock: Any, bufsize: int, flags: int = 0) -> Any:
    if not _waits(sock, flags):
        return before(sock, bufsize, flags)
    data, address = _until_done(transport, sock, READ, _plain.recvfrom, bufsize, flags | _DONTWAIT)
    note_moved(transport, len(data))
    return data, address


@replaces(socket.socket, "recvfrom_into")
def _recvfrom_into(transport: PollOnly, before: Any, sock: Any, buffer: Any, nbytes: int = 0, flags: int = 0) -> Any:
    if not _waits(sock, flags):
        return before(sock, buffer, nbytes, flags)
    count, address = _until_done(transport, sock, READ, _plain.recvfrom_into, buffer, nbytes, flags | _DONTWAIT)
    note_moved(transport, count)
    return count, address


@replaces(socket.socket, "recvmsg")
def _recvmsg(transport: PollOnly, before: Any, sock: Any, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Any:
    if not _waits(sock, flags):
        return before(sock, bufsize, ancbufsize, flags)
    received = _until_done(transport, sock, READ, _plain.recvmsg, bufsize, ancbufsize, flags | _DONTWAIT)
    note_moved(transport, len(received[0]))
    return received


@replaces(socket.socket, "recvmsg_into")
def _recvmsg_into(
    transport: PollOnly, before: Any, sock: Any, buffers: Any, ancbufsize: int = 0, flags: int = 0
) -> Any:
    if not _waits(sock, flags):
        return before(sock, buffers, ancbufsize, flags)
    buffers = list(buffers)  # each attempt reads all of it
    received = _until_done(transport, sock, READ, _plain.recvmsg_into, buffers, ancbufsize, flags | _DONTWAIT)
    note_moved(transport, received[0])
    return received


# -- writing ----------------------------------------------------------------------------------------------------------


def _sends_all(sock: Any) -> bool:
    """Return whether `send` takes all that it is given, as on a blocking stream without a timeout (send(2))."""
    return _timeout(sock) is None and _type(sock) == _STREAM


@replaces(socket.socket, "send")
def _send(transport: PollOnly, before: Any, sock: Any, data: Any, flags: int = 0) -> int:
    if not _waits(sock, flags):
        return before(sock, data, flags)  # type: ignore[no-any-return]
    if _sends_all(sock):
        return _sent_all(transport, sock, data, flags)
    count: int = _until_done(transport, sock, WRITE, _plain.send, data, flags | _DONTWAIT)
    note_moved(transport, count)
    return count


@replaces(socket.socket, "sendall")
def _sendall(transport: PollOnly, before: Any, sock: Any, data: Any, flags: int = 0) -> None:
    if not _waits(sock, flags):
        before(sock, data, flags)
    else:
        _sent_all(transport, sock, data, flags)


def _sent_all(transport: PollOnly, sock: Any, data: Any, flags: int) -> int:
    """Send all of `data`, and return the number of bytes. The timeout covers the whole call."""
    patience = Patience(transport, _timeout(sock))
    with memoryview(data) as view, view.cast("B") as left:
        sent = 0
        while True:
            try:
                count: int = _once(sock, _plain.send, left[sent:], flags | _DONTWAIT)
            except BlockingIOError:
                wait_for_socket(transport, sock, WRITE, patience.left())
                continue
            sent += count
            note_moved(transport, count)
            if sent == len(left):
                return sent
            patience.left()


@replaces(socket.socket, "sendto")
def _sendto(transport: PollOnly, before: Any, sock: Any, data: Any, *flags_and_address: Any) -> int:
    *given, address = flags_and_address or ((),)
    flags = given[0] if given else 0
    if len(flags_and_address) not in (1, 2) or not _waits(sock, flags):
        return before(sock, data, *flags_and_address)  # type: ignore[no-any-return]
    address = resolved(sock, address)
    count: int = _until_done(transport, sock, WRITE, _plain.sendto, data, flags | _DONTWAIT, address)
    note_moved(transport, count)
    return count


@replaces(socket.socket, "sendmsg")
def _sendmsg(
    transport: PollOnly, before: Any, sock: Any, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None
) -> int:
    buffers, ancdata = list(buffers), list(ancdata)  # each attempt reads all of it
    if not _waits(sock, flags):
        return before(sock, buffers, ancdata, flags, address)  # type: ignore[no-any-return]
    sent: int = _until_done(transport, sock, WRITE, _plain.sendmsg, buffers, ancdata, flags | _DONTWAIT, address)
    note_moved(transport, sent)
    if _sends_all(sock):
        rest = memoryview(b"".join(buffers))[sent:]
        sent += _sent_all(transport, sock, rest, flags) if rest else 0
    return sent


@replaces(socket.socket, "sendfile")
def _sendfile(transport: PollOnly, before: Any, sock: Any, file: Any, offset: int = 0, count: int | None = None) -> int:
    if not _waits(sock, 0):
        return before(sock, file, offset, count)  # type: ignore[no-any-return]
    # not by os.sendfile, which blocks if the descriptor does
    return sock._sendfile_use_send(file, offset, count)  # type: ignore[no-any-return]


# -- connections ------------------------------------------------------------------------------------------------------


@replaces(socket.socket, "_accept")
def _accept(transport: PollOnly, before: Any, sock: Any) -> Any:
    if not _waits(sock, 0):
        return before(sock)
    patience = Patience(transport, _timeout(sock))
    while True:
        # Accepting has no MSG_DONTWAIT, and the mode of the descriptor is left alone as long as nobody connects.
        if _is_readable(sock):
            try:
                accepted = _once_without_flags(sock, _plain._accept)  # type: ignore[attr-defined]
            except BlockingIOError:  # another process was faster
                continue
            note_moved(transport, 0)
            return accepted
        wait_for_socket(transport, sock, READ, patience.left())


def _is_readable(sock: Any) -> bool:
    poll = _Poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@replaces(socket.socket, "connect")
def _connect(transport: PollOnly, before: Any, sock: Any, address: Any) -> None:
    if not _waits(sock, 0):
        before(sock, address)
    elif number := _connected(transport, sock, address):
        raise OSError(number, os.strerror(number))


@replaces(socket.socket, "connect_ex")
def _connect_ex(transport: PollOnly, before: Any, sock: Any, address: Any) -> int:
    if not _waits(sock, 0):
        return before(sock, address)  # type: ignore[no-any-return]
    try:
        return _connected(transport, sock, address)
    except TimeoutError:
        return errno.EAGAIN


def _connected(transport: PollOnly, sock: Any, address: Any) -> int:
    """Connect, and return the number of the error; 0: none. Raises TimeoutError."""
    address = resolved(sock, address)
    patience = Patience(transport, _timeout(sock))
    note_moved(transport, 0)
    while True:
        number: int = _once_without_flags(sock, _plain.connect_ex, address)
        if number == errno.EINPROGRESS:
            wait_for_socket(transport, sock, WRITE, patience.left())
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # type: ignore[no-any-return]
        if number != errno.EAGAIN:
            return number
        # A Unix socket: the queue of the listening socket is full, and no poll tells when there is room.
        sleep(transport, min(patience.left() or _RETRY_S, _RETRY_S))


def _closing(before: Any) -> Any:
    """Replace what gives up a socket's descriptor, for every caller: a request may wait for the socket."""

    @wraps(before, updated=())
    def replacement(sock: Any, *args: Any) -> Any:
        fd = sock.fileno()
        result = before(sock, *args)
        wake_waiting(fd)
        return result

    return replacement


REPLACEMENTS.add(socket.socket, "_real_close", _closing)
REPLACEMENTS.add(socket.socket, "detach", _closing)
