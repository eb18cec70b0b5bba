"""How long the requests of a loop may wait, and what becomes of those that have waited so long.

An entry has one deadline: the soonest of its want's own, its peer's, its timer's and that of the whole request.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from reqtable.table.addresses import address_text
from reqtable.table.buffers import MISSING
from reqtable.table.errors import TimedOut, shown
from reqtable.table.states import Event, State
from reqtable.table.table import Entry

if TYPE_CHECKING:
    from reqtable.loop.loop import Loop

log = logging.getLogger("reqtable")
# As in the loop: names, because looking a member up takes 100 ns.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_READY: Final = State.READY


class Timeouts:
    """Of the requests of one loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def arm(self, entry: Entry) -> None:
        """Set the deadline of the state that `entry` is in now."""
        loop = self._loop
        has_none = loop.unbounded and entry.timeout is None
        if has_none and entry.state is _READING and not entry.held and entry.transport.timeout_s is None:
            entry.deadline = None  # the most frequent case, first
            return
        now = loop.table.now
        timeout = self.of(entry)
        at = None if timeout is None else now + timeout
        if entry.state is _READY:
            at = None
        elif entry.state is _WRITING and entry.output.first is not None:
            at = now + loop.limits.write_timeout_s
        elif (due := entry.due) is not None and (at is None or due < at):
            at = due
        whole = loop.limits.request_timeout_s
        if whole is not None and (at is None or entry.created_at + whole < at):
            at = entry.created_at + whole
        if at is None:
            entry.deadline = None
        else:
            entry.counted = entry.bytes_in
            loop.deadlines.arm(entry, at)

    def arm_partial(self, entry: Entry) -> None:
        """Some of what `entry` waits for has come: the rest of it has a bounded time, however much trickles in."""
        loop = self._loop
        at = loop.table.now + loop.limits.read_timeout_s
        if entry.transport.timeout_s is None and (entry.deadline is None or at < entry.deadline):
            entry.counted = entry.bytes_in - len(entry.input)
            loop.deadlines.arm(entry, at)

    def of(self, entry: Entry) -> float | None:
        """How long `entry` may wait in its state: as it said itself, or, for its peer, as its transport has it."""
        if not entry.want.is_timed:
            return None
        if entry.timeout is None and entry.state is _READING:
            if entry.transport.timeout_s is not None:
                return entry.transport.timeout_s
            limits = self._loop.limits
            return limits.read_timeout_s if entry.held else limits.idle_timeout_s
        return entry.timeout

    def expire_due(self, now: float) -> None:
        """Expire those whose deadlines have passed, a bounded number of them."""
        loop = self._loop
        begun = loop.clock()
        for at, entry in loop.deadlines.expired(now, loop.limits.expiries_per_pass):
            loop.times.add_lag(begun - at)
            try:
                self._expire(entry)
            except BaseException as problem:
                loop.failures.outside_step(entry, problem)

    def _expire(self, entry: Entry) -> None:
        """Its deadline has passed: go on with what it waited for in vain, or end it."""
        loop = self._loop
        limits = loop.limits
        now = loop.table.now
        whole = limits.request_timeout_s
        if entry.state is State.LINGERING:
            loop.end(entry, Event.DEADLINE_PASSED)
        elif entry.state is State.OPENING:
            entry.ending = "timeout"
            loop.end(entry, Event.DEADLINE_PASSED)
        elif whole is not None and entry.created_at + whole <= now:
            self._close(entry, f"was not done within {whole:g} s")
        elif entry.state is _WRITING and entry.output.first is not None:
            self._close(entry, f"took none of its output for {limits.write_timeout_s:g} s")
        elif (due := entry.due) is not None and due <= now:
            entry.active_at = now
            loop.step(entry, Event.DEADLINE_PASSED)
        elif self._comes_fast_enough(entry):
            self.arm(entry)
        else:
            entry.posted = MISSING
            loop.give_up_call(entry)
            error = TimedOut(f"{shown(entry.want)} did not come within {self.of(entry):g} s")
            loop.step(entry, Event.DEADLINE_PASSED, error)

    def _close(self, entry: Entry, why: str) -> None:
        log.info("%s %s: closed", address_text(entry.peer), why)
        entry.ending = "timeout"
        self._loop.end(entry, Event.LOST)

    def _comes_fast_enough(self, entry: Entry) -> bool:
        """Whether what has come of a want since its deadline was set is worth as much time again."""
        limits = self._loop.limits
        expected = limits.read_timeout_s * limits.read_bytes_per_s_min
        has_no_other = entry.timeout is None and entry.transport.timeout_s is None
        return has_no_other and entry.state is _READING and entry.bytes_in - entry.counted >= expected
