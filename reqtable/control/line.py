"""A line between a supervisor and a worker: messages of plain data, both ways, over a socket pair."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from reqtable.loop.poller import Descriptor, Poller
from reqtable.table.states import READ, WRITE

_LENGTH = struct.Struct("!I")
_RECV_BYTES = 262_144
_LEAVING_MAX = 2**20  # bytes of messages


class Line(Descriptor):
    """Sends and receives messages. Calls `on_message(message)` for each, and `on_end()` when the other end is gone."""

    __slots__ = ("_arrived", "_leaving", "_on_end", "_on_message", "_socket")

    def __init__(
        self, poller: Poller, own: socket.socket, on_message: Callable[[Any], Any], on_end: Callable[[], Any]
    ) -> None:
        super().__init__(poller, own.fileno())
        own.setblocking(False)
        self._socket = own
        self._on_message = on_message
        self._on_end = on_end
        self._arrived = bytearray()
        self._leaving = bytearray()
        self.watch(READ)

    @property
    def is_open(self) -> bool:
        """Whether messages can still be sent."""
        return self._socket.fileno() >= 0

    @property
    def is_full(self) -> bool:
        """Whether the other end does not read, and much waits for it already."""
        return len(self._leaving) >= _LEAVING_MAX

    def say(self, message: Any) -> None:
        """Send a message, in later passes if the other end does not read. A message to a closed line is dropped."""
        if not self.is_open:
            return
        self._leaving += _framed(message)
        self._flush()

    def say_last(self, message: Any, within_s: float) -> None:
        """Send a message, and close. Waits until the kernel has taken it, at most `within_s` seconds: no loop runs."""
        if self.is_open:
            with suppress(OSError):  # the other end is gone, or does not read
                self._socket.settimeout(within_s)
                self._socket.sendall(self._leaving + _framed(message))
            self.close()

    def hear_out(self) -> None:
        """Take what the other end, which is gone, has sent before. Then close."""
        while self.is_open and self._receive():
            pass
        if self.is_open:
            self._end()

    def on_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush()
        if mask & READ and self.is_open:
            self._receive()

    def close(self) -> None:
        if self.is_open:
            self.watch(0)
            self._socket.close()

    def abandon(self) -> None:
        """In a forked child: close this process's copy of the socket, and leave the selector to the parent."""
        self._socket.close()

    def _flush(self) -> None:
        try:
            while self._leaving:
                del self._leaving[: self._socket.send(self._leaving)]
        except BlockingIOError:
            pass
        except OSError:
            self.hear_out()
            return
        self.watch(READ | WRITE if self._leaving else READ)

    def _receive(self) -> bool:
        """Take what has arrived. Returns whether more may come."""
        try:
            data = self._socket.recv(_RECV_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end()
            return False
        self._arrived += data
        while len(self._arrived) >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(self._arrived)
            end = _LENGTH.size + length
            if len(self._arrived) < end:
                break
            message = msgspec.msgpack.decode(bytes(self._arrived[_LENGTH.size : end]))
            del self._arrived[:end]
            self._on_message(message)
        return True

    def _end(self) -> None:
        self.close()
        self._on_end()


def _framed(message: Any) -> bytes:
    data = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(data)) + data
