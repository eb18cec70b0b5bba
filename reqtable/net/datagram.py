"""Datagram transports (UDP, Unix datagram): sessions over the one socket of a server.

A datagram makes an entry. It is the whole input of that entry, like a stream that ends after it. When the handler takes
a `datagram()`, the entry becomes a *session* between two addresses: the peer's, and the local one that the datagram was
sent to. Later datagrams between the two go to the session until it ends; a bounded number of them wait in its inbox.

Datagrams that arrive before the handler has read anything wait too. If the entry ends without becoming a session, each
of them begins a request of its own. Each `send` is one datagram. A peer without an address can't be answered, nor told
apart from others, and has no session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from reqtable.loop.step import Steps
from reqtable.net.pktinfo import Datagram, later, send
from reqtable.net.sockets import is_peers_error
from reqtable.table.addresses import address_text, printable
from reqtable.table.input import Inbox
from reqtable.table.output import FileSlice
from reqtable.table.parts import Server
from reqtable.table.states import WRITE, Ending, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")


class Sessions:
    """Finds the session that a datagram belongs to, among those of one engine.

    An entry whose handler has not read anything counts as a session: it may become one. `take_again(server, request,
    peer)` begins a request with a datagram that has waited in such an entry in vain.
    """

    def __init__(self, steps: Steps, take_again: Callable[[Server, Any, Any], None]) -> None:
        self.steps = steps
        self.take_again = take_again
        self.known: dict[tuple[Server, Any, Any], Session] = {}

    def __len__(self) -> int:
        return len(self.known)

    def find(self, server: Server, request: Any, peer: Any) -> Session | None:
        """Return the session that a datagram belongs to; None if the datagram begins a request."""
        session = self.known.get(_key(server, request, peer)) if peer else None
        if session is None or session.entry.state is State.CLOSED:
            return None
        return session if session.inbox.is_session or not session.inbox.was_read else None

    def add(self, session: Session) -> None:
        """Send later datagrams of its peer to `session`."""
        entry = session.entry
        self.known[_key(entry.server, session.request, entry.peer)] = session

    def discard(self, session: Session) -> None:
        """Forget `session`, which has ended."""
        entry = session.entry
        key = _key(entry.server, session.request, entry.peer)
        if self.known.get(key) is session:
            del self.known[key]


def _key(server: Server, request: Any, peer: Any) -> tuple[Server, Any, Any]:
    """Return the key of a session. The local address is part of it: one socket of a peer may send to several."""
    return server, peer, request.local if type(request) is Datagram else None


class Session:
    """Receives the datagrams of one peer, and sends it answers. `request` is `socketserver`'s pair `(data, socket)`."""

    __slots__ = ("entry", "forward", "inbox", "request", "sessions", "steps", "timeout_s")

    immovable: ClassVar[str | None] = None

    def __init__(self, sessions: Sessions, request: Any) -> None:
        self.sessions = sessions
        self.steps = sessions.steps
        self.request = request
        self.timeout_s: float | None = self.steps.table.limits.session_timeout_s
        self.inbox = Inbox()
        self.entry: Entry
        self.forward: Callable[[bytes], None] | None = None  # to the thread or the child that has the request

    def attach(self, entry: Entry) -> None:
        """Become the transport of `entry`, and put the first datagram into its inbox."""
        self.resume(entry)
        self.inbox.has_peer = bool(entry.peer)
        data = self.request[0]
        entry.bytes_in = len(data)
        self.inbox.deliver(data, self.steps.table.limits.inbox_max)

    def resume(self, entry: Entry) -> None:
        """Become the transport of `entry`, whose datagrams another process has received."""
        self.entry = entry
        entry.input = self.inbox
        if entry.peer:
            self.sessions.add(self)

    def deliver(self, data: bytes) -> None:
        """Take a later datagram of this peer."""
        if self.forward is not None:
            self.forward(data)
            return
        entry = self.entry
        entry.bytes_in += len(data)
        entry.active_at = self.steps.table.now
        self.inbox.deliver(data, self.steps.table.limits.inbox_max)
        if entry.state is State.READING:
            self.steps.step(entry, Event.INPUT_ARRIVED)
        elif entry.state is State.WAITING:
            self.steps.waiting.wake(entry, Event.INPUT_ARRIVED)
        else:
            self.steps.count_buffers(entry)

    def watch(self, interest: int) -> None:
        # The server's listener reads the socket and delivers. Sending is retried in each pass, not polled for: a Unix
        # datagram socket polls as writable even while this peer's queue is full.
        if interest & WRITE:
            self.steps.mailbox.call_later(self._flush_on)

    def _flush_on(self) -> None:
        try:
            self._go_on_sending()
        except BaseException as problem:
            self.steps.failures.outside_step(self.entry, problem)

    def _go_on_sending(self) -> None:
        if self.entry.state is State.WAITING:
            self._send_while_waiting()
        if self.entry.state is not State.WRITING:
            return
        before = self.entry.bytes_out
        if self.flush():
            self.steps.output_taken(self.entry)
        elif self.entry.state is State.WRITING:
            if self.entry.bytes_out > before:
                self.steps.output_moved(self.entry)
            self.steps.mailbox.call_later(self._flush_on)

    def _send_while_waiting(self) -> None:
        entry = self.entry
        before = entry.bytes_out
        if entry.output.first is None:
            return
        if self.flush():
            self.steps.waiting.output_taken(entry)
        elif entry.state is State.WAITING:
            self.steps.waiting.sides.output_moved(entry, entry.bytes_out > before)
            self.steps.mailbox.call_later(self._flush_on)

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
        """Keep the socket, which is the server's: the parent goes on receiving for the child."""

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        entry = self.entry
        self.sessions.discard(self)
        if self.inbox.dropped:
            log.info(
                "%s: %d datagrams dropped: no more than inbox_max = %d may wait",
                address_text(entry.peer),
                self.inbox.dropped,
                self.steps.table.limits.inbox_max,
            )
        entry.server.close_request(self.request)
        if not self.inbox.is_session and entry.ending is not Ending.MOVED:
            own = 0 if self.inbox.was_read else 1  # the first datagram, though unread, belongs to this request
            others = self.inbox.unopened()[own:]
            entry.bytes_in -= sum(map(len, others))  # they count for the requests that they begin
            self.readmit(others)

    def readmit(self, datagrams: list[bytes]) -> None:
        """Have each datagram begin a request of its own: this entry did not become a session."""
        server = self.entry.server
        for data in datagrams:
            if server.fileno() >= 0:
                self.steps.post(self.sessions.take_again, server, later(self.request, data), self.entry.peer)

    def abandon(self) -> None:
        """Keep the socket: it is the server's."""

    def on_reset(self) -> None:
        """Do nothing: there is no connection."""

    def end_input(self) -> None:
        """End the session: it gets no more datagrams."""
        self.entry.ending = Ending.DRAINED
        self.steps.end(self.entry, Event.CANCELLED)

    def shut(self) -> None:
        """Do nothing: there is no connection."""
