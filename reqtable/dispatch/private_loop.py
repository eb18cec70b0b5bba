"""A blocking driver: a loop with one request, for the thread or the child that has taken it over.

It is the same loop, so the request finds the same wants, limits and timeouts. What a driver does not do is end the
connection: the loop that the request came from does, so that nobody's thread has to linger.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from functools import cache
from typing import Any

from reqtable.loop.loop import Loop
from reqtable.loop.platform import System
from reqtable.net.datagram import Session
from reqtable.net.stream import Stream
from reqtable.net.transports import Polled, is_tls
from reqtable.table.buffers import Inbox, Input, Output
from reqtable.table.states import READ, Event
from reqtable.table.table import Entry

DATAGRAM_BYTES = 65_536
_MARK = b"+"

# The descriptor of an epoll would be one more for each request.
_Selector: Callable[[], selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.DefaultSelector)


class _DrivenStream(Stream):
    """The connection, while it is driven."""

    __slots__ = ()

    def finish(self) -> None:
        self.engine.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.poll(0)


@cache
def _driven_tls() -> type[Stream]:
    from reqtable.net.tls import TLSStream  # where it is used, ssl is there

    class DrivenTLSStream(_DrivenStream, TLSStream):
        """A secured connection, while it is driven: by a child, perhaps, and nobody else can end it then."""

        __slots__ = ()

        def finish(self) -> None:
            self.request.setblocking(True)
            self.request.end_politely()
            self.request.setblocking(False)
            super().finish()

    return DrivenTLSStream


def _kind_for(request: Any) -> Any:
    """The transport of a request that is driven."""
    if isinstance(request, tuple):
        return _DrivenSession
    return _driven_tls() if is_tls(request) else _DrivenStream


class _DrivenSession(Session):
    """The datagrams of one peer, while they are driven; in a child, the later ones come by `feed`."""

    __slots__ = ("feed",)

    def __init__(self, loop: Any, request: Any) -> None:
        super().__init__(loop, request)
        self.feed: _Feed | None = None

    def poll(self, interest: int) -> None:
        super().poll(interest)
        if self.feed is not None:
            # what is no session leaves them to the parent
            self.feed.poll(READ if interest & READ and self.inbox.is_session else 0)

    def finish(self) -> None:
        self.engine.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.poll(0)


class _Feed(Polled):
    """The end of a socket pair by which a child gets the later datagrams of its peer."""

    __slots__ = ("_end", "_session")

    def __init__(self, loop: Any, end: socket.socket, session: _DrivenSession) -> None:
        super().__init__(loop, end.fileno())
        self._end = end
        self._session = session

    def on_ready(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            data = take_message(self._end)
            if data is None:
                self.poll(0)  # the parent has gone: no more will come
            else:
                self._session.deliver(data)


def send_message(end: socket.socket, data: bytes) -> None:
    """Send a datagram by a pair of sockets. Raises OSError, BlockingIOError where the pair is full.

    A byte before it tells a datagram of no bytes from the end of the pair.
    """
    end.send(_MARK + data, socket.MSG_DONTWAIT)


def take_message(end: socket.socket) -> bytes | None:
    """The next datagram of a pair; None at its end. Raises BlockingIOError where there is none."""
    message = end.recv(len(_MARK) + DATAGRAM_BYTES, socket.MSG_DONTWAIT)
    return message[len(_MARK) :] if message else None


class Driver(Loop):
    """Drives the request of `origin`, which stays in its own table, DELEGATED, meanwhile."""

    def __init__(self, origin: Entry, policy: Any, dispatcher: Any, request: Any) -> None:
        table = origin.table
        super().__init__(table.limits, System(clock=table.clock, selector=_Selector))
        self.table.driver = policy.name
        self.table.last_id = origin.id - 1  # the request keeps its number
        transport = _kind_for(request)(self, request)
        self.origin = origin
        self.entry = entry = Entry(self.table, origin.server, policy, origin.peer, origin.local, transport)
        self.transport = transport
        transport.entry = entry
        entry.created_at = origin.created_at
        entry.calls = origin.calls
        move(origin, entry)
        if isinstance(entry.input, Inbox):
            transport.inbox = entry.input
        entry.resumable = dispatcher.driven(entry, entry.handler)
        self._over = False

    def feed(self, end: socket.socket) -> None:
        """Take the later datagrams of the peer from there."""
        self.transport.feed = _Feed(self, end, self.transport)

    def drive(self) -> None:
        """Run the request to its end. Raises what ends the program, such as Ctrl-C: the request does not outlive it."""
        self.post(self.begin, self.entry)
        try:
            self.run(lambda: self._over)
        except BaseException:
            self.end(self.entry, Event.CANCELLED)
            self._reap()
            raise
        finally:
            self.close_descriptors()

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None) -> None:
        super().step(entry, cause, error)
        entry.active_at = self.clock()  # its step may have waited for whatever it liked: that is what threads are for

    def begin(self, entry: Entry) -> None:
        if self._over:
            return  # cancelled before it began
        super().begin(entry)

    def cancel_request(self) -> None:
        """End it. Callable from any thread."""
        self.post(self._cancel)

    def send_back(self) -> None:
        """Give the request's counters and buffers back to the entry it came from."""
        move(self.entry, self.origin)

    def _cancel(self) -> None:
        self.end(self.entry, Event.CANCELLED)

    def released(self, entry: Entry) -> None:
        self._over = True


def move(source: Entry, target: Entry) -> None:
    """Let `target` have what is the request's own."""
    target.handler = source.handler
    target.timeout = source.timeout
    target.active_at = source.active_at
    target.bytes_in = source.bytes_in
    target.bytes_out = source.bytes_out
    target.steps = source.steps
    target.ending = target.ending or source.ending
    target.input, source.input = source.input, Input()
    target.output, source.output = source.output, Output()
    source.table.hold(source, 0)
    if not isinstance(target.handler, type):
        target.handler.entry = target
