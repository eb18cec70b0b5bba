"""Checks of what must hold after every pass of a loop.

A simulation always makes them, a server if the environment has `REQTABLE_DEBUG=1`. A failed check is a bug of the
engine, never of a handler or a peer: `InvariantBroken` ends the loop.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from math import inf
from typing import Any

from reqtable.dispatch.handoff import HandedOffRequest
from reqtable.loop.loop import Loop
from reqtable.loop.poller import Selectable
from reqtable.net.datagram import Session
from reqtable.net.listener import Listener
from reqtable.net.preamble import Preamble
from reqtable.net.sockets import is_tls
from reqtable.net.stream import Stream
from reqtable.server.reach_invariants import ReachInvariants
from reqtable.table.addresses import network_of
from reqtable.table.errors import ReqtableError
from reqtable.table.output import EndOfOutput, FileSlice
from reqtable.table.parts import Transport
from reqtable.table.states import RESET, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

# No entry is in one of these states between two passes.
_NEVER_SUSPENDED = {State.RUNNING, State.CLOSED}
_STEPS_OF_A_STARVED = 2  # passes that a READY request may wait


class InvariantBroken(ReqtableError):
    """Raised if the engine contradicts itself."""


class Invariants:
    """Checks one loop after each pass. Remembers from pass to pass what may last for one pass, but not for two."""

    def __init__(self, loop: Loop, listeners: Iterable[Listener], sessions: Collection[Session]) -> None:
        self._loop = loop
        self._steps = loop.steps
        self._listeners = listeners
        self._sessions = sessions
        self._limits = [loop.table.limits]  # every set of limits so far: deadlines were armed by them
        self._closed: set[Entry] = set()
        # Of each overdue entry: (its deadline, its steps), and how many more passes it may stay overdue.
        self._overdue: dict[Entry, tuple[tuple[float, int], int]] = {}
        self._frozen: dict[Entry, tuple[int, int, int]] = {}  # of each MOVING request: its steps, and its bytes
        # Its steps and the bytes that it has sent, and how many passes it has waited.
        self._ready: dict[Entry, tuple[tuple[int, int], int]] = {}
        self._reach = ReachInvariants(loop, self._must)

    def check(self, now: float = 0.0, freed: bool = False) -> None:
        """Raise InvariantBroken if anything does not hold after a pass."""
        loop, steps = self._loop, self._steps
        if loop.table.limits is not self._limits[-1]:
            self._limits.append(loop.table.limits)
        turns = Counter(steps.turns)
        closed = set(steps.closed)  # since the entries were last reaped, by a server's hook
        for entry in steps.closed:
            self._must(entry not in self._closed, entry, "has been closed for a pass, but is not freed")
        self._closed = closed
        for entry in loop.table:
            if entry in closed:
                continue
            self._check_state(entry)
            self._check_output(entry)
            if entry.state is not State.MOVING:
                self._check_deadline(entry)
            self._must(
                turns[entry] == (entry.state is State.READY), entry, f"is {turns[entry]} times in the queue of turns"
            )
            self._must(
                entry not in steps.give_ups
                or entry.state in (State.OFFLOADED, State.WAITING, State.READY, State.WRITING),
                entry,
                "has a call that it does not wait for",
            )
        self._reach.check(closed)
        self._check_frozen()
        self._check_counts()
        self._check_overdue()
        self._check_starved()
        self._check_registered()
        for entry in (*steps.give_ups, *turns):
            if entry.state is not State.CLOSED:
                self._must(entry in loop.table, entry, "is not in the table, but has a turn or a call")
        for entry in steps.give_ups:
            gone = entry.state is State.CLOSED and entry not in closed
            self._must(not gone, entry, "is closed, but its call is not given up")
        for session in self._sessions:
            # A session that was handed off stays known until its thread or child is done with it.
            known = session.entry in loop.table or session.forward is not None
            self._must(known, session.entry, "is not in the table, but its session is known")
        self._must(loop.table.running is None, loop.table.running, "is running between two passes")

    def _must(self, holds: Any, what: object, problem: str) -> None:
        if not holds:
            broken = InvariantBroken(f"{what!r} {problem}")
            log.critical("a bug of the engine: %s", broken)  # the error itself may end a thread unseen
            raise broken

    def _check_state(self, entry: Entry) -> None:
        must = self._must
        must(entry.state not in _NEVER_SUSPENDED, entry, "can't be suspended in that state")
        transport = _connection_of(entry)
        is_opened = entry.state is not State.OPENING or isinstance(transport, Preamble)
        must(is_opened, entry, "is OPENING, but has no preamble")
        touched = entry in self._loop.table.touched  # by a step at the end of the pass: the next pass sends the output
        if isinstance(transport, Stream) and not is_tls(transport.request) and not touched:
            # TLS is left out: OpenSSL may have to read in order to write, and the other way round. So is a blocking
            # handler's socket: it is polled only at times, and the handler may close it during a wait.
            interest = self._reach.interest_of(entry, transport.watched) & self._loop.poller.interests
            # The connection of a request that waits for something else may have ended. A simulation knows.
            is_right = transport.watched == interest or (interest == RESET and not transport.watched)
            must(is_right, entry, f"is polled for {transport.watched}, not for {interest}")

    def _check_output(self, entry: Entry) -> None:
        output = entry.output
        held = sum(len(piece) for piece in output.pieces if not isinstance(piece, FileSlice | EndOfOutput))
        size = held + sum(piece.remaining for piece in output.pieces if isinstance(piece, FileSlice))
        size += sum(isinstance(piece, EndOfOutput) for piece in output.pieces)
        self._must(
            (output.held, output.size) == (held, size), entry, f"holds {held} of {size} bytes, but counts others"
        )
        touched = entry in self._loop.table.touched  # a handler has sent to it while being closed
        if isinstance(entry.transport, Stream) and not touched and entry.state is not State.MOVING:
            may_send = entry.state is State.WRITING or entry.want.awaits is Event.AWAITS_ANY or entry.reach is not None
            self._must(not size or may_send, entry, f"does not wait to send {size} bytes")

    def _check_deadline(self, entry: Entry) -> None:
        loop = self._loop
        at = entry.deadline
        if at is None:
            timeout = None if entry.state in (State.READY, State.LINGERING) else self._steps.timeouts.of(entry)
            self._must(timeout is None, entry, f"should time out after {timeout} s, but has no deadline")
            self._must(entry.state is not State.SLEEPING, entry, "would never wake up")
            self._must(entry.state is not State.LINGERING, entry, "would linger for ever")
            self._must(entry.state is not State.WRITING or entry.output.first is None, entry, "may write for ever")
            return
        self._must(entry.heap_time <= at, entry, f"is due at {at}, but would expire only at {entry.heap_time}")
        longest = self._longest_wait(entry)
        if longest is not None:
            self._must(at <= loop.table.now + longest + 1e-6, entry, f"may wait {at - loop.table.now} s, not {longest}")

    def _check_frozen(self) -> None:
        """Check that nothing happens to a MOVING request, nor to its connections: another process may go on with it."""
        before, self._frozen = self._frozen, {}
        for entry in self._loop.table:
            if entry.state is not State.MOVING:
                continue
            known = self._frozen[entry] = entry.steps, entry.bytes_in, entry.bytes_out
            self._must(before.get(entry, known) == known, entry, "is being moved, but goes on")
            rows: Any = entry.reach.connections if entry.reach is not None else ()
            for side in (entry, *rows):
                self._must(side.heap_time == inf, side, "is being moved, but has a deadline in the heap")
                self._must(not getattr(side.transport, "watched", 0), side, "is being moved, but is polled")

    def _check_counts(self) -> None:
        """Compare the counts that the table keeps with a fresh count."""
        table = self._loop.table
        held = 0
        networks: Counter[str] = Counter()
        queued = 0
        for entry in (*table, *table.connections.values()):
            buffers = len(entry.input) + entry.output.held
            is_settled = entry.state is not State.CLOSED and entry not in table.touched
            self._must(
                entry.held == buffers or not is_settled, entry, f"holds {buffers} bytes, but {entry.held} are counted"
            )
            held += entry.held
            queued += entry.heap_time < inf
            if entry.kind == "client" and (network := network_of(entry.peer)) is not None:
                networks[network] += 1
        counted_networks = table.census.networks
        known = networks if counted_networks is None else {name: len(each) for name, each in counted_networks.items()}
        for what, counted, found in (
            ("bytes of buffers", table.buffered, held),
            ("deadlines", self._steps.deadlines.live, queued),
            ("entries of each network", known, networks),
        ):
            if counted != found:
                raise InvariantBroken(f"the table counts {counted} {what}, but has {found}")

    def _check_overdue(self) -> None:
        now = self._loop.table.now
        loop = self._loop
        patience = len(self._steps.deadlines) // loop.table.limits.expiries_per_pass  # earlier ones come first
        before, self._overdue = self._overdue, {}
        for entry in loop.table:
            if entry.deadline is not None and entry.deadline <= now and entry.state is not State.MOVING:
                since = entry.deadline, entry.steps
                known, passes = before.get(entry, (since, patience + 1))
                passes = passes - 1 if known == since else patience
                self._overdue[entry] = since, passes
                self._must(passes >= 0, entry, f"was due {now - entry.deadline:g} s ago, but goes on")

    def _check_starved(self) -> None:
        before, self._ready = self._ready, {}
        for entry in self._loop.table:
            if entry.state is State.READY:
                done = entry.steps, entry.bytes_out  # output that others send to it may hold back its steps
                known, passes = before.get(entry, ((-1, 0), 0))
                passes = passes + 1 if known == done and self._steps.send_share else 0
                self._ready[entry] = done, passes
                self._must(passes < _STEPS_OF_A_STARVED, entry, f"had no turn for {passes} passes")

    def _check_registered(self) -> None:
        """Check that the selector watches what it should, and nothing else."""
        loop = self._loop
        watched: dict[int, Selectable] = {listener.fd: listener for listener in self._listeners if listener.watched}
        for entry in (*loop.table, *loop.table.connections.values()):
            transport = _connection_of(entry)
            if isinstance(transport, Selectable) and transport.watched:
                self._must(transport.fd not in watched, entry, f"has the descriptor of {watched.get(transport.fd)!r}")
                watched[transport.fd] = transport
        for key in list(loop.poller.selector.get_map().values()):
            data = key.data
            if not isinstance(data, Selectable):
                continue
            known = watched.pop(key.fd, None)
            owner: Entry | None = getattr(data, "entry", None)
            if known is None and (owner is None or owner.state is State.WAITING) and not isinstance(data, Listener):
                continue  # not of a request: a child's pidfd, for one
            self._must(known is data, owner, f"should not be polled, but descriptor {key.fd} is")
            self._must(key.events == data.watched, owner or data, f"is polled for {key.events}, not for {data.watched}")
        self._must(not watched, list(watched.values()), "should be polled, but are not")

    def _longest_wait(self, entry: Entry) -> float | None:
        """Return for how many seconds from now `entry` may wait at most; None if that is not known."""
        if entry.state is State.LINGERING:
            return max(limits.linger_timeout_s for limits in self._limits)
        if entry.state is State.WRITING and entry.output.first is not None:
            return max(limits.write_timeout_s for limits in self._limits)
        if entry.state is State.READING:
            return self._steps.timeouts.of(entry)
        return None


def _connection_of(entry: Entry) -> Transport:
    """Return the transport of `entry`, also while a thread or a child has the request."""
    transport = entry.transport
    return transport.transport if isinstance(transport, HandedOffRequest) else transport


def are_checked() -> bool:
    """Return whether the environment asks for the checks: `REQTABLE_DEBUG=1`."""
    return os.environ.get("REQTABLE_DEBUG", "0") != "0"
