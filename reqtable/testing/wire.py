"""Stand-ins for sockets, selector and wake-up, for a test that plays the peers of one request itself."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from reqtable.loop.wakeup import Wakeup
from reqtable.table.states import PEER_END, READ, RESET, WRITE

_WAKEUP = 0  # the descriptor of the wake-up, which is never ready


class Wire:
    """Stands in for one socket of the request, and for the kernel behind it. The test is the other end.

    The kernel takes all output unless the test reads nothing. Each piece that the test sends is one `recv`.
    """

    family = socket.AF_UNIX  # no option of TCP is set

    def __init__(self, number: int, datagrams: bool) -> None:
        self.datagrams = datagrams
        self.unread: deque[bytes] = deque()  # sent by the test, and not read by the request
        self.end_sent = False  # by the test
        self.received: list[bytes] = []  # sent by the request, and not yet expected by the test
        self.output_ended = False  # by the request
        self.is_blocked = False  # the test reads nothing
        self.is_reset = False  # by the test
        self.is_encrypted = False
        self.tls_refusal: str | None = None  # why a TLS handshake fails; None: it succeeds
        self._number = number

    def ready(self, events: int) -> int:
        """Return what a poll for `events` reports."""
        if self.is_reset:
            return READ | WRITE | RESET
        found = READ if self.unread or self.end_sent else 0
        found |= PEER_END if self.end_sent else 0
        return (found if self.is_blocked else found | WRITE) & events

    # -- called by the transports -------------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._number

    def setblocking(self, flag: bool) -> None:
        pass

    def getsockopt(self, level: int, name: int) -> int:
        return errno.ECONNRESET if self.is_reset else 0

    def recv(self, count: int, flags: int = 0) -> bytes:
        self._raise_if_reset()
        if self.unread:
            return self.unread.popleft()
        if self.end_sent:
            return b""
        raise _error(errno.EAGAIN)

    def send(self, data: Any) -> int:
        self._raise_if_reset()
        if self.is_blocked:
            raise _error(errno.EAGAIN)
        self.received.append(bytes(data))
        return len(data)

    def shutdown(self, how: int) -> None:
        self._raise_if_reset()
        self.output_ended = True

    def close(self) -> None:
        self.output_ended = True

    def _raise_if_reset(self) -> None:
        if self.is_reset:
            raise _error(errno.ECONNREFUSED if self.datagrams else errno.ECONNRESET)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))  # the constructor picks the subclass


def no_sendfile(*args: int) -> int:
    """Refuse every file, in place of sendfile(2): the engine reads the file and sends the bytes."""
    raise _error(errno.EINVAL)


class WireSelector(selectors.BaseSelector):
    """Polls the wires of one request. Never waits."""

    interests = READ | WRITE | RESET | PEER_END

    def __init__(self) -> None:
        self._wires: dict[int, Wire] = {}
        self._keys: dict[int, selectors.SelectorKey] = {}

    def new_wire(self, datagrams: bool) -> Wire:
        """Return a new wire."""
        number = len(self._wires) + 1
        wire = self._wires[number] = Wire(number, datagrams)
        return wire

    @property
    def is_quiet(self) -> bool:
        """Whether no wire is ready."""
        return not self.select()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd in self._keys:
            raise KeyError(f"{fd} is already registered")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        if fd != _WAKEUP:
            self._keys[fd] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        polled = [(key, self._wires[fd].ready(key.events)) for fd, key in self._keys.items()]
        return [(key, mask) for key, mask in polled if mask]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class NoWakeup(Wakeup):
    """Does nothing: no other thread wakes this loop."""

    def __init__(self) -> None:
        pass

    def fileno(self) -> int:
        return _WAKEUP

    def wake(self) -> None:
        pass

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        pass
