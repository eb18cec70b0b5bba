"""How long the requests of a table may wait.

An entry has one deadline: the soonest of its want's own, its peer's, its timer's and that of the whole request.
"""

from __future__ import annotations

from typing import Final

from reqtable.table.deadlines import Deadlines
from reqtable.table.states import State
from reqtable.table.table import Entry, RequestTable

# As in the loop: names, because looking a member up takes 100 ns.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_READY: Final = State.READY


class Timeouts:
    """Sets the deadline of each entry that is suspended."""

    def __init__(self, table: RequestTable, deadlines: Deadlines[Entry]) -> None:
        self._table = table
        self._deadlines = deadlines

    def arm(self, entry: Entry) -> None:
        """Set the deadline of the state that `entry` is in now."""
        has_none = self._table.unbounded and entry.timeout is None
        if has_none and entry.state is _READING and not entry.held and entry.transport.timeout_s is None:
            entry.deadline = None  # the most frequent case, first
            return
        now = self._table.now
        limits = self._table.limits
        timeout = self.of(entry)
        at = None if timeout is None else now + timeout
        if entry.state is _READY:
            at = None
        elif entry.state is _WRITING and entry.output.first is not None:
            at = now + limits.write_timeout_s
        elif entry.wakes_at is not None and (at is None or entry.wakes_at < at):
            at = entry.wakes_at
        whole = limits.request_timeout_s
        if whole is not None and (at is None or entry.created_at + whole < at):
            at = entry.created_at + whole
        if at is None:
            entry.deadline = None
        else:
            entry.bytes_in_when_armed = entry.bytes_in
            self._deadlines.arm(entry, at)

    def arm_partial(self, entry: Entry) -> None:
        """Some of what `entry` waits for has come: the rest of it has a bounded time, however much trickles in."""
        at = self._table.now + self._table.limits.read_timeout_s
        if entry.transport.timeout_s is None and (entry.deadline is None or at < entry.deadline):
            entry.bytes_in_when_armed = entry.bytes_in - len(entry.input)
            self._deadlines.arm(entry, at)

    def of(self, entry: Entry) -> float | None:
        """How long `entry` may wait in its state: as it said itself, or, for its peer, as its transport has it."""
        if not entry.want.is_timed:
            return None
        if entry.timeout is None and entry.state is _READING:
            if entry.transport.timeout_s is not None:
                return entry.transport.timeout_s
            limits = self._table.limits
            return limits.read_timeout_s if entry.held else limits.idle_timeout_s
        return entry.timeout
