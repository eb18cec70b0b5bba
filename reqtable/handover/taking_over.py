"""How a successor continues the requests of a worker that has died.

It has the journal of the dead worker and the sockets that the dead worker had open. For each row, the journal's last
whole record and the kernel's totals of the connection give what is unread and what is unsent. The row enters the
successor's table with its old id, and its want is asked again.

All of it can be done again: if the successor dies on the way, the next one finds the same journal.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reqtable.handlers.state import StateRequestHandler
from reqtable.handover.journal import DONE, IDLE, IN_DOUBT, INPUT_COUNT, OPEN, Found, Journal, Page, Slot
from reqtable.handover.journalled import JournalledStream, Kind, stream_for
from reqtable.handover.packed import Origin, Progress, unpack
from reqtable.handover.totals import Totals, cookie_of, has_totals, is_stream, totals
from reqtable.loop.freezing import Freezer
from reqtable.server.engine import Engine
from reqtable.server.hosted import Hosted
from reqtable.table.addresses import address_text
from reqtable.table.engine_wants import ENDED
from reqtable.table.errors import ReqtableError
from reqtable.table.record import restore_input, restore_reach
from reqtable.table.snapshot import handler_name, unwrapped
from reqtable.table.states import Ending, Event
from reqtable.table.table import Entry
from reqtable.table.words import counted

log = logging.getLogger("reqtable")


class Disagreement(ReqtableError):
    """The journal and the kernel's totals of a connection do not go together."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Is what is left to do for a connection: input that no step has read, and output that the kernel does not have."""

    received: int
    sent: int
    unread: bytes
    unsent: Sequence[bytes]
    ends_output: bool


def rest_of(found: Found, progress: Progress, page: Page | None, now: Totals) -> Rest:
    """Return what is left, from the last record of a row, the page if it is that row's, and the totals of the kernel.

    Raises Disagreement if these can't be of one connection.
    """
    if page is not None:
        received, sent = now.received - page.received, now.sent - page.sent
        if not 0 <= received <= len(page.input) or not 0 <= sent <= len(page.output):
            raise Disagreement(f"{received} bytes were received and {sent} sent since its page was opened")
        if page.phase == DONE:
            return Rest(*now, b"", [page.output[sent:]] if sent < len(page.output) else [], False)
        unsent = _unsent(progress.unsent, now.sent - found.sent)
        return Rest(*now, progress.unread + page.input[:received], unsent, progress.ends_output and bool(unsent))
    received, sent = now.received - found.received, now.sent - found.sent
    is_other = not progress.is_simple and (received > 0 or sent > sum(map(len, progress.unsent)))
    if progress.want is not ENDED and (received < 0 or sent < 0 or is_other):  # at its end, input is discarded
        raise Disagreement(f"{received} bytes were received and {sent} sent since its record was written")
    return Rest(*now, progress.unread, _unsent(progress.unsent, sent), progress.ends_output)


def _unsent(pieces: Sequence[bytes], sent: int) -> list[bytes]:
    """Return what is left of `pieces` when the first `sent` bytes of them are sent."""
    left = []
    for piece in pieces:
        if sent < len(piece):
            left.append(piece[max(0, sent) :])
        sent -= len(piece)
    return left


@dataclass
class Result:
    """Counts what has become of the requests of a dead worker."""

    continued: int = 0
    begun: int = 0  # connections that were accepted, and whose request had not begun
    lost: Counter[str] = field(default_factory=Counter)  # not continued, by the reason

    def __str__(self) -> str:
        return counted(self.continued + self.begun, "request")

    @property
    def loss(self) -> str:
        """How many requests are not continued, and why; "" if there is none."""
        count = sum(self.lost.values())
        reasons = ", ".join(f"{n} {why}" for why, n in self.lost.most_common())
        return f"; {count} not continued ({reasons})" if count else ""


class TakingOver:
    """Continues the requests of one dead worker in `engine`: first `restore`, then, in the loop, `go_on`."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        sockets: Iterable[socket.socket],
        attempts_max: int,
        on_done: Callable[[Result], None],
    ) -> None:
        self._engine = engine
        self._steps = engine.steps
        self._freezer = Freezer(engine.steps)
        self._journal = journal
        self._sockets = {cookie_of(each): each for each in sockets}
        self._attempts_max = attempts_max
        self._on_done = on_done
        self._kinds: list[Kind | None] = []  # by the index of the server
        self._others: list[Entry] = []
        self._interrupted: list[Entry] = []
        self.result = Result()

    def restore(self) -> None:
        """Put the rows that can be continued into the table, MOVING, and close the other connections.

        Call this before the loop runs: a new request would overwrite the page of the journal.
        """
        journal, table = self._journal, self._steps.table
        table.now = table.clock()  # its last pass, in the supervisor before the fork, may be long ago
        self._kinds = [kind_of(server) for server in self._engine.servers]
        page, running = journal.page(), journal.running
        for slot, found in sorted(journal.read(), key=lambda each: each[0].id):
            connection = self._sockets.pop(slot.cookie, None)
            if connection is None:
                journal.free(slot)  # it was closed
                continue
            own_page = page if page.row == slot.id and page.phase != IDLE and page.opened_at >= found.commit else None
            try:
                packed_origin, origin, progress = unpack(found.payload)
                if progress.lost:
                    raise _Lost(progress.lost)
                is_cut_off = slot.id == running or (own_page is not None and own_page.phase == OPEN)
                progress.attempt += is_cut_off
                rest = rest_of(found, progress, own_page, self._totals(connection, slot, found, own_page))
                entry = self._row(slot, origin, progress, rest, connection)
                _stream_of(entry).origin = packed_origin
            except Exception as problem:  # also of a handler's constructor
                self._drop(slot, connection, problem)
                continue
            (self._interrupted if own_page is not None or is_cut_off else self._others).append(entry)
        self._note_interrupted()

    def go_on(self) -> None:
        """In the loop: continue the rows, and begin the requests of connections that have none."""
        for entry in self._others:
            self._continue(entry)
        self._begin_rest()
        self._engine.post(self._continue_interrupted)

    def _continue_interrupted(self) -> None:
        """Continue the rows whose steps were cut off, last: what they have been through may happen again."""
        for entry in self._interrupted:
            self._continue(entry)
        self._on_done(self.result)

    def _totals(self, connection: socket.socket, slot: Slot, found: Found, page: Page | None) -> Totals:
        """Return the kernel's totals of a connection, or what the journal knows in their place."""
        if has_totals(connection):
            now = totals(connection)
            connection.getpeername()  # raises OSError if it is over: then the totals may lack an end of file
            return now
        numbers = self._journal.numbers
        received = 0 if page is None else numbers[INPUT_COUNT] - 1
        if numbers[IN_DOUBT] == slot.id or received < 0:
            raise _Lost("by a Unix socket in doubt")
        return Totals(found.received + received, found.reached)

    def _row(self, slot: Slot, origin: Origin, progress: Progress, rest: Rest, connection: socket.socket) -> Entry:
        """Make the row of a request."""
        server = self._engine.servers[origin.server]
        table = self._steps.table
        kind = self._kinds[origin.server]
        if kind is None:
            raise _Lost("handlers that are no state machine")
        policy = server._policies.chosen
        transport = stream_for(self._steps, connection, self._journal, kind)
        transport.slot = slot
        transport.received_before, transport.sent_before = origin.received_before, origin.sent_before
        entry = Entry(table, server, policy, origin.peer, origin.local, transport)
        transport.entry = entry
        policy.attach(entry)
        handler = entry.handler
        fields = progress.fields
        if not isinstance(fields, dict):
            fields = dict(zip(kind.names, fields, strict=True))
        handler._restore((progress.state, fields, progress.told_of_end), progress.made_at)
        entry.want = handler._state.want if progress.want is None else progress.want
        entry.timeout = progress.timeout
        restore_input(entry, {"data": rest.unread, "ended": progress.ended, **(progress.input or {})})
        for piece in rest.unsent:
            entry.output.append(piece)
        if rest.ends_output:
            entry.output.append_end()
        if progress.reach is not None:
            restore_reach(entry, progress.reach, 0.0)
        entry.bytes_in = rest.received - origin.received_before
        entry.bytes_out = rest.sent - origin.sent_before
        entry.steps, entry.created_at, entry.began_at = progress.steps, origin.created_at, progress.began_at
        transport.attempt = progress.attempt
        table.add(entry, slot.id)
        table.moves[entry] = progress.moves + 1
        server._counts.policies[policy.name].accepted += 1
        policy.admitted()
        table.hold(entry, len(entry.input) + entry.output.held)
        entry.advance(Event.FROZEN)
        return entry

    def _note_interrupted(self) -> None:
        """Write what the page said into the records of its row and of the row whose step ran, in one commit."""
        for entry in self._interrupted:
            _stream_of(entry).write()
        self._journal.commit()
        self._journal.run(0)  # the page is over

    def _continue(self, entry: Entry) -> None:
        """Have the want of a row asked again. End the row if its step has been cut off by too many crashes."""
        attempt = _stream_of(entry).attempt
        if attempt <= self._attempts_max:
            self.result.continued += 1
            self._engine.taken_over += 1
            self._freezer.thaw(entry)
            return
        log.error(
            "%s: %s ended in state %s: %d crashes have cut its step off",
            address_text(entry.peer),
            handler_name(entry.handler),
            entry.handler.state_name,
            attempt,
        )
        self.result.lost["that crashed too often"] += 1
        entry.ending = Ending.ERROR
        self._steps.end(entry, Event.LOST)

    def _drop(self, slot: Slot, connection: socket.socket, problem: Exception) -> None:
        """Close a connection whose request can't be continued."""
        if isinstance(problem, _Lost):
            self.result.lost[str(problem)] += 1
        elif not _is_over(connection):
            self.result.lost["whose record can't be used"] += 1
            log.error("request %d can't be continued: %r", slot.id, problem)
        connection.close()
        self._journal.free(slot)

    # -- connections without a record ---------------------------------------------------------------------------------

    def _begin_rest(self) -> None:
        """Begin the requests of connections that were accepted, and of which nothing was read. Close the others."""
        for connection in self._sockets.values():
            server = self._server_of(connection)
            if server is None:
                connection.close()  # of the dead worker itself: a pair, or a connection to another service
            elif self._kinds[self._engine.servers.index(server)] is not None and _is_untouched(connection):
                self.result.begun += 1
                self._engine.intake.arrived(server, connection, connection.getpeername())
            else:
                self.result.lost[self._manner_of(server)] += 1
                connection.close()
        self._sockets.clear()

    def _manner_of(self, server: Hosted) -> str:
        if server._begins_with_tls:
            return "TLS"
        if self._kinds[self._engine.servers.index(server)] is not None:
            return "without a record"  # such as one that start_tls() has encrypted
        return str(server._policies.chosen.name)

    def _server_of(self, connection: socket.socket) -> Hosted | None:
        """Return the server that has accepted a connection; None if none has."""
        try:
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or connection.type != socket.SOCK_STREAM:
                return None
            connection.getpeername()
            local = connection.getsockname()
        except OSError:
            return None
        for server in self._engine.servers:
            listening: Any = server.socket
            if listening.family != connection.family or listening.type != socket.SOCK_STREAM:
                continue
            own = listening.getsockname()
            if own == local or (isinstance(own, tuple) and own[1] == local[1] and own[0] in ("0.0.0.0", "::")):
                return server
        return None


class _Lost(Exception):
    """The request can't be continued. The text is a reason, in the plural."""


def kind_of(server: Hosted) -> Kind | None:
    """Return how the fields of a server's handlers are read; None if its requests can't be continued."""
    handler = unwrapped(server.RequestHandlerClass)
    if not (isinstance(handler, type) and issubclass(handler, StateRequestHandler)):
        return None
    if handler._pinned or not server._policies.chosen.steps_on_loop or server._begins_with_tls:
        return None
    if getattr(server, "socket", None) is None or not is_stream(server.socket):
        return None
    return Kind(handler)


def _is_over(connection: socket.socket) -> bool:
    """Return whether the peer has reset the connection."""
    try:
        connection.getpeername()
    except OSError:
        return True
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def _is_untouched(connection: socket.socket) -> bool:
    """Return whether the kernel says that nothing was received from a connection, and nothing sent."""
    try:
        return has_totals(connection) and totals(connection) == (0, 0)
    except OSError:
        return False


def _stream_of(entry: Entry) -> JournalledStream:
    transport = entry.transport
    assert isinstance(transport, JournalledStream)
    return transport
