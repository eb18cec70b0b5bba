"""A loop with one request, for the thread or the child that has the request.

It is the same loop, so the request finds the same wants, limits and timeouts. What a private loop does not do is end
the connection: the loop that the request came from does, so that nobody's thread has to linger.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable
from functools import cache
from typing import Any

from reqtable.dispatch.policy import Policy
from reqtable.loop.loop import Loop
from reqtable.loop.platform import System
from reqtable.loop.poller import Descriptor
from reqtable.loop.step import Steps
from reqtable.net.datagram import Session, Sessions
from reqtable.net.sockets import is_tls
from reqtable.net.stream import Stream
from reqtable.table.buffers import Inbox, Input, Output
from reqtable.table.parts import Server
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
        self.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.watch(0)


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

    def __init__(self, steps: Steps, request: Any) -> None:
        super().__init__(Sessions(steps, _never), request)
        self.feed: _Feed | None = None

    def watch(self, interest: int) -> None:
        super().watch(interest)
        if self.feed is not None:
            # what is no session leaves them to the parent
            self.feed.watch(READ if interest & READ and self.inbox.is_session else 0)

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.watch(0)


class _Feed(Descriptor):
    """The end of a socket pair by which a child gets the later datagrams of its peer."""

    __slots__ = ("_end", "_session")

    def __init__(self, end: socket.socket, session: _DrivenSession) -> None:
        super().__init__(session.steps.poller, end.fileno())
        self._end = end
        self._session = session

    def on_ready(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            data = take_message(self._end)
            if data is None:
                self.watch(0)  # the parent has gone: no more will come
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


class _PrivateSteps(Steps):
    """Steps the one request of a private loop."""

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None) -> None:
        super().step(entry, cause, error)
        entry.active_at = self.table.clock()  # its step may have waited as long as it liked: threads are there for that


class PrivateLoop:
    """Drives the request of `origin`, which stays in its own table, DELEGATED, meanwhile."""

    def __init__(self, origin: Entry, policy: Policy, request: Any) -> None:
        table = origin.table
        self.steps = steps = _PrivateSteps(table.limits, System(clock=table.clock, selector=_Selector))
        self._loop = Loop(steps)
        steps.on_release.append(self._released)
        steps.table.driver = policy.name
        steps.table.last_id = origin.id - 1  # the request keeps its number
        transport = _kind_for(request)(steps, request)
        self.origin = origin
        self.entry = entry = Entry(steps.table, origin.server, policy, origin.peer, origin.local, transport)
        self.transport = transport
        transport.entry = entry
        entry.created_at = origin.created_at
        entry.calls = origin.calls
        move(origin, entry)
        if isinstance(entry.input, Inbox):
            transport.inbox = entry.input
        entry.resumable = policy.host.resumable(entry, entry.handler, None)
        self._over = False

    def feed(self, end: socket.socket) -> None:
        """Take the later datagrams of the peer from there."""
        self.transport.feed = _Feed(end, self.transport)

    def drive(self) -> None:
        """Run the request to its end. Raises what ends the program, such as Ctrl-C: the request does not outlive it."""
        self.post(self._begin)
        try:
            self._loop.run(lambda: self._over)
        except BaseException:
            self._cancel()
            self.steps.reap()
            raise
        finally:
            self.close_descriptors()

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self._loop.mailbox.post(function, *args)

    def cancel_request(self) -> None:
        """End it. Callable from any thread."""
        self.post(self._cancel)

    def send_back(self) -> None:
        """Give the request's counters and buffers back to the entry it came from."""
        move(self.entry, self.origin)

    def close_descriptors(self) -> None:
        """Close the selector and the wake-up."""
        self._loop.poller.close()

    def _begin(self) -> None:
        if not self._over:  # it was not cancelled before it began
            self.steps.table.add(self.entry)
            self.steps.begin(self.entry)

    def _cancel(self) -> None:
        self.steps.end(self.entry, Event.CANCELLED)

    def _released(self, entry: Entry) -> None:
        self._over = True


def _never(server: Server, request: Any, peer: Any) -> None:
    """What is no session leaves the later datagrams to the loop that it came from."""


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
