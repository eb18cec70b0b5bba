"""The sides of a WAITING request, its client and its connections: what they are polled for, and their unsent output."""

from __future__ import annotations

from math import inf
from typing import Any, Final, Protocol

from reqtable.loop.mailbox import Mailbox
from reqtable.table.connection import ConnectionRow
from reqtable.table.deadlines import Deadlines
from reqtable.table.reach import Connected, Reach
from reqtable.table.reaching import Disconnected, Reaching
from reqtable.table.states import INTEREST, PEER_END, READ, WRITE, Event, State
from reqtable.table.table import Entry, RequestTable
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING

_WAITING: Final = State.WAITING
_READY: Final = State.READY
_CLOSED: Final = State.CLOSED
_AWAITS_INPUT: Final = Event.AWAITS_INPUT
_INTEREST: Final = INTEREST[State.WAITING]


class Runner(Protocol):
    """Runs the steps of the requests: the part of `Steps` that is used here."""

    deadlines: Deadlines[Entry]
    mailbox: Mailbox
    table: RequestTable

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None) -> None: ...
    def give(self, entry: Entry, cause: Event, item: Any) -> None: ...
    def move(self, entry: Entry, cause: Event, event: Event) -> None: ...
    def finish(self, entry: Entry, cause: Event) -> None: ...
    def end(self, entry: Entry, event: Event) -> None: ...
    def count_buffers(self, entry: Entry) -> None: ...
    def is_closed(self, entry: Entry) -> bool: ...


class Sides:
    """Polls the sides of WAITING requests, and sends their output. `steps` runs the steps of the requests."""

    def __init__(self, steps: Runner) -> None:
        self._steps = steps

    def is_watched(self, entry: Entry, want: Want[Any]) -> bool:
        """Return whether the sides are polled for what `want` needs, and nothing that it waits for has come."""
        reach = entry.reach
        return reach is not None and (want is reach.watched_for or want == reach.watched_for)

    def flush_connections(self, reach: Reach) -> bool:
        """Flush the connections to which a step has sent. Returns whether the kernel has taken all output of one."""
        is_taken = False
        for row in tuple(reach.connections):
            if row.output.first is None or not isinstance(row, ConnectionRow):
                continue
            before = row.bytes_out
            if not row.flush():
                if row.state is not _CLOSED:
                    reach.watched_for = None
                    self.output_moved(row, row.bytes_out > before)
            else:
                is_taken = True
                row.deadline = None
                self.watch_connection(row)  # its request may be busy for long, and not watch by itself
                if row.held:
                    self._steps.count_buffers(row)
        return is_taken

    def watch(self, entry: Entry) -> None:
        """Poll for what the wants of a WAITING entry need: on its own socket, and on its connections."""
        reach = entry.reach
        assert reach is not None
        own = _INTEREST
        # It holds until the want changes. A wait that was begun must be given up when another want is satisfied.
        is_lasting = not reach.begun
        if entry.output.first is not None:
            own |= WRITE
            is_lasting = False
        for row in reach.connections:
            row.wants_input = False
            row.want = NOTHING
        high_water = self._steps.table.limits.high_water_bytes
        held = entry.output.held
        for want, row_of_want in getattr(entry.want, "pairs", ()):
            if want.awaits is _AWAITS_INPUT:
                unread = entry.input if row_of_want is None else row_of_want.input
                # What was held back must be taken before more is read. The request is asked when an output is taken.
                holds = reach.held_back and unread.data and _unsent(entry, reach)
                if holds or reach.is_full_beside(row_of_want, held, high_water):
                    reach.held_back = True
                    is_lasting = False
                elif row_of_want is not None:
                    row_of_want.wants_input = not row_of_want.input.ended
                    row_of_want.want = want
                elif not entry.input.ended:
                    own |= READ
            elif type(want) is Disconnected and not reach.peer_ended:
                own |= PEER_END
        entry.transport.watch(own)
        for row in reach.connections:
            self.watch_connection(row)
            is_lasting = is_lasting and row.output.first is None and row.state is _WAITING
        # The want of a blocking handler, say, has no `arrive`.
        reach.watched_for = entry.want if is_lasting and isinstance(entry.want, Reaching) else None

    def watch_connection(self, row: Connected) -> None:
        """Poll a connection for what its request wants of it. While it is CONNECTING, its attempts poll."""
        if row.state is _WAITING:
            row.watch((READ if row.wants_input else 0) | (WRITE if row.output.first is not None else 0))

    def count_input(self, row: ConnectionRow) -> None:
        """Count the input of a connection that its request has not taken."""
        if (row.held or len(row.input)) and row.state is not _CLOSED:
            self._steps.count_buffers(row)

    def output_moved(self, entry: Entry, moved: bool) -> None:
        """Note that output is left, and renew its deadline if some of it was taken."""
        steps = self._steps
        steps.count_buffers(entry)
        if steps.is_closed(entry):
            return
        if isinstance(entry, ConnectionRow):
            if moved or entry.deadline is None:
                steps.deadlines.arm(entry, steps.table.now + steps.table.limits.write_timeout_s)
        elif entry.reach is not None:
            self.note_output(entry, entry.reach, False, moved or entry.reach.write_until is None)
            self.arm(entry)

    def note_output(self, entry: Entry, reach: Reach, is_taken: bool, moved: bool) -> None:
        if is_taken:
            reach.write_until = None
        elif moved:
            reach.sent = entry.bytes_out
            reach.write_until = self._steps.table.now + self._steps.table.limits.write_timeout_s

    def arm(self, entry: Entry) -> None:
        """Set the deadline of a WAITING entry: the soonest of its timeout, its sleeps, its output and the request's."""
        reach = entry.reach
        assert reach is not None
        limits = self._steps.table.limits
        is_unbounded = reach.until is None and reach.write_until is None and limits.request_timeout_s is None
        if is_unbounded and reach.wakes_at == inf:
            entry.deadline = None  # the most frequent case
            return
        at = reach.wakes_at if reach.until is None else min(reach.until, reach.wakes_at)
        if reach.write_until is not None:
            at = min(at, reach.write_until)
        whole = limits.request_timeout_s
        if whole is not None and entry.began_at is not None:
            at = min(at, entry.began_at + whole)
        if at == inf or entry.state is _READY:
            entry.deadline = None
        else:
            self._steps.deadlines.arm(entry, at)


def _unsent(entry: Entry, reach: Reach) -> bool:
    """Return whether any side of a request has output that the kernel has not taken."""
    return entry.output.first is not None or any(row.output.first is not None for row in reach.connections)
