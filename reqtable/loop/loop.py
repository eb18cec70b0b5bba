"""The loop: which request to work on next, and whether to take a new one.

The rules:

* One pass is `run_once`: poll, step what is ready, give the waiting their turn, expire deadlines, take what was
  posted, reap what has closed. Every step of every request goes through `step`.
* A request gets `steps_per_pass` steps, one `recv` and `send_bytes` of a pass, then waits its turn as READY, or to
  write on: a client that pipelines, or that takes a long answer, does not starve the others.
* Deadlines of a moment are as many as there are requests: a bounded number expires in a pass, and the next one does not
  wait in its poll. Freeing is not bounded: whatever closed an entry in this pass has cost as much.
* Nothing is freed in mid-pass: an earlier event of a batch may close an entry whose own event comes later. Closing
  marks; reaping frees.
* The loop never blocks but in its poll, and everything that can end a wait can end the poll: a socket, a deadline, or
  a wake-up from another thread or a signal.
* Clock, selector, wake-up and sockets come from the `System` that it is given, so that a simulation can own them.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sized
from heapq import heappop, heappush
from math import inf
from operator import length_hint
from typing import Any, Final

from reqtable.loop.failures import Failures
from reqtable.loop.platform import System
from reqtable.loop.process import TABLES, Process, end_child
from reqtable.loop.selector import Ready, ready_of
from reqtable.loop.timeouts import Timeouts
from reqtable.loop.wakeup import Wakeup
from reqtable.net.listener import Listener
from reqtable.net.transports import OVER, RELEASED, abandon
from reqtable.server.invariants import Invariants
from reqtable.server.stats import LoopTimes
from reqtable.table.buffers import MISSING
from reqtable.table.compiled import mypyc_attr
from reqtable.table.deadlines import Deadlines
from reqtable.table.errors import IncompleteRead, LimitExceeded, ReqtableError, ending_of
from reqtable.table.limits import Limits
from reqtable.table.states import INTEREST, READ, TRANSITIONS, Event, State
from reqtable.table.table import Entry, RequestTable, Server
from reqtable.table.wants import ENDED, TURN, Call, Failure, HandOff, Sleep, Want

log = logging.getLogger("reqtable")

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
_RETRY_S = 0.005
_PATIENCE_MAX_S = 86_400.0  # a poll of more overflows what the kernel takes
# The states in which another request's `send` may find this one with nothing on its way to the kernel.
_BLOCKABLE = {State.READING, State.READY, State.SLEEPING, State.OFFLOADED}
_RESULT_WAITED_FOR = {Event.AWAITS_RESULT: State.OFFLOADED, Event.HANDED_OFF: State.DELEGATED}

_ENDING = {Event.CANCELLED: "cancelled", Event.LOST: "reset"}


@mypyc_attr(allow_interpreted_subclasses=True)
class Loop:
    """The loop over one table. Its selector and its wake-up are made when it first needs them."""

    def __init__(self, limits: Limits | None, system: System) -> None:
        self.system = system
        self.table = RequestTable(system.clock, limits)
        self.table.owner = self
        self.limits: Limits
        self.unbounded: bool  # a peer of which nothing is waiting may be silent for ever
        self.set_limits(self.table.limits)
        self.deadlines = Deadlines()
        self.timeouts = Timeouts(self)
        self.servers: list[Server] = []
        self.in_child: list[Callable[[], Any]] = []  # called in a forked child, which leaves all of this behind
        self.clock = system.clock
        self._selector: selectors.BaseSelector | None = None
        self._poll: Callable[[float | None], Ready]
        self._wakeup: Wakeup | None = None
        self._forks = -1  # `Process.forks` of the process that opened the loop; -1: none has
        self._listeners: list[Listener] = []
        self._ready: Iterator[tuple[Any, int]] = iter(())  # what the poll found and nobody has looked at yet
        self._turns: deque[Entry] = deque()
        self._timers: list[tuple[float, int, Callable[[], Any]]] = []
        self._timers_set = 0  # breaks ties, so that functions are never compared
        self._posts: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._closed: list[Entry] = []
        self._calls: dict[Entry, Callable[[], Any]] = {}  # what gives up the call that an entry waits for
        self.invariants = Invariants(self) if os.environ.get("REQTABLE_DEBUG", "0") != "0" else None
        self.times = LoopTimes()
        self._spent = 0  # bytes of this pass, by those who send much
        self._spenders = 0
        self.failures = Failures(self)
        self._stop: Callable[[], Any] = bool

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], Any], most_s: float | None = None, until: float | None = None) -> None:
        """Make passes until `stop()` is true, looking at least every `most_s` seconds, or until that time has come.

        One thread at a time: raises ReqtableError while another one, or this one, is in it.
        """
        self.must_be_idle()
        self.failures.unwinding = None
        self.open()
        assert self._wakeup is not None
        self.table.thread = threading.get_ident()
        self._stop = stop
        outer = TABLES.get(self.table.thread)  # a child that was forked in a pass drives its request inside that pass
        TABLES[self.table.thread] = self.table
        try:
            with self._wakeup.on_signals():
                while not stop():
                    self.run_once(most_s if until is None else max(0.0, until - self.clock()))
                    self.end_if_copy()
                    if until is not None and self.clock() >= until:
                        break
        except BaseException as problem:
            self.end_if_copy(problem)
            raise
        finally:
            try:
                self._reap()
            finally:
                self.failures.unwinding = None
                if outer is None:
                    TABLES.pop(threading.get_ident(), None)
                else:
                    TABLES[threading.get_ident()] = outer
                self.table.thread = None

    def run_once(self, most_s: float | None = None) -> None:
        """One pass. It waits at most `most_s` seconds for something to do; None: as long as it takes."""
        assert self._selector is not None
        ready = self._poll(self._patience(most_s))
        now = self.table.now = self.clock()
        if self._spent:
            self._spent = 0
            self.send_share = self.limits.send_bytes
            ready = self._rotated(ready)
        self._ready = iter(ready)
        for target, mask in self._ready:
            try:
                target.on_ready(mask)
            except BaseException as problem:
                self.failures.outside_step(getattr(target, "entry", None), problem)
        self.end_if_copy()
        for _ in range(len(self._turns)):
            if not self.send_share:
                break
            self._take_turn(self._turns.popleft())
        if self.deadlines.next_at() <= now:
            self.timeouts.expire_due(now)
        while self._timers and self._timers[0][0] <= now:
            self._run_timer()
        for _ in range(len(self._posts)):
            self._run_post()
        while self.table.touched:
            self._flush_touched(self.table.touched.pop())
        freed = self._reap()
        for listener in self._listeners:
            listener.consider(now, freed)
        for server in tuple(self.servers):
            server.service_actions()
        self.times.add(self.clock() - now)
        if self.invariants is not None:
            self.invariants.check()

    def spend(self, count: int) -> None:
        """A request has sent so much. Others shall not wait for a thousand of its kind, in one pass."""
        self._spent += count
        self._spenders += 1
        self.send_share = max(0, min(self.limits.send_bytes, self.limits.pass_bytes - self._spent))

    def _rotated(self, ready: Ready) -> Ready:
        """Who was left out of the pass before comes first: epoll(7) names those that are ready in the same order."""
        first = self._spenders % max(1, len(ready))
        return ready[first:] + ready[:first]

    def _patience(self, most_s: float | None) -> float | None:
        """How long the poll may last: not at all while there is something to do, else until the next deadline."""
        if self._turns or self._posts or self._closed or self.table.touched:
            return 0
        at = self._due_at()
        if at == inf:
            return most_s
        wait = max(0.0, min(at - self.clock(), _PATIENCE_MAX_S))
        return wait if most_s is None else min(wait, most_s)

    def next_at(self) -> float:
        """When it has to do something by itself, on its clock; infinity where nothing is due, ever."""
        return self.table.now if self._patience(None) == 0 else self._due_at()

    def _due_at(self) -> float:
        at = self.deadlines.next_at()
        if self._timers:
            at = min(at, self._timers[0][0])
        for listener in self._listeners:
            at = min(at, listener.resting_until)
        return at

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None) -> None:
        """Run the steps of `entry` whose input is there, within its share of the pass; flush once; settle.

        `cause` is what ended its wait; with `error`, that is what the first step is given instead of its item.
        """
        table = self.table
        table.running = entry
        resumable = entry.resumable
        want: Want[Any] | None = entry.want
        unread, output = entry.input, entry.output
        limits = self.limits
        high_water = limits.high_water_bytes
        share = full_share = limits.steps_per_pass
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
                    if isinstance(problem, LimitExceeded):
                        table.refuse(entry, want)
                    want = self._throw(entry, problem)
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
                if output.held > high_water:
                    break
        except BaseException as problem:
            self.end_if_copy(problem)
            want = None
            ends_loop = self._fail(entry, problem)
        finally:
            table.running = None
        entry.steps += full_share - share
        if entry.state is not _CLOSED:
            try:
                # The common case of what `_settle` does: it is answered, and waits for its peer as it did before.
                if (
                    idle
                    and entry.state is _READING
                    and not entry.held
                    and (output.first is None or entry.transport.flush())
                ):
                    entry.want = want  # type: ignore[assignment]  # it waits for it
                    if self.unbounded and entry.timeout is None and unread.is_stream:
                        entry.deadline = None
                    else:
                        self.timeouts.arm(entry)
                    return
                self._settle(entry, cause, want, share < full_share, waits)
            except BaseException as problem:
                self.failures.outside_step(entry, problem)
        else:
            self.end_if_copy()
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
        most = self.limits.buffered_bytes_max
        if most is not None and self.table.buffered > most:
            self.relieve()

    def relieve(self) -> None:
        """More is buffered than may be."""

    def _move(self, entry: Entry, cause: Event, event: Event) -> None:
        """From the state that `cause` ends, through RUNNING, to the one that `event` begins."""
        if entry.state is not _RUNNING:
            entry.advance(cause)
        entry.advance(event)
        entry.transport.poll(INTEREST[entry.state])
        if entry.state is _READY:
            self._turns.append(entry)

    def _begin_wait(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        """Start what runs while `entry` waits: a timer, a call, the rest of it. Returns what it waits for now."""
        if isinstance(want, Sleep):
            entry.posted = self.table.now + want.seconds
        elif isinstance(want, Call | HandOff):
            number = entry.begin_call()
            try:
                if isinstance(want, HandOff):
                    return entry.policy.hand_off(entry, want)
                self._calls[entry] = entry.policy.begin_call(entry, want)
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

    def enter(self, entry: Entry) -> None:
        """Admit `entry` to the table."""
        self.table.add(entry)

    def begin(self, entry: Entry) -> None:
        """Run the first steps of `entry`, which is admitted to the table if it is not in it yet."""
        if not entry.id:
            self.enter(entry)
        entry.advance(Event.OPENED)
        self.step(entry, Event.OPENED)
        if self.table.thread is None:
            self._reap()  # a hook was called by hand; no pass will come along to do it

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

    def linger(self, entry: Entry) -> None:
        """Our last byte is sent: wait a bounded time for the peer's end of file, so that no reset cuts it off."""
        if entry.state is _CLOSED:
            return
        entry.advance(Event.FINISHED)
        entry.input.leftover()  # nobody will read it
        self.table.hold(entry, 0)
        entry.transport.poll(INTEREST[entry.state])
        self.deadlines.arm(entry, self.table.now + self.limits.linger_timeout_s)
        ends_loop = self._close_handler(entry, entry.transport.request)
        if ends_loop is not None:
            try:
                raise ends_loop
            finally:
                ends_loop = None  # see Failures.outside_step

    def end(self, entry: Entry, event: Event) -> None:
        """Mark `entry` closed by `event`; this pass's reaping frees it. Closed already: nothing."""
        if entry.state is not _CLOSED:
            if entry.ending is None and not (entry.state is State.LINGERING and event is Event.CANCELLED):
                entry.ending = _ENDING.get(event)  # one that lingers is done, and only its connection ends
            self._closed.append(entry)
            entry.advance(event)

    def cancel(self, entry: Entry) -> None:
        """End a request, from any thread: what it had not sent is dropped. In a forked child it is the parent's."""
        if self.is_copy:
            return
        if self.table.thread is None:
            self.end(entry, Event.CANCELLED)
            self._reap()
        elif self.table.thread == threading.get_ident():
            self.end(entry, Event.CANCELLED)
        else:
            self.post(self.end, entry, Event.CANCELLED)

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self._posts.append((function, args))
        self.wake()

    def post_result(self, entry: Entry, number: int, item: Any) -> None:
        """Have the loop give `entry` the result of its call `number`. Callable from any thread."""
        self.post(self.deliver, entry, number, item)

    def deliver(self, entry: Entry, number: int, item: Any) -> None:
        """The result of call `number` of `entry`; dropped where it no longer waits for it."""
        waits_in = _RESULT_WAITED_FOR.get(entry.want.awaits)
        if entry.calls != number or waits_in is None or entry.state is _CLOSED:
            return
        self._calls.pop(entry, None)
        entry.posted = item
        entry.active_at = self.table.now
        if entry.state is waits_in:  # READY and WRITING find it when they go on
            self.step(entry, Event.RESULT_POSTED)

    def give_way(self) -> None:
        """Let another thread run: the one that runs the loop, where this is not it."""
        time.sleep(0)  # it releases the interpreter's lock, which is else handed over every 5 ms

    def retry(self, function: Callable[[], Any], in_s: float = _RETRY_S) -> None:
        """Have the loop call `function` in a moment. Only for the loop's own thread."""
        self._timers_set += 1
        heappush(self._timers, (self.table.now + in_s, self._timers_set, function))

    def wake(self) -> None:
        """End the poll. Callable from any thread and from a signal handler."""
        wakeup = self._wakeup  # another thread may be closing it
        if wakeup is not None and not self.is_copy:
            wakeup.wake()

    def _run_timer(self) -> None:
        due_at, _, function = heappop(self._timers)
        self.times.add_lag(self.clock() - due_at)
        self._run(function)

    def _run_post(self) -> None:
        post, args = self._posts.popleft()
        self._run(post, *args)

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        """Call what was asked for; what it raises ends no loop."""
        try:
            function(*args)
        except BaseException as problem:
            self.failures.outside_step(None, problem)
        self.end_if_copy()

    def _take_turn(self, entry: Entry) -> None:
        if entry.state is _READY:
            if entry.want is TURN:
                entry.posted = None
            self.step(entry, Event.TURN_CAME)

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
            self._turns.remove(entry)  # else, were it READY again by then, it would have two turns in one pass
        entry.advance(_OUTPUT_BLOCKED)
        entry.transport.poll(INTEREST[entry.state])
        self.count_buffers(entry)
        if not self.is_closed(entry):
            self.timeouts.arm(entry)

    def _reap(self) -> bool:
        """Free what has closed; True when there was something."""
        freed = bool(self._closed)
        while self._closed:
            self._release(self._closed.pop())
        return freed

    def _release(self, entry: Entry) -> None:
        self.table.remove(entry)
        self.deadlines.forget(entry)
        entry.output.clear()
        transport, entry.transport = entry.transport, RELEASED
        request = transport.request
        ends_loop = self._free(entry, request, self.give_up_call, entry)
        ends_loop = self._close_handler(entry, request) or ends_loop
        ends_loop = self._free(entry, request, transport.release) or ends_loop
        self.released(entry)
        if ends_loop is not None:
            try:
                raise ends_loop
            finally:
                ends_loop = None  # see Failures.outside_step

    def released(self, entry: Entry) -> None:
        """`entry` has left the table, and holds nothing any more."""

    def give_up_call(self, entry: Entry) -> None:
        give_up = self._calls.pop(entry, None)
        if give_up is not None:
            give_up()

    def _close_handler(self, entry: Entry, request: Any) -> BaseException | None:
        """The handler's part is over, though its connection may linger. Returns what ends the loop."""
        resumable, entry.resumable = entry.resumable, OVER
        if entry.handler is resumable:
            entry.handler = type(resumable)
        return self._free(entry, request, resumable._close)

    def _free(self, entry: Entry, request: Any, free: Callable[..., Any], *args: Any) -> BaseException | None:
        """Free something of `entry`: what that raises is reported, and hinders nothing. Returns what ends the loop."""
        try:
            free(*args)
        except BaseException as problem:
            self.end_if_copy(problem)
            entry.ending = "error"
            return self.failures.report(entry.server, request, entry.peer, problem)
        self.end_if_copy()
        return None

    @staticmethod
    def is_closed(entry: Entry) -> bool:
        """A flush that meets a reset closes its entry: look again, whatever was known before it."""
        return entry.state is _CLOSED

    # -- its descriptors, and who runs it -----------------------------------------------------------------------------

    def set_limits(self, limits: Limits) -> None:
        """Hold to other limits from here on."""
        self.limits = limits
        self.send_share = limits.send_bytes  # what a request may send at once; 0: enough has been, in this pass
        self.unbounded = limits.idle_timeout_s is None and limits.request_timeout_s is None
        self.table.set_limits(limits)

    @property
    def selector(self) -> selectors.BaseSelector:
        """What the loop polls; opened when first needed."""
        self.open()
        assert self._selector is not None
        return self._selector

    def open(self) -> None:
        """Take the descriptors that a loop needs. Harmless when they are there."""
        if self.is_copy:
            self.start_over()
        self._forks = Process.forks
        if self._selector is None:
            wakeup = self.system.wakeup()
            try:
                self._selector = self.system.selector()
            except BaseException:
                wakeup.close()
                raise
            self._poll = ready_of(self._selector)
            self._wakeup = wakeup
            self._selector.register(wakeup, READ, wakeup)

    @property
    def is_copy(self) -> bool:
        """This process was forked from the one that opened the loop."""
        return self._forks != Process.forks and self._forks >= 0

    def end_if_copy(self, error: BaseException | None = None) -> None:
        """After a hook, which may have forked: its child ends. `error` is what the hook raised there."""
        if self.is_copy:
            end_child(error)

    def forked(self) -> None:
        """In a child that was forked while the loop ran: the loop runs in the parent, and not here.

        The peers are told nothing, and the selector's descriptor is the parent's too: nothing may be unregistered.
        """
        self.table.thread = None
        for _ in self._ready:
            pass  # the child does not go on with the pass, should it come back to it
        for queue in (self._posts, self._turns, self._timers, self._closed, self.table.touched):
            queue.clear()
        if self._wakeup is not None:
            self._wakeup.forked()
        self.close_descriptors()
        for leave in self.in_child:
            leave()
        running = self.table.running
        if running is not None and running.state is not _CLOSED:
            running.advance(Event.LOST)  # to this process

    def start_over(self) -> None:
        """In a forked child, which is to serve itself: the unfinished requests are the parent's."""
        self.close_descriptors()
        self._abandon_requests(None)
        for entry in self.table:
            if entry.state is not _CLOSED:
                entry.advance(Event.LOST)
            entry.transport, entry.resumable = RELEASED, OVER
            self.table.remove(entry)
            self.deadlines.forget(entry)
        self._calls.clear()
        self._turns.clear()
        self._closed.clear()
        self.table.running = None
        self._forks = -1

    def abandon(self, own: Entry | None) -> None:
        """In a forked child: close this process's copies of all descriptors, but for the socket of `own`."""
        self.close_descriptors()
        for server in self.servers:
            if own is None or server is not own.server or not isinstance(own.transport.request, tuple):
                abandon(getattr(server, "socket", None))
        self._abandon_requests(own)

    def _abandon_requests(self, own: Entry | None) -> None:
        for entry in self.table:
            # its own request may stand in two tables: in a driver's, and in the one that the driver has it from
            if own is None or entry.transport.request is not own.transport.request:
                entry.transport.abandon()

    def close_descriptors(self) -> None:
        """Give back what `open` took."""
        selector, self._selector = self._selector, None
        wakeup, self._wakeup = self._wakeup, None
        if selector is not None and wakeup is not None:
            selector.close()
            wakeup.close()

    @property
    def progress(self) -> tuple[int, ...]:
        """What changes while a pass goes on, though no step of a handler is seen in it."""
        queues: tuple[Sized, ...] = (self._turns, self.deadlines, self._timers, self._posts, self._closed, self.table)
        return length_hint(self._ready), *map(len, queues), self.table.last_id

    @property
    def stopping(self) -> bool:
        """The loop ends with this pass."""
        return bool(self._stop())

    def must_be_idle(self) -> None:
        """Raise ReqtableError while the loop runs, here or in another thread."""
        if self.table.thread is not None:
            raise ReqtableError("this engine's loop is running already")

    @property
    def running(self) -> bool:
        """Some thread runs the loop."""
        return self.table.thread is not None

    @property
    def in_other_thread(self) -> bool:
        """The loop runs, and in another thread than the caller's."""
        return self.table.thread not in (None, threading.get_ident())

    @property
    def in_loop_thread(self) -> bool:
        """The caller runs in the thread that runs the loop."""
        return self.table.thread == threading.get_ident()
