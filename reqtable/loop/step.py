"""The steps of requests, and what a request waits for after them. `Steps.step` runs every step of every request.

The rules:

* In one pass a request gets at most `steps_per_pass` steps, one `recv` and `send_bytes` of output. After that it waits
  for its turn (READY) or for its peer (WRITING). So a client that pipelines, or that reads a long answer, does not
  starve other clients.
* Every event that ends a wait leads to a call of `step`: input, a deadline, a result, a turn.
* After its steps the request is suspended in the state of its next want, or it is finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from reqtable.loop.mailbox import Mailbox
from reqtable.loop.outputs import Outputs
from reqtable.loop.platform import System
from reqtable.loop.timeouts import Timeouts
from reqtable.loop.waiting import Waiting
from reqtable.table.engine_wants import ENDED, TURN, Sleeping
from reqtable.table.errors import HandlerError, IncompleteRead, LimitExceeded, ending_of
from reqtable.table.input import MISSING
from reqtable.table.limits import Limits
from reqtable.table.states import INTEREST, TRANSITIONS, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.table.wants import Call, Failure, HandOff, Sleep

# Every request uses these members. On Python 3.11 `State.READING` takes 100 ns to look up, a global name 10 ns.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_WAITING: Final = State.WAITING
_CLOSED: Final = State.CLOSED
_READY: Final = State.READY
_RUNNING: Final = State.RUNNING
_AWAITS_INPUT: Final = Event.AWAITS_INPUT
_AWAITS_ANY: Final = Event.AWAITS_ANY
_AWAITS_TURN: Final = Event.AWAITS_TURN
_OUTPUT_BLOCKED: Final = Event.OUTPUT_BLOCKED
_INPUT_ARRIVED: Final = Event.INPUT_ARRIVED
_AFTER_STEP: Final = TRANSITIONS[State.RUNNING]
_RESULT_WAITED_FOR = {Event.AWAITS_RESULT: State.OFFLOADED, Event.HANDED_OFF: State.DELEGATED}


class Steps(Outputs):
    """Runs the steps of the requests of one table. The base classes end requests."""

    def __init__(self, limits: Limits | None, system: System) -> None:
        super().__init__(limits, system)
        self.table.owner = self
        self.mailbox = Mailbox(system.clock, self.poller, self.failures)
        self.timeouts = Timeouts(self.table, self.deadlines)
        self.waiting = Waiting(self)
        self.on_connection_release.append(self.waiting.connection_ended)
        self.turns: deque[Entry] = deque()  # the READY entries, in order
        self.on_thaw: Callable[[Entry], Any] = bool  # called with a request that goes on, perhaps from another process
        self.send_share = self.table.limits.send_bytes  # bytes a request may send at once; 0: the pass has sent enough
        self.large_sends = 0  # how many large sends there have been
        self.spent = 0  # bytes of the large sends in this pass

    def set_limits(self, limits: Limits) -> None:
        """Apply `limits` from now on. A request that had no deadline, but has one by these limits, gets it."""
        was_unbounded = self.table.idle_is_unbounded
        self.table.set_limits(limits)
        self.send_share = limits.send_bytes
        if was_unbounded and not self.table.idle_is_unbounded:
            self.timeouts.arm_all()

    # -- one request --------------------------------------------------------------------------------------------------

    def begin(self, entry: Entry) -> None:
        """Run the first steps of `entry`, which is in the table already."""
        entry.advance(Event.OPENED)
        self.step(entry, Event.OPENED)
        if self.table.thread is None:
            self.reap()  # the loop does not run (a hook was called by hand), so no pass will reap

    def take_in(self, entry: Entry, data: bytes) -> None:
        """Give `entry`, which is READING a stream, `data`, which has arrived.

        This is the lean path: a whole item goes to the handler, and not through the input. If the request then waits
        for input again, and the kernel takes its answer at once, nothing is settled. All else is for `step`.
        reqtable/lean.c has the same path in C.
        """
        table = self.table
        entry.active_at = table.now
        entry.bytes_in += len(data)
        found = None if entry.input.data else entry.want.first(data)
        if type(found) is not tuple:
            self._keep(entry, data, found)
            return
        item, end = found
        want: Want[Any] | None = None
        ends_loop = False
        table.running = entry
        try:
            want = entry.resumable._resume(item)
        except BaseException as problem:
            ends_loop = self.fail(entry, problem)
        finally:
            table.running = None
        entry.steps += 1
        waits = want is entry.want or (want is not None and want.needs_bytes and want.awaits is _AWAITS_INPUT)
        if waits and end == len(data) and not entry.held and entry.state is _READING:
            entry.want = want  # type: ignore[assignment]  # not None. Before the flush, which may record the entry
            try:
                if entry.output.first is None or entry.transport.flush():
                    if table.idle_is_unbounded and entry.timeout is None:
                        entry.deadline = None  # fast path of arm
                    else:
                        self.timeouts.arm(entry)
                    return
            except BaseException as problem:
                self._stay_failed(entry, problem)
                return
        self._go_on(entry, want, data[end:], waits, ends_loop)

    def _stay_failed(self, entry: Entry, problem: BaseException) -> None:
        self.failures.outside_step(entry, problem)

    def _keep(self, entry: Entry, data: bytes, found: object) -> None:
        """Put `data` into the input of `entry`, whose want has `found` no item in it by itself."""
        entry.own_input().feed(data)
        if found is MISSING:
            self.leave(entry, _INPUT_ARRIVED, entry.want, False, True)
        else:
            self.step(entry, _INPUT_ARRIVED)

    def _go_on(self, entry: Entry, want: Want[Any] | None, rest: bytes, waits: bool, ends_loop: bool = False) -> None:
        """Go on after the step of the lean path, which left `rest` unread."""
        if rest:
            entry.own_input().feed(rest)
            waits = False
        has_enough = entry.output.held > self.table.limits.high_water_bytes
        if waits or want is None or has_enough or entry.state is _CLOSED:
            self.leave(entry, _INPUT_ARRIVED, want, True, waits, ends_loop)
        else:
            entry.want = want
            self.step(entry, _INPUT_ARRIVED, taken=1)

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None, taken: int = 0) -> None:
        """Run the steps of `entry` within its share of the pass, flush its output once, and settle it.

        `cause` is the event that ended its wait. If `error` is given, the first step gets it instead of an item.
        `taken` is how many steps the request has had in this pass already.
        """
        table = self.table
        table.running = entry
        want: Want[Any] | None = entry.want
        output, limits = entry.output, table.limits
        share = limits.steps_per_pass - taken
        first_share = share
        waits = ends_loop = False  # waits: its item has not arrived
        try:
            if error is not None:
                share -= 1
                want = self._throw(entry, error)
            while share > 0 and want is not None and entry.state is not _CLOSED:
                unread = entry.input
                if not unread.data and want.needs_bytes and unread.is_stream and not unread.ended:
                    waits = True
                    break
                try:
                    item = want.take(entry)
                except Exception as problem:
                    share -= 1
                    want = self._take_failed(entry, want, problem)
                    continue
                if item is MISSING:
                    if output.first is not None and want.awaits is _OUTPUT_BLOCKED:
                        break  # flush first, then wait for a turn: the peer may read as fast as the handler sends
                    if not (entry.input.ended and want.awaits is _AWAITS_INPUT):
                        waits = True
                        break
                    share -= 1
                    want = self._throw(entry, IncompleteRead(want, entry.input.leftover()))
                    continue
                share -= 1
                want = entry.resumable._resume(item)
                if output.held > limits.high_water_bytes:
                    break
        except BaseException as problem:
            want = None
            ends_loop = self.fail(entry, problem)
        finally:
            table.running = None
        entry.steps += first_share - share
        self.leave(entry, cause, want, taken > 0 or share < first_share, waits, ends_loop)

    def give(self, entry: Entry, cause: Event, item: Any) -> None:
        """Run one step of a WAITING entry with `item`, which has come whole, and settle the entry.

        fast path of step: the item does not go through the input, and a want that is waited for again is not asked.
        """
        want: Want[Any] | None = None
        ends_loop = False
        self.table.running = entry
        try:
            want = entry.resumable._resume(item)
        except BaseException as problem:
            ends_loop = self.fail(entry, problem)
        finally:
            self.table.running = None
        entry.steps += 1
        waits = want is not None and self.waiting.sides.is_watched(entry, want)
        self.leave(entry, cause, want, True, waits, ends_loop)

    def leave(
        self,
        entry: Entry,
        cause: Event,
        want: Want[Any] | None,
        stepped: bool,
        waits: bool,
        ends_loop: bool = False,
    ) -> None:
        """Settle `entry` after its steps, unless they have closed it. If `ends_loop`, raise what a step has raised."""
        if entry.state is not _CLOSED:
            try:
                self._settle(entry, cause, want, stepped, waits)
            except BaseException as problem:
                self.failures.outside_step(entry, problem)
        else:
            self.poller.end_if_copy()
        if ends_loop and self.failures.unwinding is not None:
            raise self.failures.unwinding

    @staticmethod
    def _throw(entry: Entry, problem: BaseException) -> Want[Any] | None:
        """Give a step `problem` instead of an item. If the step ends the request, `problem` says how it ended."""
        want = entry.resumable._throw(problem)
        if want is None:
            entry.ending = ending_of(problem)
        return want

    def _take_failed(self, entry: Entry, want: Want[Any], problem: Exception) -> Want[Any] | None:
        """Tell the handler that `want.take` raised `problem`. Raises HandlerError if it would be told for ever."""
        if isinstance(problem, LimitExceeded):
            refused = entry if problem.connection is None else problem.connection.row
            self.table.note_refusal(refused, want)
        elif isinstance(problem, HandlerError) and entry.reach is not None:
            entry.reach.note_mistake(problem)
        return self._throw(entry, problem)

    def _settle(self, entry: Entry, cause: Event, want: Want[Any] | None, stepped: bool, waits: bool) -> None:
        """Suspend `entry` in the state of its next want, or finish it."""
        if want is None:
            self.finish(entry, cause)
            return
        if want.awaits is not _AWAITS_INPUT:
            if stepped:
                want = self._begin_wait(entry, want)
            if want.awaits is _AWAITS_ANY or self.waiting.may_send_meanwhile(entry, want):
                entry.want = want
                self.waiting.settle(entry, cause, waits)
                return
        entry.want = want
        if entry.output.first is not None and not entry.transport.flush():
            if entry.state is _CLOSED:
                return
            event = _OUTPUT_BLOCKED
        else:
            event = want.awaits if waits else _AWAITS_TURN
        if entry.state is not _AFTER_STEP[event] or event is _AWAITS_TURN:
            self.move(entry, cause, event)
        unread = entry.input
        if entry.held or event is _OUTPUT_BLOCKED or unread.data or not unread.is_stream:
            self.count_buffers(entry)
            if self.is_closed(entry):
                return
        # Bytes that trickle in do not move the deadline. A wait for the peer to take output has a deadline of its own.
        if stepped or cause is not _INPUT_ARRIVED or entry.state is _WRITING:
            self.timeouts.arm(entry)
        elif waits and entry.timeout is None and entry.state is _READING and want.is_timed:
            self.timeouts.arm_partial(entry)

    def move(self, entry: Entry, cause: Event, event: Event) -> None:
        """Move `entry` from the state that `cause` ends, through RUNNING, to the state that `event` begins."""
        if entry.state is not _RUNNING:
            entry.advance(cause)
        entry.advance(event)
        entry.transport.watch(INTEREST[entry.state])
        if entry.state is _READY:
            self.turns.append(entry)

    def _begin_wait(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        """Start what `entry` waits for: a timer, a call, a hand-off. Returns the want that it waits for now."""
        if want.awaits is _AWAITS_ANY:
            return self.waiting.begin(entry, want)
        if isinstance(want, Sleep):
            return Sleeping(want.seconds, self.table.now + want.seconds)
        if isinstance(want, Call | HandOff):
            number = entry.expect_result()
            try:
                if isinstance(want, HandOff):
                    return entry.policy.hand_off(entry, want)
                self.give_ups[entry] = entry.policy.begin_call(entry, want)
            except Exception as problem:
                self.post_result(entry, number, Failure(problem))
        return want

    def finish(self, entry: Entry, cause: Event) -> None:
        if entry.state is _CLOSED:
            return
        entry.want = ENDED
        if entry.reach is not None and self.waiting.must_finish_later(entry, cause):
            return
        blocked = entry.output.first is not None and not entry.transport.flush()
        if self.is_closed(entry):
            return
        if blocked:
            self.move(entry, cause, _OUTPUT_BLOCKED)
            self.count_buffers(entry)
            if not self.is_closed(entry):
                self.timeouts.arm(entry)
            return
        if entry.state is not _RUNNING:
            entry.advance(cause)
        entry.transport.finish()

    def fail(self, entry: Entry, problem: BaseException) -> bool:
        """Report `problem`, which a step raised and the handler did not catch. Earlier output is still delivered.

        Returns whether an exception, `failures.unwinding`, ends the loop. No caller keeps it in a local name: its
        traceback holds the caller's frame, and the cycle would keep the request's socket open.
        """
        self.table.running = None
        self.poller.end_if_copy(problem)
        entry.ending = ending_of(problem)
        return self.failures.report(entry.server, entry.transport.request, entry.peer, problem, entry.id) is not None

    # -- what ends a wait ---------------------------------------------------------------------------------------------

    def output_taken(self, entry: Entry) -> None:
        """Continue a WRITING entry: its peer has taken all of its output."""
        if entry.want is ENDED:
            self.finish(entry, Event.OUTPUT_TAKEN)
        else:
            self.step(entry, Event.OUTPUT_TAKEN)

    def output_moved(self, entry: Entry) -> None:
        """Renew the deadline of a WRITING entry: its peer has taken some of its output."""
        self.count_buffers(entry)
        if not self.is_closed(entry):
            self.timeouts.arm(entry)

    def post_result(self, entry: Entry, number: int, item: Any) -> None:
        """Have the loop give `entry` the result of its call `number`. Callable from any thread."""
        self.mailbox.post(self.deliver, entry, number, item)

    def deliver(self, entry: Entry, number: int, item: Any) -> None:
        """Give `entry` the result of its call `number`. Drops the result if `entry` no longer waits for it."""
        waits_in = _RESULT_WAITED_FOR.get(entry.want.awaits)
        if entry.call_number != number or waits_in is None or entry.state is _CLOSED:
            self.waiting.deliver(entry, number, item)
            return
        self.give_ups.pop(entry, None)
        entry.result = item
        entry.active_at = self.table.now
        if entry.state in (waits_in, _WAITING):  # a READY or WRITING entry takes the result in its next step
            self.step(entry, Event.RESULT_POSTED)

    def take_turns(self) -> None:
        """Step the READY entries, until the pass has sent enough."""
        for _ in range(len(self.turns)):
            if not self.send_share:
                break
            entry = self.turns.popleft()
            if entry.state is _READY:
                if entry.want is TURN:
                    entry.result = None
                self.step(entry, Event.TURN_CAME)

    # -- the budget of a pass -----------------------------------------------------------------------------------------

    def spend(self, count: int) -> None:
        """Take `count` sent bytes from the budget of the pass, so that large answers do not make it long."""
        limits = self.table.limits
        self.spent += count
        self.large_sends += 1
        self.send_share = max(0, min(limits.send_bytes, limits.pass_bytes - self.spent))

    def renew_budget(self) -> None:
        """Restore the budget for a new pass."""
        self.spent = 0
        self.send_share = self.table.limits.send_bytes

    # -- from other threads -------------------------------------------------------------------------------------------

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self.mailbox.post(function, *args)
