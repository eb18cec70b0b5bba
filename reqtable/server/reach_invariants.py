"""Checks of what must hold after every pass for requests that have more than one peer, and for their connections."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from math import inf
from types import SimpleNamespace
from typing import Any

from reqtable.loop.loop import Loop
from reqtable.net.outgoing import Outgoing
from reqtable.net.sockets import is_tls
from reqtable.table import wants
from reqtable.table.connection import ConnectionRow
from reqtable.table.engine_wants import ENDED, Sleeping
from reqtable.table.errors import PeerError
from reqtable.table.input import MISSING
from reqtable.table.reach import Reach
from reqtable.table.reaching import Disconnected, Told
from reqtable.table.states import INTEREST, PEER_END, READ, WRITE, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Want

# Their `take` changes only the input, so a copy of the input tells whether they are satisfied.
_HARMLESS = (wants.Line, wants.Until, wants.Exactly, wants.Chunk, wants.Rest)
_OVER = (State.LINGERING, State.CLOSED)


class ReachInvariants:
    """Checks the connections of one loop, and its WAITING requests. `must` raises if what it is given does not hold."""

    def __init__(self, loop: Loop, must: Callable[[Any, object, str], None]) -> None:
        self._loop = loop
        self._must = must
        self._idle_s = loop.table.limits.connections_idle_s  # the longest so far: deadlines were armed by it
        # The WAITING requests whose want was satisfied at the end of the last pass, and how many steps each had taken.
        self._satisfied: dict[Entry, int] = {}

    def check(self, closed: set[Entry]) -> None:
        """Check everything. `closed` entries are not freed yet."""
        table = self._loop.table
        self._idle_s = max(self._idle_s, table.limits.connections_idle_s)
        for row in table.connections.values():
            if row not in closed:
                assert isinstance(row, ConnectionRow)
                self._check_connection(row)
        before, self._satisfied = self._satisfied, {}
        for entry in table:
            reach = entry.reach
            if entry in closed or reach is None:
                continue
            self._check_owned(entry, reach)
            self._must(len(reach.told) <= table.limits.told_max, entry, f"was told {len(reach.told)} items")
            if entry.state is State.WAITING and entry not in table.touched:
                self._check_deadline(entry, reach)
                if entry.want is not ENDED and self._is_satisfied(entry, reach):
                    self._satisfied[entry] = entry.steps
                    self._must(before.get(entry) != entry.steps, entry, "waits for what has come")

    # -- connections --------------------------------------------------------------------------------------------------

    def _check_connection(self, row: ConnectionRow) -> None:
        must, now, request = self._must, self._loop.table.now, row.parent
        must(row.state in (State.CONNECTING, State.WAITING), row, "can't be in that state")
        if row.state is State.CONNECTING:
            longest = row.timeout or inf
            must(row.deadline is not None and row.deadline <= now + longest + 1e-6, row, "may connect for ever")
        if request is None:
            must(row.state is State.WAITING, row, "is idle, but not connected")
            must(row.output.first is None, row, "is idle, but has unsent output")
            is_bounded = row.deadline is not None and row.deadline <= now + self._idle_s + 1e-6
            must(is_bounded, row, "is idle for longer than connections_idle_s")
            watched = getattr(row.transport, "watched", 0)
            must(watched == READ, row, "is idle, but its end would not be noticed")
            return
        must(self._loop.table.get(request.id) is request, row, "belongs to a request that is not in the table")
        must(request.state not in _OVER, row, "belongs to a request that is over")
        reach = request.reach
        must(reach is not None and row in reach.connections, row, "is not known to its request")
        assert reach is not None
        if row.state is State.CONNECTING:
            must(reach.begun, row, "connects, but its request does not wait for that")
        elif row not in self._loop.table.touched and request.state is not State.MOVING:
            must(row.output.first is None or row.deadline is not None, row, "may write for ever")
            self._check_watched(row, request, reach)

    def _check_owned(self, entry: Entry, reach: Reach) -> None:
        connections = self._loop.table.connections
        for row in reach.connections:
            assert isinstance(row, ConnectionRow)
            self._must(
                row.parent is entry, row, "is the connection of one request, but belongs to another one, or none"
            )
            known = connections.get(row.id) is row or row.state is State.CLOSED
            self._must(known, row, "is not in the table, but its request has it")
        count = len({id(row) for row in reach.connections})
        self._must(count == len(reach.connections), entry, "has the same connection twice")

    def _check_watched(self, row: ConnectionRow, request: Entry, reach: Reach) -> None:
        """Check what the selector watches a connection for. While its request is busy, that may be out of date."""
        transport = row.transport
        if not isinstance(transport, Outgoing) or is_tls(transport.request):
            return
        watched, must, unsent = transport.watched, self._must, row.output.first is not None
        must(bool(watched & WRITE) == unsent, row, f"is polled for {watched}, and has {row.output.size} bytes")
        if request.state is State.WAITING:
            must_read, may_read = self._reads(row, request, reach)
            must(watched & READ or not must_read, row, f"is polled for {watched}, but its input is wanted")
            must(may_read or not watched & READ, row, f"is polled for {watched}, but its input has nowhere to go")

    def interest_of(self, entry: Entry, watched: int) -> int:
        """Return what the selector must watch the socket of a request for. It is `watched` for that now."""
        interest = INTEREST[entry.state]
        reach = entry.reach
        if entry.state is not State.WAITING or reach is None:
            return interest
        if entry.output.first is not None:
            interest |= WRITE
        must_read, may_read = self._reads(None, entry, reach)
        if must_read or (may_read and watched & READ):
            interest |= READ
        if not reach.peer_ended and any(type(want) is Disconnected for want, _ in _pairs(entry.want)):
            interest |= PEER_END
        return interest

    def _reads(self, row: ConnectionRow | None, entry: Entry, reach: Reach) -> tuple[bool, bool]:
        """Return whether a side of a WAITING request must be read from, and whether it may be."""
        side: Entry = entry if row is None else row
        pairs = _pairs(entry.want)
        is_wanted = any(of is row and want.awaits is Event.AWAITS_INPUT for want, of in pairs)
        may_read = is_wanted and not side.input.ended
        if any(of is not None and of.failure is not None for _, of in pairs):
            return False, may_read  # a connection has just ended: the request is woken in the next pass
        if reach.is_full_beside(row, entry.output.held, self._loop.table.limits.high_water_bytes):
            return False, False
        # A request that is held back is asked again when the output of a side has been taken whole.
        return may_read and not (reach.held_back and _unsent(entry, reach)), may_read

    # -- waits --------------------------------------------------------------------------------------------------------

    def _check_deadline(self, entry: Entry, reach: Reach) -> None:
        unsent = entry.output.first is not None
        self._must((reach.write_until is not None) == unsent, entry, f"must have sent by {reach.write_until}")
        times = [reach.until, reach.write_until]
        times += [want.wakes_at for want, _ in _pairs(entry.want) if isinstance(want, Sleeping)]
        whole = self._loop.table.limits.request_timeout_s
        times.append(None if whole is None or entry.began_at is None else entry.began_at + whole)
        soonest = min((at for at in times if at is not None), default=None)
        self._must(entry.deadline == soonest, entry, f"is due at {entry.deadline}, not at {soonest}")

    def _is_satisfied(self, entry: Entry, reach: Reach) -> bool:
        """Return whether anything that a WAITING request waits for has come, and may be taken."""
        if reach.held_back and _unsent(entry, reach):
            return False
        high_water = self._loop.table.limits.high_water_bytes
        for want, row in _pairs(entry.want):
            if isinstance(want, Told):
                if reach.told and not reach.is_full_beside(want, entry.output.held, high_water):
                    return True
            elif isinstance(want, Disconnected):
                if entry.input.ended or reach.peer_ended:
                    return True
            elif row is not None and row.failure is not None and not (row.failure_told or row.end_told):
                return True
            elif type(want) in _HARMLESS and not reach.is_full_beside(row, entry.output.held, high_water):
                side: Any = entry if row is None else row
                teller: Any = reach if row is None else row
                if _has_item(side, want) or (side.input.ended and not side.input and not teller.end_told):
                    return True
        return False


def _pairs(want: Want[Any]) -> tuple[tuple[Want[Any], Any], ...]:
    return getattr(want, "pairs", ())


def _unsent(entry: Entry, reach: Reach) -> bool:
    return entry.output.first is not None or any(row.output.first is not None for row in reach.connections)


def _has_item(side: Any, want: Want[Any]) -> bool:
    """Return whether `want` would take an item, or raise an error, without taking anything."""
    if not side.input or not side.input.is_stream:
        return False
    unread = copy(side.input)
    unread.data = bytes(unread.data)
    try:
        taken = want.take(
            SimpleNamespace(input=unread, output=side.output, table=side.table, id=side.id, result=MISSING)
        )
    except PeerError:
        return True
    return taken is not MISSING or unread.ended
