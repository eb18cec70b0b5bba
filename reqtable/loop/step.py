"""One request: its steps, and what it waits for afterwards. Every step of every request goes through `Steps.step`.

The rules:

* A request gets `steps_per_pass` steps, one `recv` and `send_bytes` of a pass. Then it waits for its turn as READY, or
  to write on. So a client that pipelines, or that takes a long answer, does not starve the others.
* What ends a wait calls `step` with the event: an input that arrived, a deadline, a result, a turn.
* After a step the request is suspended in the state of what it now waits for, or it is finished.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from reqtable.loop.ending import Endings
from reqtable.loop.mailbox import Mailbox
from reqtable.loop.platform import System
from reqtable.loop.timeouts import Timeouts
from reqtable.table.buffers import MISSING
from reqtable.table.compiled import mypyc_attr
from reqtable.table.engine_wants import ENDED, TURN
from reqtable.table.errors import IncompleteRead, LimitExceeded, ending_of
from reqtable.table.limits import Limits
from reqtable.table.states import INTEREST, TRANSITIONS, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import Call, Failure, HandOff, Sleep, Want

# On the path of every request: looking a member up in its Enum takes 100 ns on Python 3.11, a name 10.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_CLOSED: Final = State.CLOSED
_READY: Final = State.READY
_RUNNING: Final = State.RUNNING
_AWAITS_INPUT: Final = Event.AWAITS_INPUT
_AWAITS_TURN: Final = Event.AWAITS_TURN
_OUTPUT_BLOCKED: Final = Event.OUTPUT_BLOCKED
_INPUT_ARRIVED: Final = Event.INPUT_ARRIVED
_AFTER_STEP: Final = TRANSITIONS[State.RUNNING]
# The states in which another request's `send` may find this one with nothing on its way to the kernel.
_BLOCKABLE = {State.READING, State.READY, State.SLEEPING, State.OFFLOADED}
_RESULT_WAITED_FOR = {Event.AWAITS_RESULT: State.OFFLOADED, Event.HANDED_OFF: State.DELEGATED}


@mypyc_attr(allow_interpreted_subclasses=True)
class Steps(Endings):
    """Steps the requests of one table. Ending them is in the base class."""

    def __init__(self, limits: Limits | None, system: System) -> None:
        super().__init__(limits, system)
        self.table.owner = self
        self.mailbox = Mailbox(system.clock, self.poller, self.failures)
        self.timeouts = Timeouts(self.table, self.deadlines)
        self.turns: deque[Entry] = deque()  # of those that are READY
        self.relieve: Callable[[], Any] = bool  # called while more is buffered than may be
        self.send_share = self.table.limits.send_bytes  # what a request may send at once; 0: enough has been, this pass
        self.spenders = 0  # how often a request has sent much
        self.spent = 0  # bytes that those sent in this pass

    def set_limits(self, limits: Limits) -> None:
        """Hold to other limits from here on."""
        self.table.set_limits(limits)
        self.send_share = limits.send_bytes

    # -- one request --------------------------------------------------------------------------------------------------

    def begin(self, entry: Entry) -> None:
        """Run the first steps of `entry`, which is in the table."""
        entry.advance(Event.OPENED)
        self.step(entry, Event.OPENED)
        if self.table.thread is None:
            self.reap()  # a hook was called by hand; no pass will come along to do it

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None) -> None:
        """Run the steps of `entry` within its share of the pass; flush once; settle. `cause` is what ended its wait.

        With `error`, the first step is given that instead of its item.
        """
        table = self.table
        table.running = entry
        resumable = entry.resumable
        want: Want[Any] | None = entry.want
        unread, output = entry.input, entry.output
        share = full_share = table.limits.steps_per_pass
        waits = idle = False  # its want has not come; nor has anything else of its peer
        ends_loop: BaseException | None = None
        try:
            if error is not None:
                share -= 1
                want = self._throw(entry, error)
            while share and want is not None and entry.state is not _CLOSED:
                if not unread.data and want.needs_bytes and unread.is_stream and not unread.ended:
                    waits = idle = True
                    break
                try:
                    item = want.take(entry)
                except Exception as problem:
                    share -= 1
                    want = self._take_failed(entry, want, problem)
                    continue
                if item is MISSING:
                    if output.first is not None and want.awaits is _OUTPUT_BLOCKED:
                        break  # once it is flushed it waits its turn: it may be taken from as fast as it sends
                    if not (unread.ended and want.awaits is _AWAITS_INPUT):
                        waits = True
                        idle = not (unread.data or unread) and want.awaits is _AWAITS_INPUT and share < full_share
                        break
                    share -= 1
                    want = self._throw(entry, IncompleteRead(want, unread.leftover()))
                    continue
                share -= 1
                want = resumable._resume(item)
                if output.held > table.limits.high_water_bytes:
                    break
        except BaseException as problem:
            self.poller.end_if_copy(problem)
            want = None
            ends_loop = self._fail(entry, problem)
        finally:
            table.running = None
        entry.steps += full_share - share
        if entry.state is not _CLOSED:
            try:
                # fast path of _settle: it is answered, and waits for its peer as it did before
                waits_on = idle and entry.state is _READING and not entry.held
                if waits_on and (output.first is None or entry.transport.flush()):
                    entry.want = want  # type: ignore[assignment]  # it waits for it
                    if table.unbounded and entry.timeout is None and unread.is_stream:
                        entry.deadline = None
                    else:
                        self.timeouts.arm(entry)
                    return
                self._settle(entry, cause, want, share < full_share, waits)
            except BaseException as problem:
                self.failures.outside_step(entry, problem)
        else:
            self.poller.end_if_copy()
        if ends_loop is not None:
            try:
                raise ends_loop
            finally:
                ends_loop = None  # see Failures.outside_step

    @staticmethod
    def _throw(entry: Entry, problem: BaseException) -> Want[Any] | None:
        """Give a step an error instead of its item. A request that ends by it, however politely, ended so."""
        want = entry.resumable._throw(problem)
        if want is None:
            entry.ending = ending_of(problem)
        return want

    def _take_failed(self, entry: Entry, want: Want[Any], problem: Exception) -> Want[Any] | None:
        """Taking its item raised `problem`: the handler is told. Raises HandlerError where it was told of it before."""
        if isinstance(problem, LimitExceeded):
            self.table.refuse(entry, want)
        return self._throw(entry, problem)

    def _settle(self, entry: Entry, cause: Event, want: Want[Any] | None, stepped: bool, waits: bool) -> None:
        """Suspend `entry` in the state of what it now waits for, or end it."""
        if want is None:
            self._finish(entry, cause)
            return
        if stepped and want.awaits is not _AWAITS_INPUT:
            want = self._begin_wait(entry, want)
        entry.want = want
        if entry.output.first is not None and not entry.transport.flush():
            if entry.state is _CLOSED:
                return
            event = _OUTPUT_BLOCKED
        else:
            event = want.awaits if waits else _AWAITS_TURN
        if entry.state is not _AFTER_STEP[event] or event is _AWAITS_TURN:
            self._move(entry, cause, event)
        unread = entry.input
        if entry.held or event is _OUTPUT_BLOCKED or unread.data or not unread.is_stream:
            self.count_buffers(entry)
            if self.is_closed(entry):
                return
        # Bytes that trickle in do not move a deadline; having to write is a wait of its own.
        if stepped or cause is not _INPUT_ARRIVED or entry.state is _WRITING:
            self.timeouts.arm(entry)
        elif waits and entry.timeout is None and entry.state is _READING and want.is_timed:
            self.timeouts.arm_partial(entry)

    def count_buffers(self, entry: Entry) -> None:
        """What is held for a while is counted; what comes and goes in a pass is not."""
        self.table.hold(entry, len(entry.input) + entry.output.held)
        most = self.table.limits.buffered_bytes_max
        if most is not None and self.table.buffered > most:
            self.relieve()

    def _move(self, entry: Entry, cause: Event, event: Event) -> None:
        """From the state that `cause` ends, through RUNNING, to the one that `event` begins."""
        if entry.state is not _RUNNING:
            entry.advance(cause)
        entry.advance(event)
        entry.transport.watch(INTEREST[entry.state])
        if entry.state is _READY:
            self.turns.append(entry)

    def _begin_wait(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        """Start what runs while `entry` waits: a timer, a call, the rest of it. Returns what it waits for now."""
        if isinstance(want, Sleep):
            entry.wakes_at = self.table.now + want.seconds
        elif isinstance(want, Call | HandOff):
            number = entry.begin_call()
            try:
                if isinstance(want, HandOff):
                    return entry.policy.hand_off(entry, want)
                self.calls[entry] = entry.policy.begin_call(entry, want)
            except Exception as problem:
                self.post_result(entry, number, Failure(problem))
        return want

    def _finish(self, entry: Entry, cause: Event) -> None:
        """The request is done: end its connection once its output is with the kernel."""
        if entry.state is _CLOSED:
            return
        entry.want = ENDED
        blocked = entry.output.first is not None and not entry.transport.flush()
        if self.is_closed(entry):
            return
        if blocked:
            self._move(entry, cause, _OUTPUT_BLOCKED)
            self.count_buffers(entry)
            if not self.is_closed(entry):
                self.timeouts.arm(entry)
            return
        if entry.state is not _RUNNING:
            entry.advance(cause)
        entry.transport.finish()

    def _fail(self, entry: Entry, problem: BaseException) -> BaseException | None:
        """A step raised `problem` and no hook of the handler took it. What it sent before is still delivered.

        Returns what ends the loop.
        """
        entry.ending = ending_of(problem)
        self.table.running = None
        return self.failures.report(entry.server, entry.transport.request, entry.peer, problem)

    # -- what ends a wait ---------------------------------------------------------------------------------------------

    def output_taken(self, entry: Entry) -> None:
        """The peer has taken all the output of a WRITING entry."""
        if entry.want is ENDED:
            self._finish(entry, Event.OUTPUT_TAKEN)
        else:
            self.step(entry, Event.OUTPUT_TAKEN)

    def output_moved(self, entry: Entry) -> None:
        """The peer has taken some of it."""
        self.count_buffers(entry)
        if not self.is_closed(entry):
            self.timeouts.arm(entry)

    def post_result(self, entry: Entry, number: int, item: Any) -> None:
        """Have the loop give `entry` the result of its call `number`. Callable from any thread."""
        self.mailbox.post(self.deliver, entry, number, item)

    def deliver(self, entry: Entry, number: int, item: Any) -> None:
        """The result of call `number` of `entry`; dropped where it no longer waits for it."""
        waits_in = _RESULT_WAITED_FOR.get(entry.want.awaits)
        if entry.calls != number or waits_in is None or entry.state is _CLOSED:
            return
        self.calls.pop(entry, None)
        entry.result = item
        entry.active_at = self.table.now
        if entry.state is waits_in:  # READY and WRITING find it when they go on
            self.step(entry, Event.RESULT_POSTED)

    def take_turns(self) -> None:
        """Step those that are READY, while anything may be sent."""
        for _ in range(len(self.turns)):
            if not self.send_share:
                break
            entry = self.turns.popleft()
            if entry.state is _READY:
                if entry.want is TURN:
                    entry.result = None
                self.step(entry, Event.TURN_CAME)

    def flush_touched(self) -> None:
        """Give to the kernel what a step has sent to other requests than its own."""
        while self.table.touched:
            self._flush_touched(self.table.touched.pop())

    def _flush_touched(self, entry: Entry) -> None:
        """Another request's step sent to this one: give it to the kernel, or wait for the peer to take it."""
        try:
            if entry.state is _WRITING:
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
            self.turns.remove(entry)  # else, were it READY again by then, it would have two turns in one pass
        entry.advance(_OUTPUT_BLOCKED)
        entry.transport.watch(INTEREST[entry.state])
        self.count_buffers(entry)
        if not self.is_closed(entry):
            self.timeouts.arm(entry)

    # -- the budget of a pass -----------------------------------------------------------------------------------------

    def spend(self, count: int) -> None:
        """A request has sent `count` bytes. Others shall not wait for a thousand of its kind, in one pass."""
        limits = self.table.limits
        self.spent += count
        self.spenders += 1
        self.send_share = max(0, min(limits.send_bytes, limits.pass_bytes - self.spent))

    def renew_budget(self) -> None:
        """A pass begins: much may be sent again."""
        self.spent = 0
        self.send_share = self.table.limits.send_bytes

    # -- from other threads -------------------------------------------------------------------------------------------

    def cancel(self, entry: Entry) -> None:
        if self.in_other_thread:
            self.mailbox.post(self.end, entry, Event.CANCELLED)
        else:
            super().cancel(entry)

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self.mailbox.post(function, *args)

    def give_way(self) -> None:
        """Let another thread run: the one that runs the loop, where this is not it."""
        time.sleep(0)  # it releases the interpreter's lock, which is else handed over every 5 ms
