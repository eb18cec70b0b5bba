"""The output that no step of its own request flushes, and the bytes that all buffers hold.

A step may send to other requests than its own. Their output is flushed at the end of the pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from reqtable.loop.early_ends import EarlyEndings
from reqtable.loop.platform import System
from reqtable.loop.timeouts import Timeouts
from reqtable.loop.waiting import Waiting
from reqtable.table.limits import Limits
from reqtable.table.states import INTEREST, Event, State
from reqtable.table.table import Entry

_WAITING: Final = State.WAITING
_READY: Final = State.READY
_AWAITS_ANY: Final = Event.AWAITS_ANY
_OUTPUT_BLOCKED: Final = Event.OUTPUT_BLOCKED
# In these states a request may have no unsent output when another request sends to it.
_BLOCKABLE = {State.READING, State.READY, State.SLEEPING, State.OFFLOADED}
_NOT_FLUSHED = {State.WRITING, State.MOVING}  # what another request sends waits


class Outputs(EarlyEndings):
    """Flushes the output of requests whose step does not run, and counts what the buffers hold."""

    timeouts: Timeouts
    turns: deque[Entry]  # the READY entries, in order
    waiting: Waiting

    def __init__(self, limits: Limits | None, system: System) -> None:
        super().__init__(limits, system)
        self.relieve: Callable[[], Any] = bool  # called when the buffers hold more than `buffered_bytes_max`

    def count_buffers(self, entry: Entry) -> None:
        """Count the bytes that `entry` holds for longer than a pass. If all entries hold too many, call `relieve`."""
        self.table.hold(entry, len(entry.input) + entry.output.held)
        most = self.table.limits.buffered_bytes_max
        if most is not None and self.table.buffered > most:
            self.relieve()

    def flush_touched(self) -> None:
        """Flush the output that steps have sent to other requests than their own."""
        touched, self.table.touched = self.table.touched, []
        for entry in touched:
            if entry.output.first is not None or entry.reach is not None:  # else its request has flushed it
                self._flush_touched(entry)

    def _flush_touched(self, entry: Entry) -> None:
        """Flush `entry`, to which another request's step has sent. If output is left, have it wait for its peer."""
        try:
            if entry.state is _WAITING:
                self.waiting.touched(entry)
            elif entry.state in _NOT_FLUSHED or (entry.state is _READY and entry.want.awaits is _AWAITS_ANY):
                self.count_buffers(entry)
            elif entry.state in _BLOCKABLE and entry.output.first is not None and not entry.transport.flush():
                self._block(entry)
        except BaseException as problem:
            self.failures.outside_step(entry, problem)

    def _block(self, entry: Entry) -> None:
        """Have `entry`, whose step does not run, wait for the peer to take its output."""
        if self.is_closed(entry):
            return
        if entry.state is _READY:
            self.turns.remove(entry)  # otherwise, if it were READY again soon, it would get two turns in one pass
        self.block(entry)

    def block(self, entry: Entry) -> None:
        """Have a suspended entry, which has no turn, wait for the peer to take its output."""
        entry.advance(_OUTPUT_BLOCKED)
        entry.transport.watch(INTEREST[entry.state])
        self.count_buffers(entry)
        if not self.is_closed(entry):
            self.timeouts.arm(entry)
