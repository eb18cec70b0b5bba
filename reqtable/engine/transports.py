"""Transports that do no I/O of their own.

`Lent` is for handlers that read and write their socket themselves: the engine only polls it for them, or, where the
handler never waits in the loop, does not touch it at all. `RELEASED` and `OVER` stand in for the transport and the
handler of an entry that has ended.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import TYPE_CHECKING, Any, ClassVar

from reqtable.core.states import READ, WRITE, Event, State
from reqtable.core.table import Entry

if TYPE_CHECKING:
    from reqtable.engine.engine import Engine

# What a lent socket became ready for, in the state of the entry that waited for it.
_WAITED_FOR = {State.READING: READ, State.WRITING: WRITE}


class Polled:
    """A descriptor that the selector watches for whatever was last asked of `poll`, and nothing else."""

    __slots__ = ("engine", "fd", "watched")

    def __init__(self, engine: Engine, fd: int) -> None:
        self.engine = engine
        self.fd = fd
        self.watched = 0

    def poll(self, interest: int) -> None:
        if interest == self.watched:
            return
        if not interest:
            self.engine.selector.unregister(self.fd)
        elif not self.watched:
            self.engine.selector.register(self.fd, interest, self)
        else:
            self.engine.selector.modify(self.fd, interest, self)
        self.watched = interest


class Lent(Polled):
    """The socket of a handler that does its own I/O; `request` is what the server's hooks are called with."""

    __slots__ = ("_ended", "_left", "entry", "request")

    timeout_s: float | None = None

    def __init__(self, engine: Engine, request: Any) -> None:
        super().__init__(engine, request.fileno() if isinstance(request, socket.socket) else -1)
        self.request = request
        self.entry: Entry
        self._ended = False
        self._left: socket.socket | None = None  # our own hold on a connection that lingers

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        if entry.state is State.LINGERING:
            self._discard()
        elif mask & _WAITED_FOR.get(entry.state, 0):
            entry.active_at = self.engine.table.now
            entry.posted = None
            self.engine.step(entry, Event.INPUT_ARRIVED if entry.state is State.READING else Event.OUTPUT_TAKEN)

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        """The handler has returned: the hooks `shutdown_request` and `close_request` end its request.

        Closing a connection with unread input resets it (tcp(7)), and the reset may overtake the answer. So where
        there is some, a duplicate of the descriptor outlives the hooks, and lingers.
        """
        self.poll(0)
        self._ended = True
        self._left = _duplicate_if_unread(self.request)
        try:
            self.entry.server.shutdown_request(self.request)
        except BaseException:
            self.engine.end(self.entry, Event.RELEASED)
            raise
        if self._left is None:
            self.engine.end(self.entry, Event.RELEASED)
        else:
            self.fd = self._left.fileno()
            self.engine.linger(self.entry)

    def release(self) -> None:
        self.poll(0)
        if self._left is not None:
            self._left.close()
        if not self._ended:
            self._ended = True
            self.entry.server.shutdown_request(self.request)

    def _discard(self) -> None:
        assert self._left is not None
        if discarded_all(self._left, self.engine.limits.recv_bytes):
            self.engine.end(self.entry, Event.INPUT_ENDED)


def discarded_all(connection: socket.socket, count: int) -> bool:
    """Throw away up to `count` bytes of input; True at its end."""
    try:
        return not connection.recv(count, socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


def _duplicate_if_unread(request: Any) -> socket.socket | None:
    """Another hold on a plain stream connection that still has input to read; None for anything else."""
    if not isinstance(request, socket.socket) or isinstance(request, ssl.SSLSocket) or request.fileno() < 0:
        return None
    try:
        if request.type == socket.SOCK_STREAM and socket.socket.recv(request, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            return socket.socket(request.family, request.type, request.proto, fileno=os.dup(request.fileno()))
    except OSError:
        pass  # nothing is there, or nobody is
    return None


class _Released:
    """Of an entry that has ended."""

    request: Any = None
    timeout_s: float | None = None

    def poll(self, interest: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass


class _Over:
    """Stands in for the handler of an entry whose handler's part is over."""

    bound_to_thread: ClassVar[bool] = False

    def _resume(self, item: Any) -> None:
        return None

    def _throw(self, error: BaseException) -> None:
        return None

    def _close(self) -> None:
        pass


RELEASED = _Released()
OVER = _Over()
