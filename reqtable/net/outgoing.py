"""Transports of outgoing connections: streams, TLS and UDP. The request of the connection runs the steps."""

from __future__ import annotations

import logging
import socket
from typing import Any, ClassVar

from reqtable.loop.poller import Poller, Selectable, abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.stream import Stream
from reqtable.table.addresses import printable
from reqtable.table.connection import ConnectionRow
from reqtable.table.input import Inbox
from reqtable.table.output import FileSlice
from reqtable.table.states import READ, WRITE, Event, State

log = logging.getLogger("reqtable")

_INPUT_ARRIVED = Event.INPUT_ARRIVED
_NOT_NOW = (BlockingIOError, InterruptedError)


class Outgoing(Stream):
    """Receives and sends for one outgoing connection. `request` is its socket."""

    __slots__ = ()

    entry: ConnectionRow

    def on_ready(self, mask: int) -> None:
        row = self.entry
        if row.transport is not self:
            return  # a thread has taken the connection over
        if mask & WRITE and row.output.first is not None:
            self._send_on()
        if mask & READ and row.state is State.WAITING:
            self._receive()

    def _send_on(self) -> None:
        row, waiting = self.entry, self.steps.waiting
        before = row.bytes_out
        if self.flush():
            waiting.output_taken(row)
        elif row.state is State.WAITING:
            waiting.sides.output_moved(row, row.bytes_out > before)

    def _receive(self) -> None:
        row, steps = self.entry, self.steps
        request = row.parent
        if request is None:
            steps.end(row, Event.RELEASED)  # it was kept for reuse, and its peer has closed it
            return
        assert request.reach is not None
        if request.state is not State.WAITING or not row.wants_input:
            row.wants_input = False
            request.reach.watched_for = None
            steps.waiting.sides.watch_connection(row)  # the request is busy: it will poll again when it waits
            return
        try:
            data = self.request.recv(steps.table.limits.recv_bytes)
        except _NOT_NOW:
            return
        except OSError as error:
            self._unreadable(error)
            return
        row.active_at = steps.table.now
        if data:
            row.bytes_in += len(data)
            if row.input.data or not steps.waiting.give(request, row, data, _INPUT_ARRIVED):
                row.own_input().feed(data)
                steps.waiting.wake(request, _INPUT_ARRIVED)
                steps.waiting.sides.count_input(row)
        else:
            row.own_input().ended = True
            request.reach.watched_for = None
            steps.waiting.wake(request, Event.INPUT_ENDED)

    def release(self) -> None:
        self.watch(0)
        self.request.close()

    def _lost(self, error: OSError) -> None:
        log.debug("%s: connection lost: %s", self.entry.address, printable(error))
        self.steps.waiting.fail(self.entry, error)


class OutgoingDatagrams(Selectable):
    """Receives and sends the datagrams of a connected UDP socket (udp(7)). Each `send` is one datagram."""

    __slots__ = ("entry", "fd", "request", "steps")

    fd: int
    timeout_s: float | None = None
    immovable: ClassVar[str | None] = None

    def __init__(self, steps: Steps, request: Any) -> None:
        super().__init__()
        self.steps = steps
        self.request = request
        self.fd = request.fileno()
        self.entry: ConnectionRow

    @property
    def poller(self) -> Poller:
        return self.steps.poller

    def attach(self, row: ConnectionRow) -> None:
        """Become the transport of `row`."""
        self.entry = row
        row.transport = self
        row.input = Inbox()

    def on_ready(self, mask: int) -> None:
        row, steps = self.entry, self.steps
        if row.transport is not self:
            return
        if mask & WRITE and row.output.first is not None and self.flush():
            steps.waiting.output_taken(row)
        if mask & READ and row.state is State.WAITING:
            if row.parent is None:
                steps.end(row, Event.RELEASED)
            elif row.parent.state is not State.WAITING or not row.wants_input:
                row.wants_input = False
                if row.parent.reach is not None:
                    row.parent.reach.watched_for = None
                steps.waiting.sides.watch_connection(row)
            else:
                self._receive(row)

    def _receive(self, row: ConnectionRow) -> None:
        assert isinstance(row.input, Inbox)
        assert row.parent is not None
        try:
            data = self.request.recv(65_536)
        except _NOT_NOW:
            return
        except OSError as error:
            self._lost(error)
            return
        row.bytes_in += len(data)
        row.active_at = self.steps.table.now
        row.input.deliver(data, self.steps.table.limits.inbox_max)
        self.steps.waiting.wake(row.parent, Event.INPUT_ARRIVED)
        self.steps.waiting.sides.count_input(row)

    def flush(self) -> bool:
        row = self.entry
        output = row.output
        try:
            while output.first is not None:
                piece = output.first
                data = piece.read() if type(piece) is FileSlice else piece
                self.request.send(data)
                row.bytes_out += len(data)
                output.consume(len(data))
        except _NOT_NOW:
            return False
        except OSError as error:
            self._lost(error)
            return False
        return True

    def release(self) -> None:
        self.watch(0)
        self.request.close()

    def abandon(self) -> None:
        self.watched = 0
        abandon_socket(self.request)

    def finish(self) -> None:
        """Do nothing: a connection ends with its request."""

    def shut(self) -> None:
        """Do nothing: a datagram socket has nothing to shut."""

    def on_reset(self) -> None:
        """Do nothing: a datagram socket has no connection to reset."""

    def end_input(self) -> None:
        """Do nothing: datagrams have no end."""

    def leave(self) -> None:
        """Do nothing: a child gets a copy of the socket."""

    def _lost(self, error: OSError) -> None:
        self.steps.waiting.fail(self.entry, error)


def local_address(connection: socket.socket) -> Any:
    """Return the address of our end, or None if the connection has gone."""
    try:
        return connection.getsockname()
    except OSError:
        return None
