"""How long the requests of a table may wait.

An entry has one deadline. It is the soonest of these: the handler's timeout or else the peer's, the end of a sleep, and
the end of `request_timeout_s`.
"""

from __future__ import annotations

from typing import Final

from reqtable.table.deadlines import Deadlines
from reqtable.table.engine_wants import Sleeping
from reqtable.table.states import State
from reqtable.table.table import Entry, RequestTable

# Global names, as in step.py, because looking a member up in its Enum is slow.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_READY: Final = State.READY
_WAITS = {State.READING, State.WAITING, State.SLEEPING, State.OFFLOADED, State.DELEGATED}


class Timeouts:
    """Sets the deadlines of suspended entries."""

    def __init__(self, table: RequestTable, deadlines: Deadlines[Entry]) -> None:
        self._table = table
        self._deadlines = deadlines

    def arm(self, entry: Entry) -> None:
        """Set the deadline of `entry` for the state that it is in now."""
        has_none = self._table.idle_is_unbounded and entry.timeout is None
        if has_none and entry.state is _READING and not entry.held and entry.transport.timeout_s is None:
            entry.deadline = None  # the most frequent case comes first
            return
        now = self._table.now
        limits = self._table.limits
        timeout = self.of(entry)
        at = None if timeout is None else now + timeout
        if entry.state is _READY:
            at = None
        elif entry.state is _WRITING and entry.output.first is not None:
            at = now + limits.write_timeout_s
        elif type(entry.want) is Sleeping and (at is None or entry.want.wakes_at < at):
            at = entry.want.wakes_at
        whole = limits.request_timeout_s
        if whole is not None:
            began_at = entry.began_at
            if began_at is None and not entry.want.is_timed:
                began_at = now  # what runs elsewhere may begin a request at any time, so look again then
            if began_at is not None and (at is None or began_at + whole < at):
                at = began_at + whole
        if at is None:
            entry.deadline = None
        else:
            entry.bytes_in_when_armed = entry.bytes_in
            self._deadlines.arm(entry, at)

    def arm_all(self) -> None:
        """Set the deadlines of the waiting entries that have none: the limits have changed."""
        for entry in self._table:
            if entry.deadline is None and entry.state in _WAITS:
                self.arm(entry)

    def arm_partial(self, entry: Entry) -> None:
        """Bound the time for the rest of an item, part of which has arrived. A trickle of input does not extend it."""
        at = self._table.now + self._table.limits.read_timeout_s
        if entry.transport.timeout_s is None and (entry.deadline is None or at < entry.deadline):
            entry.bytes_in_when_armed = entry.bytes_in - len(entry.input)
            self._deadlines.arm(entry, at)

    def of(self, entry: Entry) -> float | None:
        """Return how many seconds `entry` may wait in its state, or None: the handler's timeout, or else the peer's."""
        if not entry.want.is_timed:
            return None
        if entry.timeout is None and entry.state is _READING:
            if entry.transport.timeout_s is not None:
                return entry.transport.timeout_s
            limits = self._table.limits
            return limits.read_timeout_s if entry.held else limits.idle_timeout_s
        return entry.timeout
