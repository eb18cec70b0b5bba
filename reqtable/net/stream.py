"""Stream transports (TCP, Unix): the engine does the I/O of a resumable handler."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from typing import Any, ClassVar, Final

from reqtable.loop.poller import Poller, Selectable, abandon_socket
from reqtable.loop.step import Steps
from reqtable.net.hang_up import on_hang_up
from reqtable.net.sockets import INTERNET, discarded_all, end_request, has_unread, is_peers_error
from reqtable.table.addresses import address_text, printable
from reqtable.table.output import END, SMALL_BYTES, FileSlice
from reqtable.table.states import PEER_END, READ, RESET, WRITE, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

_NOT_NOW: Final = (BlockingIOError, InterruptedError)
# Names, as in the loop: looking up an Enum member takes 100 ns.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_WAITING: Final = State.WAITING
_LINGERING: Final = State.LINGERING
_CLOSED: Final = State.CLOSED
_INPUT_ARRIVED: Final = Event.INPUT_ARRIVED
_INPUT_ENDED: Final = Event.INPUT_ENDED


def send_at_once(connection: socket.socket) -> None:
    """Set TCP_NODELAY (tcp(7)): a second small segment leaves before the first is acknowledged.

    Else an answer sent in two pieces would wait 40 ms for the peer's delayed acknowledgement.
    """
    if connection.family in INTERNET:
        with contextlib.suppress(OSError):  # the peer may be gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Stream(Selectable):
    """Receives and sends for one connection. `request` is its socket, which is non-blocking from now on."""

    __slots__ = ("entry", "request", "steps")

    timeout_s: float | None = None
    immovable: ClassVar[str | None] = None
    may_encrypt: ClassVar[bool] = True  # whether start_tls() may replace this transport

    def __init__(self, steps: Steps, request: Any) -> None:
        self.watched = 0
        self.steps = steps
        request.setblocking(False)
        send_at_once(request)  # the output of a step is joined and leaves at once
        self.request = request
        self.entry: Entry

    @property
    def fd(self) -> int:
        """The socket's descriptor. A copy of it here would cost 48 bytes per connection."""
        return self.request.fileno()  # type: ignore[no-any-return]

    @property
    def poller(self) -> Poller:
        return self.steps.poller

    def give_to_tls(self) -> None:
        """Leave the socket to a TLS handshake."""
        self.watch(0)

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        if entry.state is not _READING:
            self._while_not_reading(mask)
            return
        steps = self.steps
        try:
            data = self.request.recv(steps.table.limits.recv_bytes)
        except _NOT_NOW:
            return
        except OSError as error:
            self._unreadable(error)
            return
        if data:
            steps.take_in(entry, data)
        else:
            self._take_end()

    def _take_end(self) -> None:
        """Give a READING request the end of its input."""
        entry, steps = self.entry, self.steps
        entry.active_at = steps.table.now
        entry.own_input().ended = True
        steps.step(entry, _INPUT_ENDED)

    def _while_not_reading(self, mask: int) -> None:
        """Go on with the connection of a request that waits for something else than its peer's next item."""
        state = self.entry.state
        if state is _WRITING:
            self._flush_on()
        elif state is _WAITING:
            self._while_waiting(mask)
        elif state is _LINGERING:
            if discarded_all(self.request, self.steps.table.limits.recv_bytes):
                self.steps.end(self.entry, _INPUT_ENDED)
        elif state is not _CLOSED:
            on_hang_up(self, self.request, mask)

    def _while_waiting(self, mask: int) -> None:
        """Go on with the connection of a WAITING request, which may be polled for several things at once."""
        entry, steps = self.entry, self.steps
        reach = entry.reach
        assert reach is not None
        asked = self.watched
        if asked == RESET or (mask & RESET and not asked & (READ | WRITE)):
            on_hang_up(self, self.request, mask)
            return
        if mask & WRITE and entry.output.first is not None:
            before = entry.bytes_out
            if self.flush():
                steps.waiting.output_taken(entry)
            elif entry.state is _WAITING:
                steps.waiting.sides.output_moved(entry, entry.bytes_out > before)
        if mask & PEER_END and self.watched & PEER_END and not reach.peer_ended:
            reach.peer_ended = True
            reach.watched_for = None
            steps.waiting.wake(entry, _INPUT_ENDED)
        if mask & READ and self.watched & READ and entry.state is _WAITING:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self.request.recv(self.steps.table.limits.recv_bytes)
        except _NOT_NOW:
            return
        except OSError as error:
            self._unreadable(error)
            return
        self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        """Give what was received to a WAITING request; b"" is the end of its input."""
        entry, steps = self.entry, self.steps
        if data:
            entry.bytes_in += len(data)
            if entry.input.data or not steps.waiting.give(entry, None, data, _INPUT_ARRIVED):
                entry.own_input().feed(data)
                steps.waiting.wake(entry, _INPUT_ARRIVED)
        else:
            entry.own_input().ended = True
            if entry.reach is not None:
                entry.reach.watched_for = None
            steps.waiting.wake(entry, _INPUT_ENDED)

    def _flush_on(self) -> None:
        before = self.entry.bytes_out
        self.entry.active_at = self.steps.table.now
        if self.flush():
            self.steps.output_taken(self.entry)
        elif self.entry.bytes_out > before:
            self.steps.output_moved(self.entry)

    def flush(self) -> bool:
        entry = self.entry
        output = entry.output
        piece = output.first
        try:
            if type(piece) is bytes and output.more is None and len(piece) < SMALL_BYTES:  # fast path of _flush_much
                sent = self.request.send(piece)
                entry.bytes_out += sent
                if sent == output.size:  # the size may have grown meanwhile
                    output.first = None
                    output.size = output.held = 0
                    return True
                output.consume(sent)
            return self._flush_much()
        except _NOT_NOW:
            return False
        except OSError as error:
            self._unwritable(error)
            return False

    def _flush_much(self) -> bool:
        """Send output within the request's share of the pass; up to SMALL_BYTES may leave without a share."""
        output = self.entry.output
        share = self.steps.send_share
        if not share:
            if output.size > SMALL_BYTES:
                return False
            share = SMALL_BYTES
        while output.size:
            if share <= 0:
                return False
            piece = output.front()
            if type(piece) is FileSlice:
                sent = self._send_file(piece, share)
            elif piece is END:
                self._end_output()
                sent = 0
                output.consume(1)
            else:
                sent = self.request.send(piece if len(piece) <= share else memoryview(piece)[:share])
            self.entry.bytes_out += sent
            if sent >= SMALL_BYTES:
                self.steps.spend(sent)
            if sent:
                output.consume(sent)
            share -= sent
        return True

    def _end_output(self) -> None:
        """Have the peer see end of file. Raises BlockingIOError if that must wait."""
        try:
            self.request.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from None  # it was reset

    def _send_file(self, piece: FileSlice, most: int) -> int:
        """Send part of a file. Raises SendFileError if the file fails, OSError if the connection does.

        An error of sendfile(2) may be the fault of either; a read and a send show whose it is.
        """
        source = piece.descriptor()
        if source >= 0:
            try:
                sent = self.steps.system.sendfile(self.fd, source, piece.offset, min(piece.remaining, most))
            except _NOT_NOW:
                raise
            except Exception:
                piece.kernel_refuses = True
            else:
                if not sent:
                    raise piece.ended()
                return sent
        return int(self.request.send(piece.read(most)))

    def finish(self) -> None:
        """Shut the write side, then linger unless the peer has ended too: closing at once could cut the answer off."""
        try:
            self.request.shutdown(socket.SHUT_WR)
        except OSError:
            # The connection is gone. Without an error of its own, both sides had ended it: the handler by end_output().
            was_broken = self.request.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.steps.end(self.entry, Event.LOST if was_broken else Event.RELEASED)
            return
        if self.entry.input.ended:
            self.steps.end(self.entry, Event.RELEASED)
        else:
            self.steps.linger(self.entry)

    def on_reset(self) -> None:
        log.debug("%s: connection reset", address_text(self.entry.peer))
        self.steps.end(self.entry, Event.LOST)

    def end_input(self) -> None:
        """End the input that the handler sees, unless the socket has unread bytes."""
        if not has_unread(self.request, self.steps.system.socket):
            self.entry.own_input().ended = True
            self.steps.step(self.entry, _INPUT_ENDED)

    def release(self) -> None:
        self.watch(0)
        end_request(self.entry.server.close_request, self.request)

    def leave(self) -> None:
        """Keep the socket open: a child process has the connection."""

    def shut(self) -> None:
        """Shut the connection for every process that has it."""
        with contextlib.suppress(OSError):  # the connection has ended already
            self.request.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        self.watched = 0
        abandon_socket(self.request)

    def _unreadable(self, error: OSError) -> None:
        self._lost(error)

    def _unwritable(self, error: OSError) -> None:
        self._lost(error)

    def _lost(self, error: OSError) -> None:
        """End the request: the connection is lost. Raises `error` if the peer did not cause it."""
        if not is_peers_error(error):
            raise error
        log.debug("%s: connection lost: %s", address_text(self.entry.peer), printable(error))
        self.steps.end(self.entry, Event.LOST)
