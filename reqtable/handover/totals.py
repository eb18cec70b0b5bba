"""How much a TCP connection's process has received and sent, by the kernel's own account.

The kernel counts every byte of a connection, whichever process has it. So after a process has died, these totals say
exactly how far the process had come.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import termios
from typing import Final, NamedTuple

from reqtable.net.sockets import INTERNET

_SO_COOKIE: Final = 57  # asm-generic/socket.h
_INFO: Final = struct.Struct("B119xQQ")  # struct tcp_info of linux/tcp.h: tcpi_state, …_bytes_acked, …_bytes_received
_TRIES_MAX = 1000

# From linux/net/tcp_states.h: in which states one side's FIN is among the counted bytes.
_FIN_WAIT1, _FIN_WAIT2, _TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 4, 5, 6, 7, 8, 9, 11
_OURS: Final = {_FIN_WAIT1, _FIN_WAIT2, _TIME_WAIT, _CLOSE, _LAST_ACK, _CLOSING}
_PEERS: Final = {_TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING}


class Totals(NamedTuple):
    """Counts the bytes that the process has taken from the kernel, and those that it has given to the kernel."""

    received: int
    sent: int


def has_totals(connection: socket.socket) -> bool:
    """Return whether the kernel counts the bytes of `connection`: it does so for TCP, on Linux."""
    return sys.platform == "linux" and connection.family in INTERNET and connection.type == socket.SOCK_STREAM


def is_stream(connection: socket.socket) -> bool:
    """Return whether `connection` is a TCP or a Unix stream, on Linux."""
    return has_totals(connection) or (
        sys.platform == "linux" and connection.family == socket.AF_UNIX and connection.type == socket.SOCK_STREAM
    )


def totals(connection: socket.socket) -> Totals:
    """Return the totals of a TCP connection from which no process reads or writes now. Raises OSError."""
    before = _info(connection)
    for _ in range(_TRIES_MAX):
        unread = _count(connection, termios.FIONREAD)
        untaken = _count(connection, termios.TIOCOUTQ)
        state, acknowledged, arrived = info = _info(connection)
        if info == before:  # else bytes or acknowledgements have come between the questions
            received = arrived - unread - (state in _PEERS)
            return Totals(received, acknowledged + untaken - (state in _OURS))
        before = info
    raise OSError("the totals of the connection do not stand still")


def cookie_of(connection: socket.socket) -> int:
    """Return the kernel's number of a socket, which no other socket has or will have (SO_COOKIE in socket(7))."""
    return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def _info(connection: socket.socket) -> tuple[int, int, int]:
    return _INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))


def _count(connection: socket.socket, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(connection.fileno(), request, bytes(4)), sys.byteorder)
