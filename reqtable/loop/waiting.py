"""Waits of WAITING requests: for messages, several things at once, or another connection than its client's.

The rules:

* Whatever happens to one of these things, `wake` runs a step, which asks the request's want, as always. If its item has
  not come, the request goes on waiting.
* A side (the client or a connection) is polled for READ while the request wants its input and has room for it, and for
  WRITE while it has unsent output.
* An output that blocks does not end the wait, so a slow reader holds up only the direction towards it.
* When the kernel has taken an output, the request is asked again if a want was held back for it.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import ETIMEDOUT
from math import inf
from typing import Any, Final, Protocol

from reqtable.loop.sides import Runner, Sides
from reqtable.table.connection import ConnectionRow
from reqtable.table.engine_wants import ENDED, STEP, Sleeping
from reqtable.table.errors import ConnectFailed, TimedOut, shown
from reqtable.table.input import MISSING, Missing
from reqtable.table.reach import Reach
from reqtable.table.reaching import Either, Reaching, Told
from reqtable.table.states import INTEREST, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.table.wants import Call, Failure, Posted, Sleep

_WAITING: Final = State.WAITING
_READY: Final = State.READY
_CLOSED: Final = State.CLOSED
_AWAITS_ANY: Final = Event.AWAITS_ANY
_AWAITS_TURN: Final = Event.AWAITS_TURN
_AWAITS_INPUT: Final = Event.AWAITS_INPUT
_INTEREST: Final = INTEREST[State.WAITING]


class Starter(Protocol):
    """Begins what a want needs that the loop does not know: a connection, a handshake."""

    def begin(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        """Begin it. Returns the want to wait for, which is a `Begun`."""

    def adopt(self, origin: Entry, entry: Entry) -> None:
        """Take over the connections of the request `origin`, whose row in this table is `entry`."""


class BegunCall(Posted[Any]):
    """Waits for the result of a call that was begun as one of several wants."""

    __slots__ = ("_give_up", "call", "number", "result")

    awaits = _AWAITS_ANY

    def __init__(self, call: Call[Any], number: int) -> None:
        self.call = call
        self.number = number
        self.result: Any = MISSING
        self._give_up: Callable[[], Any] | None = None

    def began(self, give_up: Callable[[], Any]) -> None:
        """Note the function that gives the call up."""
        self._give_up = give_up

    def take(self, entry: Any) -> Any | Missing:
        self._give_up = None if self.result is not MISSING else self._give_up
        return self.call.take(self)  # type: ignore[arg-type]  # it takes `result`, which is here

    def give_up(self) -> None:
        if self._give_up is not None:
            self._give_up()

    def __repr__(self) -> str:
        return repr(self.call)


class Waiting:
    """Begins, polls for and ends the waits of WAITING requests. `steps` runs their steps."""

    def __init__(self, steps: Runner) -> None:
        self._steps = steps
        self.sides = Sides(steps)
        self.starter: Starter  # set by the engine, or by a private loop

    # -- a request begins to wait -------------------------------------------------------------------------------------

    def begin(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        """Begin what `want` needs: timers, calls, connections. Returns the want that the request waits for now."""
        reach = entry.reach = entry.reach or Reach()
        timeout = entry.timeout if want.is_timed else None
        reach.until = None if timeout is None else self._steps.table.now + timeout
        reach.wakes_at = inf
        if getattr(want, "is_begun", True):
            return want
        wants = want.wants if type(want) is Either else (want,)
        begun = tuple(self._begun(entry, each) for each in wants)
        reach.begun = tuple([each for each in begun if hasattr(each, "give_up")])
        reach.wakes_at = min([each.wakes_at for each in begun if type(each) is Sleeping], default=inf)
        if reach.begun:
            self._steps.mailbox.post(self.wake, entry, Event.RESULT_POSTED)  # some may have come about already
        return Either(begun, True) if type(want) is Either else begun[0]

    def _begun(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        steps = self._steps
        if isinstance(want, Sleep):
            return Sleeping(want.seconds, steps.table.now + want.seconds)
        if isinstance(want, Call):
            begun = BegunCall(want, entry.expect_result())
            try:
                begun.began(entry.policy.begin_call(entry, want))
            except Exception as problem:
                begun.result = Failure(problem)
            return begun
        if isinstance(want, Reaching) and not want.is_begun:
            return self.starter.begin(entry, want)
        return want

    def settle(self, entry: Entry, cause: Event, waits: bool) -> None:
        """Suspend `entry`: WAITING, or READY if its want must be asked again."""
        reach = entry.reach
        assert reach is not None
        output = entry.output
        if reach.connections and self.sides.flush_connections(reach):
            waits = waits and not reach.held_back
        if output.first is not None:
            is_taken = entry.transport.flush()
            if entry.state is _CLOSED:
                return
            if is_taken:
                waits = waits and not reach.held_back
            # The client may have taken output since, while the request was in another state.
            self.sides.note_output(entry, reach, is_taken, entry.bytes_out > reach.sent or reach.write_until is None)
        else:
            reach.write_until = None
        if not waits:
            self._steps.move(entry, cause, _AWAITS_TURN)
        elif entry.state is not _WAITING:
            self._steps.move(entry, cause, _AWAITS_ANY)
            self.sides.watch(entry)
        elif output.first is not None or not self.sides.is_watched(entry, entry.want):
            self.sides.watch(entry)
        if entry.held or output.first is not None or entry.input.data or not entry.input.is_stream:
            self._steps.count_buffers(entry)
            if self._steps.is_closed(entry):
                return
        self.sides.arm(entry)

    def may_send_meanwhile(self, entry: Entry, want: Want[Any]) -> bool:
        """Return whether `entry` waits for a step elsewhere, and takes its connections' input although output is left.

        Without connections, a request with unsent output is WRITING instead.
        """
        if want is not STEP or entry.reach is None or entry.output.first is None:
            return False
        entry.reach.end_timers()
        return bool(entry.reach.connections)

    # -- what ends a wait ---------------------------------------------------------------------------------------------

    def wake(self, entry: Entry, event: Event) -> None:
        """Have a WAITING request ask its want again, because of `event`. In any other state it will ask anyway."""
        if entry.state is _WAITING:
            reach = entry.reach
            assert reach is not None
            reach.held_back = False
            entry.active_at = self._steps.table.now
            if entry.want is ENDED:
                self._steps.finish(entry, event)
            else:
                self._steps.step(entry, event)

    def give(self, entry: Entry, side: object, item: Any, event: Event) -> bool:
        """Give a WAITING request `item`, which has come from `side`, if it is all that the request waits for.

        Returns False if it is not: then the item must be put where the want finds it. `Reaching.arrive` says what a
        side is.
        """
        reach = entry.reach
        if entry.state is not _WAITING or reach is None or reach.watched_for is None:
            return False
        item = reach.watched_for.arrive(reach, side, item)
        if item is MISSING:
            return False
        entry.active_at = self._steps.table.now
        self._steps.give(entry, event, item)
        return True

    def deliver(self, entry: Entry, number: int, item: Any) -> None:
        """Give `entry` the result of a call that it began as one of several wants. Drops the result of any other."""
        for each in entry.reach.begun if entry.reach is not None else ():
            if isinstance(each, BegunCall) and each.number == number:
                each.result = item
                entry.active_at = self._steps.table.now
                self.wake(entry, Event.RESULT_POSTED)

    def output_taken(self, entry: Entry) -> None:
        """Go on after the kernel has taken all output of one side, a request's or a connection's."""
        if entry.held:
            self._steps.count_buffers(entry)
        request = entry.parent if isinstance(entry, ConnectionRow) else entry
        if entry is not request:
            entry.deadline = None
            self.sides.watch_connection(entry)  # type: ignore[arg-type]
        if request is None or request.state is not _WAITING:
            return
        assert request.reach is not None
        request.reach.watched_for = None
        if request is entry:
            request.reach.write_until = None
        if request.reach.held_back or request.want is ENDED:
            self.wake(request, Event.OUTPUT_TAKEN)
        elif request is entry:
            self.sides.watch(request)
            self.sides.arm(request)

    def touched(self, entry: Entry) -> None:
        """Go on with a WAITING side to which another request's step has sent something, or told it something."""
        if entry.table is not self._steps.table:
            return  # a thread has taken the connection over
        if isinstance(entry, ConnectionRow) and entry.parent is not None and entry.parent.state is State.MOVING:
            self._steps.count_buffers(entry)  # its record has the output: the process that goes on sends it
            return
        self._flush(entry)
        reach = entry.reach
        if reach is None or not reach.told:
            return
        watched_for = reach.watched_for if entry.state is _WAITING else None
        item = MISSING if watched_for is None else watched_for.arrive(reach, Told, reach.told[0])
        if item is not MISSING:
            reach.told.popleft()  # not before: another thread might take its place in a full mailbox
            entry.active_at = self._steps.table.now
            self._steps.give(entry, Event.RESULT_POSTED, item)
        if reach.told:
            self.wake(entry, Event.RESULT_POSTED)

    def _flush(self, entry: Entry) -> None:
        """Flush a side to which a step has sent, and poll for what is left."""
        before = entry.bytes_out
        if entry.output.first is not None:
            is_taken = entry.transport.flush()
            if entry.state is _CLOSED:
                return
            if is_taken:
                self.output_taken(entry)
                return
            self.sides.output_moved(entry, entry.bytes_out > before)
            if isinstance(entry, ConnectionRow):
                self.sides.watch_connection(entry)
            elif not self._steps.is_closed(entry):
                self.sides.watch(entry)

    # -- deadlines ----------------------------------------------------------------------------------------------------

    def expire(self, entry: Entry) -> bool:
        """Continue a WAITING request whose deadline has passed. Returns False if its output was not taken in time."""
        reach, now = entry.reach, self._steps.table.now
        assert reach is not None
        if reach.write_until is not None and reach.write_until <= now:
            return False
        if reach.until is not None and reach.until <= now:
            reach.give_up()
            within = "in time" if entry.timeout is None else f"within {entry.timeout:g} s"
            error = TimedOut(f"{shown(entry.want)} did not come {within}")
            self._steps.step(entry, Event.DEADLINE_PASSED, error)
        else:
            self.wake(entry, Event.DEADLINE_PASSED)  # a sleep is over
        return True

    def expire_connection(self, row: ConnectionRow) -> None:
        """End a connection whose deadline has passed."""
        limits = self._steps.table.limits
        if row.state is State.CONNECTING:
            self.fail(row, ConnectFailed(row.address, f"not connected within {row.timeout:g} s", ETIMEDOUT))
        elif row.parent is None:
            self._steps.end(row, Event.RELEASED)  # it was idle for too long
        else:
            self.fail(row, TimedOut(f"{row.address} took none of its output for {limits.write_timeout_s:g} s"))

    # -- the end ------------------------------------------------------------------------------------------------------

    def fail(self, row: ConnectionRow, error: Exception) -> None:
        """End a connection because of `error`, which its request gets."""
        if row.failure is None:
            row.failure = error
            if not isinstance(error, ConnectFailed):
                error.connection = row.connection  # type: ignore[attr-defined]
        self._steps.end(row, Event.LOST)

    def must_finish_later(self, entry: Entry, cause: Event) -> bool:
        """Have a request that is done wait until its connections have taken their output. False if they have."""
        reach = entry.reach
        assert reach is not None
        for row in list(reach.connections):
            if row.output.first is not None:
                row.flush()
        if all(row.output.first is None for row in reach.connections):
            return False
        if entry.state is not _WAITING:
            self._steps.move(entry, cause, _AWAITS_ANY)
        reach.end_timers()
        if entry.output.first is not None:
            is_taken = entry.transport.flush()
            if entry.state is _CLOSED:
                return True
            self.sides.note_output(entry, reach, is_taken, entry.bytes_out > reach.sent or reach.write_until is None)
        else:
            reach.write_until = None
        self._steps.count_buffers(entry)
        if self._steps.is_closed(entry):
            return True
        self.sides.watch(entry)
        for row in list(reach.connections):
            if row.output.first is not None and isinstance(row, ConnectionRow):
                self.sides.output_moved(row, False)
        self.sides.arm(entry)
        return True

    def connection_ended(self, row: Entry) -> None:
        """Tell the request of a connection that the connection has ended, unless the request has ended it."""
        assert isinstance(row, ConnectionRow)
        request = row.parent
        if request is not None and request.reach is not None and request.table is self._steps.table:
            self.note_end(row)
            self._steps.mailbox.post(self.wake, request, Event.RESULT_POSTED)

    def note_end(self, row: ConnectionRow) -> None:
        """Note why a connection has ended, for its request, which does not have the connection any more."""
        assert row.parent is not None
        assert row.parent.reach is not None
        if row in row.parent.reach.connections:
            row.parent.reach.connections.remove(row)
        if row.failure is None:
            row.failure = ConnectionAbortedError(f"the connection to {row.address} was cancelled")
            row.failure.connection = row.connection  # type: ignore[attr-defined]
