"""A loop with one request, for the thread or the child that has the request.

It is the same loop as the engine's, so wants, limits and timeouts work the same. But it does not end the connection.
The loop that the request came from does, so no thread has to linger.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from reqtable.dispatch.policy import Policy
from reqtable.dispatch.progress import AnyProgress
from reqtable.loop.loop import Loop
from reqtable.loop.platform import System
from reqtable.loop.poller import Descriptor
from reqtable.loop.selector import SmallSelector
from reqtable.loop.step import Steps
from reqtable.net.connect import Connector
from reqtable.net.datagram import Session, Sessions
from reqtable.net.sockets import is_tls
from reqtable.net.stream import Stream
from reqtable.table.input import NO_INPUT, Inbox
from reqtable.table.output import Output
from reqtable.table.parts import Server
from reqtable.table.states import READ, Ending, Event, State
from reqtable.table.table import Entry

DATAGRAM_BYTES = 65_536
_MARK = b"+"


class _DrivenEntry(Entry):
    """Holds the request of a private loop, and notes when it began where the row that it came from looks."""

    __slots__ = ("_progress",)

    def __init__(self, progress: AnyProgress | None, *args: Any) -> None:
        self._progress = progress
        super().__init__(*args)

    @property
    def began_at(self) -> float | None:
        return _BEGAN_AT.__get__(self)  # type: ignore[no-any-return]

    @began_at.setter
    def began_at(self, at: float | None) -> None:
        _BEGAN_AT.__set__(self, at)
        if self._progress is not None:
            self._progress.began_at = at


_BEGAN_AT: Any = Entry.__dict__["began_at"]  # the slot that the property stands for


class _DrivenStream(Stream):
    """Reads and writes a connection in a private loop, and leaves ending the connection to the loop it came from."""

    __slots__ = ("is_silent", "lock", "progress")

    may_encrypt = False  # the loop that the request came from ends the connection, and knows its plain socket

    def __init__(self, steps: Steps, request: Any) -> None:
        super().__init__(steps, request)
        self.lock = threading.Lock()  # of the two that follow, and of each send
        self.is_silent = False  # the loop that the request came from answers the client, or has cut it off
        self.progress: AnyProgress | None = None

    def flush(self) -> bool:
        with self.lock:
            if self.is_silent:
                self.entry.output.clear()
                return True
            if self.progress is not None:
                self.progress.is_partial = self.entry.handler._is_partial
            return super().flush()

    def on_ready(self, mask: int) -> None:
        if not self.is_silent:
            super().on_ready(mask)

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.watch(0)


@cache
def _driven_tls() -> type[Stream]:
    from reqtable.net.tls import TLSStream  # only here, because Python may lack ssl

    class DrivenTLSStream(_DrivenStream, TLSStream):
        """Does the same for TLS, but says goodbye (close_notify) itself: if this is a child, the parent can't."""

        __slots__ = ()

        def finish(self) -> None:
            self.request.setblocking(True)
            self.request.end_politely()
            self.request.setblocking(False)
            super().finish()

    return DrivenTLSStream


def _kind_for(request: Any) -> Any:
    """Return the transport class for a request in a private loop."""
    if isinstance(request, tuple):
        return _DrivenSession
    return _driven_tls() if is_tls(request) else _DrivenStream


class _DrivenSession(Session):
    """Takes the datagrams of one peer in a private loop. In a child, the later ones arrive through `feed`."""

    __slots__ = ("feed",)

    def __init__(self, steps: Steps, request: Any) -> None:
        super().__init__(Sessions(steps, _never), request)
        self.feed: _Feed | None = None

    def watch(self, interest: int) -> None:
        super().watch(interest)
        if self.feed is not None:
            # if the request is no session, later datagrams are the parent's
            self.feed.watch(READ if interest & READ and self.inbox.is_session else 0)

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.watch(0)


class _Feed(Descriptor):
    """Receives the later datagrams of a child's peer from one end of a socket pair."""

    __slots__ = ("_end", "_session")

    def __init__(self, end: socket.socket, session: _DrivenSession) -> None:
        super().__init__(session.steps.poller, end.fileno())
        self._end = end
        self._session = session

    def on_ready(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            data = take_message(self._end)
            if data is None:
                self.watch(0)  # the parent has gone, so no more will come
            else:
                self._session.deliver(data)


def send_message(end: socket.socket, data: bytes) -> None:
    """Send a datagram through a socket pair. Raises OSError, which is BlockingIOError if the pair is full.

    A marker byte comes first, to tell an empty datagram from the end of the pair.
    """
    end.send(_MARK + data, socket.MSG_DONTWAIT)


def take_message(end: socket.socket) -> bytes | None:
    """Return the next datagram of a socket pair; None at its end. Raises BlockingIOError if none is waiting."""
    message = end.recv(len(_MARK) + DATAGRAM_BYTES, socket.MSG_DONTWAIT)
    return message[len(_MARK) :] if message else None


class _PrivateSteps(Steps):
    """Steps the one request of a private loop."""

    def take_in(self, entry: Entry, data: bytes) -> None:
        super().take_in(entry, data)
        self._note(entry)

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None, taken: int = 0) -> None:
        super().step(entry, cause, error, taken)
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        entry.active_at = self.table.clock()  # a step may block here, and that does not count as idle
        progress = getattr(entry.transport, "progress", None)
        if progress is not None:
            progress.has_connections = entry.reach is not None and bool(entry.reach.connections)


class PrivateLoop:
    """Drives the request of `origin`. Meanwhile `origin` stays in its own table, as DELEGATED.

    `progress` is what that table shall know of the request; None: nothing.
    """

    def __init__(self, origin: Entry, policy: Policy, request: Any, progress: AnyProgress | None) -> None:
        table = origin.table
        self.steps = steps = _PrivateSteps(table.limits, System(clock=table.clock, selector=SmallSelector))
        self._loop = Loop(steps)
        steps.on_release.append(self._released)
        self._connector = Connector(steps)
        steps.table.driving_policy = policy.name
        steps.table.last_id = origin.id - 1  # the request keeps its id
        transport = _kind_for(request)(steps, request)
        self.origin = origin
        self.entry = entry = _DrivenEntry(
            progress, steps.table, origin.server, policy, origin.peer, origin.local, transport
        )
        self.transport = transport
        if isinstance(transport, _DrivenStream):
            transport.progress = progress
        transport.entry = entry
        entry.created_at, entry.began_at = origin.created_at, origin.began_at
        entry.call_number = origin.call_number
        move(origin, entry)
        if isinstance(entry.input, Inbox):
            transport.inbox = entry.input
        entry.resumable = policy.host.resumable(entry, entry.handler, None)
        self._connector.adopt(origin, entry)
        self._over = False

    def feed(self, end: socket.socket) -> None:
        """Take the later datagrams of the peer from `end`, one end of a socket pair."""
        self.transport.feed = _Feed(end, self.transport)

    def drive(self) -> None:
        """Run the request to its end. Raises what ends the program, such as Ctrl-C; the request ends first."""
        self.post(self._begin)
        try:
            self._loop.run(lambda: self._over)
        except BaseException:
            self._cancel()
            self.steps.reap()
            raise
        finally:
            self._connector.close()
            self.steps.reap()
            self.close_descriptors()

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self._loop.mailbox.post(function, *args)

    def end_early(self, ending: Ending | None) -> None:
        """End the request as soon as its step has returned. Callable from any thread."""
        self.post(self._end_early, ending)

    def silence(self) -> bytes:
        """Keep the request from sending anything more, and end it soon. Returns the last words to send in its place.

        If there are none, do nothing. For another thread.
        """
        transport, progress = self.transport, self.entry._progress
        assert isinstance(transport, _DrivenStream)
        assert progress is not None
        with transport.lock:
            # Two threads must not use OpenSSL for one connection. While a step runs, its thread does not.
            may_use_it = is_tls(transport.request) and self.steps.table.running is not self.entry
            if may_use_it or progress.is_partial or transport.is_silent:
                return b""
            words: bytes = self.entry.handler._apology(progress.has_connections)
            transport.is_silent = bool(words)
        if words:
            self.post(self._cancel)
        return words

    def break_off(self) -> None:
        """Cut the client off, and end the request soon. For another thread."""
        transport = self.transport
        if isinstance(transport, _DrivenStream):
            with transport.lock:
                transport.is_silent = True
            with contextlib.suppress(OSError):  # the connection has ended already
                # not the method of a TLS socket, which its thread may be using
                socket.socket.shutdown(transport.request, socket.SHUT_RDWR)
        self.post(self._cancel)

    def send_back(self) -> None:
        """Move the handler, the counters and the buffers back to the entry they came from."""
        move(self.entry, self.origin)
        home = self.origin.table.owner
        assert isinstance(home, Steps)
        home.waiting.starter.adopt(self.entry, self.origin)

    def close_descriptors(self) -> None:
        """Close the selector and the wake-up."""
        self._loop.poller.close()

    def abandon(self) -> None:
        """In a forked child: close this process's copies of the descriptors."""
        self.close_descriptors()
        for row in self.steps.table.connections.values():
            row.transport.abandon()

    def _begin(self) -> None:
        if not self._over and self.entry.state is not State.CLOSED:  # it was not cancelled before it began
            self.steps.table.add(self.entry)
            self.steps.begin(self.entry)

    def _end_early(self, ending: Ending | None) -> None:
        self.entry.ending = self.entry.ending or ending
        self.steps.end_early(self.entry, Event.CANCELLED)

    def _cancel(self) -> None:
        self.steps.end(self.entry, Event.CANCELLED)

    def _released(self, entry: Entry) -> None:
        self._over = True


def _never(server: Server, request: Any, peer: Any) -> None:
    """Do nothing: datagrams that belong to no session stay with the loop that the request came from."""


def move(source: Entry, target: Entry) -> None:
    """Move what belongs to the request itself from the entry `source` to the entry `target`."""
    target.handler = source.handler
    target.timeout = source.timeout
    target.active_at = source.active_at
    target.bytes_in = source.bytes_in
    target.bytes_out = source.bytes_out
    target.steps = source.steps
    target.ending = target.ending or source.ending
    target.input, source.input = source.input, NO_INPUT
    target.output, source.output = source.output, Output()
    source.table.hold(source, 0)
    if not isinstance(target.handler, type):
        target.handler.entry = target
