"""Expires requests: ends or resumes each request whose deadline has passed."""

from __future__ import annotations

import logging

from reqtable.loop.step import Steps
from reqtable.loop.times import LoopTimes
from reqtable.table.addresses import address_text
from reqtable.table.connection import ConnectionRow
from reqtable.table.engine_wants import Sleeping
from reqtable.table.errors import TimedOut, shown
from reqtable.table.input import MISSING
from reqtable.table.parts import NoTransport
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")


class Expiry:
    """Continues or ends the requests whose deadlines have passed."""

    def __init__(self, steps: Steps, times: LoopTimes) -> None:
        self._steps = steps
        self._times = times

    def expire_due(self, now: float) -> None:
        """Expire entries whose deadlines have passed. Looks at `expiries_per_pass` deadlines at most."""
        steps = self._steps
        begun = steps.table.clock()
        for at, entry in steps.deadlines.expired(now, steps.table.limits.expiries_per_pass):
            self._times.add_lag(begun - at)
            try:
                self._expire(entry)
            except BaseException as problem:
                steps.failures.outside_step(entry, problem)

    def _expire(self, entry: Entry) -> None:
        """End `entry`, end its sleep, give it more time, or raise TimedOut in its handler."""
        steps = self._steps
        limits = steps.table.limits
        now = steps.table.now
        whole = limits.request_timeout_s
        if isinstance(entry.transport, NoTransport):
            entry.transport.catch_up()
        if isinstance(entry, ConnectionRow):
            steps.waiting.expire_connection(entry)
        elif entry.state is State.LINGERING:
            steps.end(entry, Event.DEADLINE_PASSED)
        elif entry.state is State.OPENING:
            entry.ending = Ending.TIMEOUT
            steps.end(entry, Event.DEADLINE_PASSED)
        elif whole is not None and entry.began_at is not None and entry.began_at + whole <= now:
            entry.ending = Ending.TIMEOUT
            steps.end_early(entry, Event.LOST, f"was not done within {whole:g} s")
        elif entry.state is State.WAITING:
            if not steps.waiting.expire(entry):
                self._end_late(entry, f"took none of its output for {limits.write_timeout_s:g} s")
        elif entry.state is State.WRITING and entry.output.first is not None:
            self._end_late(entry, f"took none of its output for {limits.write_timeout_s:g} s")
        elif not entry.want.is_timed:
            steps.timeouts.arm(entry)  # what runs elsewhere is between two requests, or has begun another one
        elif type(entry.want) is Sleeping and entry.want.wakes_at <= now:
            entry.active_at = now
            steps.step(entry, Event.DEADLINE_PASSED)
        elif self._comes_fast_enough(entry):
            steps.timeouts.arm(entry)
        else:
            entry.result = MISSING
            steps.give_up_call(entry)
            error = TimedOut(f"{shown(entry.want)} did not come within {steps.timeouts.of(entry):g} s")
            steps.step(entry, Event.DEADLINE_PASSED, error)

    def _end_late(self, entry: Entry, why: str) -> None:
        log.info("%s %s: closed", address_text(entry.peer), why)
        entry.ending = Ending.TIMEOUT
        self._steps.end(entry, Event.LOST)

    def _comes_fast_enough(self, entry: Entry) -> bool:
        """Return whether enough input has arrived since the deadline was set to earn as much time again."""
        limits = self._steps.table.limits
        expected = limits.read_timeout_s * limits.read_bytes_per_s_min
        has_no_other = entry.timeout is None and entry.transport.timeout_s is None
        return has_no_other and entry.state is State.READING and entry.bytes_in - entry.bytes_in_when_armed >= expected
