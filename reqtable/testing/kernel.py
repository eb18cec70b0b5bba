"""The kernel's part of simulated sockets: the files that descriptors stand for.

The rules:

* Bytes of one direction never overtake each other. A reset does overtake bytes, and these are lost (RFC 9293, 3.5.2).
* Closing with unread input resets the connection; so does input that arrives after closing (tcp(7), RFC 2525, 2.17).
* Only the server's sockets fail at times, those that it connects among them. The sockets of clients and upstreams
  don't, because clients and upstreams observe the server.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from math import inf
from typing import Any

from reqtable.table.states import PEER_END, READ, RESET, WRITE
from reqtable.testing.wires import Network

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SPIN_S = 0.001


def os_error(number: int) -> OSError:
    """Return the error that a system call fails with."""
    return OSError(number, os.strerror(number))  # the constructor picks the subclass


def raise_error(file: Any) -> None:
    """Raise the error that a socket has met, once."""
    if file.error:
        number, file.error = file.error, 0
        raise os_error(number)


class File:
    """Holds the kernel's part of a socket, for which descriptors stand."""

    is_connected = False
    is_connecting = False
    error = 0  # the errno that the next call fails with, once

    def __init__(self, network: Network) -> None:
        self.network = network
        self.descriptors = 0
        self.address: Any = ("0.0.0.0", 0)

    def ready(self) -> int:
        """Return what a poll would report of READ, WRITE and PEER_END, if it is asked for all of them."""
        return 0

    def failed(self) -> int:
        """Return what a poll would report without being asked: of an error or a hang-up. 0: of neither."""
        return 0

    def close(self) -> None:
        """Close the file: its last descriptor is closed."""
        self.unbind()

    def unbind(self) -> None:
        bound = self.network.bound
        for key in [key for key, file in bound.items() if file is self]:
            del bound[key]

    def accept(self) -> StreamEnd:
        raise os_error(errno.EINVAL)

    def send(self, data: bytes) -> int:
        raise os_error(errno.ENOTCONN)

    def recv(self, count: int, peek: bool = False) -> bytes:
        raise os_error(errno.ENOTCONN)

    def shutdown(self, how: int) -> None:
        raise os_error(errno.ENOTCONN)

    def fail_at_times(self, place: str) -> None:
        """Raise EAGAIN or EINTR if the dice say so."""
        if self.network.dice.happens("would_block", place):
            raise os_error(errno.EAGAIN)
        if self.network.dice.happens("interrupted", place):
            raise os_error(errno.EINTR)


class Listening(File):
    """Queues new connections, as a listening socket does."""

    def __init__(self, network: Network, address: Any, backlog: int) -> None:
        super().__init__(network)
        self.address = address
        self.backlog = max(0, backlog)
        self.answers_after_s: float | None = 0.0  # after the packet that asks for a connection; None: never
        self.queue: deque[StreamEnd] = deque()
        # when accept last found no descriptor free, and how many descriptors had been closed before that pass
        self._exhausted = (-inf, 0)

    def ready(self) -> int:
        return READ if self.queue else 0

    def accept(self) -> StreamEnd:
        dice = self.network.dice
        failed_at, closed = self._exhausted
        if self.network.clock.now < failed_at + _SPIN_S and self.network.closed == closed:
            self.network.complaints.append("accept(2) found no descriptor free, and was called again at once")
        self.fail_at_times("accept")
        if not self.queue:
            raise os_error(errno.EAGAIN)
        if dice.happens("exhausted", "accept"):
            self._exhausted = (self.network.clock.now, self.network.closed_before_pass)
            raise os_error(_EXHAUSTED[dice.draw("errno", "accept", len(_EXHAUSTED))])
        end = self.queue.popleft()
        if dice.happens("aborted", "accept"):
            end.other.was_hit = True
            end.abort()
            raise os_error(errno.ECONNABORTED)
        return end

    def arrive(self, end: StreamEnd) -> None:
        """Queue the near end of a new connection."""
        self.queue.append(end)

    def close(self) -> None:
        self.unbind()
        while self.queue:
            self.queue.popleft().abort()


class StreamEnd(File):
    """Receives bytes from the `other` end of a connection, and sends to it. Its fields describe its input."""

    is_connected = True

    def __init__(self, network: Network, name: str, window: int, address: Any, peer: Any, is_servers: bool) -> None:
        super().__init__(network)
        self.name = name
        self.window = window  # how many bytes may be on their way here or unread
        self.address = address
        self.peer = peer
        self.is_servers = is_servers
        self.other: StreamEnd
        self.arrived = bytearray()
        self.coming = 0  # bytes on their way here
        self.has_ended = False  # the other end's end of file has arrived
        self.is_shut = False  # this end has sent its end of file
        self.is_broken = False  # by a reset
        self.is_closed = False
        self.bytes_in = 0  # bytes read by recv
        self.bytes_out = 0  # bytes taken by send
        self.was_hit = False  # by a fault that the user of this end can notice
        self.on_change: Callable[[], None] | None = None
        self._next_at = 0.0  # when the last data sent arrives: later data can't arrive earlier

    @property
    def room(self) -> int:
        other = self.other
        return other.window - len(other.arrived) - other.coming

    def ready(self) -> int:
        readable = self.arrived or self.has_ended or self.is_broken
        writable = self.is_broken or self.is_shut or self.other.is_closed or self.room > 0
        return (READ if readable else 0) | (WRITE if writable else 0) | (READ | PEER_END if self.has_ended else 0)

    def failed(self) -> int:
        if self.error:
            return READ | WRITE | RESET
        return READ | WRITE | PEER_END if self.is_lost else 0

    @property
    def is_lost(self) -> bool:
        """Whether the kernel no longer has the connection: a reset has broken it, or both sides have ended."""
        return self.is_broken or (self.has_ended and self.is_shut)

    def send(self, data: Any) -> int:
        if self.is_servers:
            self.fail_at_times(self.name)
        raise_error(self)
        if self.is_broken or self.is_shut:
            raise os_error(errno.EPIPE)
        count = min(len(data), self.other.window if self.other.is_closed else self.room)
        if not len(data):
            return 0
        if count <= 0:
            raise os_error(errno.EAGAIN)
        dice = self.network.dice
        if self.is_servers and count > 1 and dice.happens("partial", self.name):
            count = 1 + dice.draw("part", self.name, count - 1)
        self.bytes_out += count
        self._transmit(bytes(data[:count]))
        return count

    def recv(self, count: int, peek: bool = False) -> bytes:
        if self.is_servers and not peek:
            self.fail_at_times(self.name)
        if self.arrived:
            data = bytes(self.arrived[:count])
            if not peek:
                del self.arrived[:count]
                self.bytes_in += len(data)
                self.other._changed()  # the other end has room to send again
            return data
        if self.has_ended:
            return b""
        raise_error(self)
        if self.is_broken:
            return b""
        raise os_error(errno.EAGAIN)

    def shutdown(self, how: int) -> None:
        if self.is_broken:
            raise os_error(errno.ENOTCONN)
        if how != socket.SHUT_WR:
            self.has_ended = True
            self._changed()
        if how != socket.SHUT_RD and not self.is_shut:
            self.is_shut = True
            self._send_later(self.other._end)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self.is_broken:
            return
        if self.arrived:
            self.abort()
        elif not self.is_shut:
            self.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """Reset the connection."""
        self.is_closed = self.is_broken = True
        self.network.after(self.network.latency_s, self.other._reset)

    def _transmit(self, data: bytes) -> None:
        dice = self.network.dice
        if dice.happens("reset", self.name):
            self.was_hit = self.other.was_hit = True
            self._reset()
            self.network.after(self.network.latency_s, self.other._reset)
            return
        cuts = {0, len(data)}
        if len(data) > 1 and dice.happens("split", self.name):
            cuts |= {
                1 + dice.draw("cut at", self.name, len(data) - 1) for _ in range(1 + dice.draw("cuts", self.name, 3))
            }
        places = sorted(cuts)
        self.other.coming += len(data)
        for begin, end in pairwise(places):
            if begin:
                self._next_at += self.network.latency_s
            self._send_later(self.other._arrive, data[begin:end])

    def _send_later(self, arrive: Callable[..., None], *args: Any) -> None:
        dice = self.network.dice
        at = self.network.clock.now + self.network.latency_s
        if dice.happens("delayed", self.name):
            at += dice.faults.delay_max_s * (1 + dice.draw("delay", self.name, 1000)) / 1000
        self._next_at = max(self._next_at, at)
        self.network.at(self._next_at, arrive, *args)

    def _arrive(self, data: bytes) -> None:
        if self.is_broken:
            return
        self.coming -= len(data)
        if self.is_closed:
            self.abort()
            return
        self.arrived += data
        self._changed()

    def _end(self) -> None:
        if not self.is_broken:
            self.has_ended = True
            self._changed()

    def _reset(self) -> None:
        if not self.is_broken:
            self.is_broken = True
            self.coming = 0
            self.error = errno.EPIPE if self.has_ended else errno.ECONNRESET
            self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.network.after(0, self.on_change)  # not now: a call of the same client may have caused the change
