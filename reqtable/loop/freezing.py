"""Freezes requests for a move to another process. Then either they are thawed, or the other process has them.

A frozen request is MOVING. Nothing polls for it, no deadline is due, and no step runs. Other requests may send
and tell it something meanwhile: this waits in its output and among its items.

Freeze and thaw outside the part of a pass that handles what the poll has found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from reqtable.loop.step import Steps
from reqtable.table.connection import ConnectionRow
from reqtable.table.engine_wants import ENDED
from reqtable.table.moved_files import close_files
from reqtable.table.parts import OVER
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry

# The deadline of these waits is kept in the entry alone. WAITING has several times, which are kept in the reach.
_HAS_ONE_TIME = {State.READING, State.WRITING, State.SLEEPING}


class Freezer:
    """Freezes, thaws and lets go of requests of one table."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def freeze(self, entries: Iterable[Entry]) -> None:
        """Suspend requests, which can move, until they are thawed or let go."""
        steps = self._steps
        for entry in entries:
            for side in (entry, *_connections_of(entry)):
                deadline = side.deadline
                side.transport.watch(0)
                steps.deadlines.forget(side)
                side.deadline = deadline  # for the process that goes on
            entry.advance(Event.FROZEN)
        steps.turns = deque(each for each in steps.turns if each.state is State.READY)

    def thaw(self, entry: Entry) -> None:
        """Go on with a frozen request: its want is asked again before any step.

        The request keeps its deadline, unless the deadline was for output which has now been taken.
        """
        steps = self._steps
        deadline, entry.deadline = entry.deadline, None
        steps_before, bytes_before = entry.steps, entry.bytes_in_when_armed
        wrote = entry.output.first is not None
        if entry.reach is not None:
            entry.reach.watched_for = None
            entry.reach.held_back = False
        for row in _connections_of(entry):
            if row.deadline is not None:
                longest = steps.table.now + steps.table.limits.write_timeout_s
                steps.deadlines.arm(row, min(row.deadline, longest))
            steps.count_buffers(row)
        steps.count_buffers(entry)
        entry.advance(Event.THAWED)
        steps.on_thaw(entry)
        if entry.ending is Ending.CANCELLED:  # an operator has cancelled the frozen request
            entry.ending = None
            steps.end_early(entry, Event.CANCELLED)
            return
        self._go_on(entry)
        if entry.state not in _HAS_ONE_TIME:
            return
        if entry.steps != steps_before or deadline is None or entry.deadline is None:
            return
        has_written = wrote and entry.state is not State.WRITING
        if deadline < entry.deadline and not has_written:  # it has waited for a while already
            steps.deadlines.arm(entry, deadline)
            entry.bytes_in_when_armed = bytes_before

    def _go_on(self, entry: Entry) -> None:
        steps = self._steps
        if entry.want is ENDED:
            steps.finish(entry, Event.TURN_CAME)
        elif entry.output.first is not None and entry.want.awaits is not Event.AWAITS_ANY:
            is_taken = entry.transport.flush()
            if steps.is_closed(entry):
                return
            if is_taken:
                steps.step(entry, Event.TURN_CAME)
            else:
                steps.block(entry)
        else:
            steps.step(entry, Event.TURN_CAME)

    def let_go(self, entry: Entry) -> None:
        """End the row of a frozen request: another process goes on with it. The handler is not told.

        The files in its fields are its own: this process's copies are closed.
        """
        entry.ending = Ending.MOVED
        handler, entry.resumable = entry.handler, OVER
        if not isinstance(handler, type):
            entry.handler = type(handler)
            close_files(vars(handler).get(name) for name in (*handler._fields, *handler._kept))
        self._steps.end(entry, Event.MOVED)


def _connections_of(entry: Entry) -> list[ConnectionRow]:
    return [] if entry.reach is None else [row for row in entry.reach.connections if isinstance(row, ConnectionRow)]
