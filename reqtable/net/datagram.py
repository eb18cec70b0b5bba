"""Datagram transports (UDP, Unix datagram): sessions over the one socket of a server.

A datagram makes an entry, and is its whole input, as if of a stream that ends with it. Once a handler has taken a
`datagram()`, its entry is the *session* of that peer's address with the address that it asked: later datagrams from the
one to the other go to it, a bounded number of them waiting, until it ends. Those that come before the handler has read
anything wait too: if it is no session, they begin requests of their own when it has ended. Each `send` is one datagram.
A peer without an address can be neither answered nor told from others, and has no session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from reqtable.loop.step import Steps
from reqtable.net.pktinfo import Datagram, later, send
from reqtable.net.sockets import is_peers_error
from reqtable.table.addresses import address_text, printable
from reqtable.table.buffers import FileSlice, Inbox
from reqtable.table.parts import Server
from reqtable.table.states import WRITE, Ending, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")


class Sessions:
    """The sessions of one engine, and what may yet become one.

    `take_again(server, request, peer)` takes a datagram that has waited for a session and belongs to none.
    """

    def __init__(self, steps: Steps, take_again: Callable[[Server, Any, Any], None]) -> None:
        self.steps = steps
        self.take_again = take_again
        self.known: dict[tuple[Server, Any, Any], Session] = {}

    def __len__(self) -> int:
        return len(self.known)

    def find(self, server: Server, request: Any, peer: Any) -> Session | None:
        """The session that a datagram is for, or what may yet become it; None where the datagram begins a request."""
        session = self.known.get(_key(server, request, peer)) if peer else None
        if session is None or session.entry.state is State.CLOSED:
            return None
        return session if session.inbox.is_session or not session.inbox.asked else None

    def add(self, session: Session) -> None:
        """Later datagrams of that peer go to `session`."""
        entry = session.entry
        self.known[_key(entry.server, session.request, entry.peer)] = session

    def discard(self, session: Session) -> None:
        """`session` has ended."""
        entry = session.entry
        key = _key(entry.server, session.request, entry.peer)
        if self.known.get(key) is session:
            del self.known[key]


def _key(server: Server, request: Any, peer: Any) -> tuple[Server, Any, Any]:
    """What tells one session from another: a peer may ask several addresses of this machine from one socket."""
    return server, peer, request.local if type(request) is Datagram else None


class Session:
    """What the datagrams of one peer go to. `request` is the pair `(data, socket)` of `socketserver`."""

    __slots__ = ("entry", "forward", "inbox", "request", "sessions", "steps", "timeout_s")

    def __init__(self, sessions: Sessions, request: Any) -> None:
        self.sessions = sessions
        self.steps = sessions.steps
        self.request = request
        self.timeout_s: float | None = self.steps.table.limits.session_timeout_s
        self.inbox = Inbox()
        self.entry: Entry
        self.forward: Callable[[bytes], None] | None = None  # to whoever has the request now

    def attach(self, entry: Entry) -> None:
        """Be the transport of `entry`, and give it its first datagram."""
        self.entry = entry
        entry.input = self.inbox
        self.inbox.has_peer = bool(entry.peer)
        data = self.request[0]
        entry.bytes_in = len(data)
        self.inbox.deliver(data, self.steps.table.limits.inbox_max)
        if entry.peer:
            self.sessions.add(self)

    def deliver(self, data: bytes) -> None:
        """A later datagram of this peer."""
        if self.forward is not None:
            self.forward(data)
            return
        entry = self.entry
        entry.bytes_in += len(data)
        entry.active_at = self.steps.table.now
        self.inbox.deliver(data, self.steps.table.limits.inbox_max)
        if entry.state is State.READING:
            self.steps.step(entry, Event.INPUT_ARRIVED)
        else:
            self.steps.count_buffers(entry)

    def watch(self, interest: int) -> None:
        # Reading is the server's: its listener delivers. Writing is retried, not polled for: a Unix datagram socket
        # polls as writable while the queue of the one peer that matters is full.
        if interest & WRITE:
            self.steps.mailbox.call_later(self._drain)

    def _drain(self) -> None:
        try:
            self._go_on_sending()
        except BaseException as problem:
            self.steps.failures.outside_step(self.entry, problem)

    def _go_on_sending(self) -> None:
        if self.entry.state is not State.WRITING:
            return
        before = self.entry.bytes_out
        if self.flush():
            self.steps.output_taken(self.entry)
        elif self.entry.state is State.WRITING:
            if self.entry.bytes_out > before:
                self.steps.output_moved(self.entry)
            self.steps.mailbox.call_later(self._drain)

    def flush(self) -> bool:
        entry = self.entry
        output = entry.output
        while output.first is not None:
            piece = output.first
            data = piece.read() if type(piece) is FileSlice else piece
            try:
                if entry.peer:
                    send(self.request, data, entry.peer)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if not is_peers_error(error):
                    raise
                log.info("%s: a datagram was not sent: %s", address_text(entry.peer), printable(error))
                self.steps.end(entry, Event.LOST)
                return False
            entry.bytes_out += len(data)
            output.consume(len(data))
        return True

    def leave(self) -> None:
        """A child process has the request, until it has ended."""

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        entry = self.entry
        self.sessions.discard(self)
        if self.inbox.dropped:
            log.info(
                "%s: %d datagrams dropped: %d waited",
                address_text(entry.peer),
                self.inbox.dropped,
                self.steps.table.limits.inbox_max,
            )
        entry.server.close_request(self.request)
        if not self.inbox.is_session:
            own = 0 if self.inbox.asked else 1  # its own datagram is not another request's, though it was never read
            others = self.inbox.unopened()[own:]
            entry.bytes_in -= sum(map(len, others))  # each counts for the request that it begins
            self.readmit(others)

    def readmit(self, datagrams: list[bytes]) -> None:
        """Datagrams that waited for what has turned out to be no session begin requests of their own."""
        server = self.entry.server
        for data in datagrams:
            if server.fileno() >= 0:
                self.steps.post(self.sessions.take_again, server, later(self.request, data), self.entry.peer)

    def abandon(self) -> None:
        """The socket is the server's."""

    def end_input(self) -> None:
        """No more datagrams come: the session is over."""
        self.entry.ending = Ending.DRAINED
        self.steps.end(self.entry, Event.CANCELLED)

    def shut(self) -> None:
        """There is no connection."""
