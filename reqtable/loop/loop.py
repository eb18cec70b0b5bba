"""The loop: one pass after another. A pass polls the descriptors, then does everything that is due.

The rules:

* One pass is `run_once`: poll, step the ready requests, give READY requests their turn, expire deadlines, run timers
  and posted functions, reap closed entries.
* All requests may have the same deadline. So a pass expires a bounded number of deadlines, and the next pass does not
  wait in its poll. Reaping needs no bound: each reaped entry was closed in this pass, which cost as much.
* The loop blocks only in its poll. Everything that can end a wait can end the poll: a socket, a deadline, a timer, or
  a wake-up from another thread or a signal.
* Clock, selector, wake-up and sockets come from the loop's `System`, so that a simulation can replace them.
* Parts that the loop does not know (listeners, invariants) register a function in `after_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from math import inf
from operator import length_hint
from threading import get_ident
from typing import Any

from reqtable.loop.expiry import Expiry
from reqtable.loop.process import LOOPS, Process
from reqtable.loop.selector import Ready
from reqtable.loop.step import Steps
from reqtable.loop.times import LoopTimes
from reqtable.table.errors import ReqtableError
from reqtable.table.states import Event, State
from reqtable.table.table import Entry

UNATTENDED: AbstractContextManager[Any] = nullcontext()  # nothing is done before the first pass and after the last
_PATIENCE_MAX_S = 86_400.0  # a much longer timeout overflows in the kernel


class Loop:
    """Runs passes over one table. `steps` runs the steps of its requests."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.table = steps.table
        self.poller = steps.poller
        self.mailbox = steps.mailbox
        self.times = LoopTimes()
        self.after_pass: list[Callable[[float, bool], Any]] = []  # called with the time, and whether entries were freed
        # Called in the thread that watches for stalls: with the entry whose step holds up the loop, then with None.
        self.on_stall: Callable[[Entry | None], Any] = bool
        self.on_forked: list[Callable[[], Any]] = []  # called in a forked child, where this loop does not run
        self.on_start_over: list[Callable[[], Any]] = []  # called in a forked child that will serve by itself
        self._expiry = Expiry(steps, self.times)
        self._ready: Iterator[tuple[int, int]] = iter(())  # what the poll found and the pass has not handled yet
        self._stop: Callable[[], Any] = bool
        self._ended_at = self.table.now  # when the last pass ended: the next one begins at once

    def run(
        self,
        stop: Callable[[], Any],
        most_s: float | None = None,
        until: float | None = None,
        around: AbstractContextManager[Any] = UNATTENDED,
    ) -> None:
        """Run passes until `stop()` is true or the clock reaches `until`. A poll waits at most `most_s` seconds.

        The passes run inside `around`, which is entered and left while the loop counts as running. Raises ReqtableError
        if the loop runs already, in this thread or in another.
        """
        self.must_be_idle()
        self.steps.failures.unwinding = None
        self.open()
        self.table.thread = get_ident()
        self._stop = stop
        outer = LOOPS.get(get_ident())  # a child forked during a pass runs its request's own loop inside that pass
        LOOPS[get_ident()] = self
        try:
            poller = self.poller
            with poller.on_signals(), around:
                self._ended_at = self.table.clock()
                while True:  # CPython 3.11 never specializes a loop "while not stop()"
                    if stop():
                        break
                    self.run_once(most_s if until is None else max(0.0, until - self.table.clock()))
                    if poller.forks != Process.forks:
                        poller.end_if_copy()
                    if until is not None and self.table.clock() >= until:
                        break
        except BaseException as problem:
            self.poller.end_if_copy(problem)
            raise
        finally:
            try:
                self.steps.reap()
            finally:
                self.steps.failures.unwinding = None
                if outer is None:
                    LOOPS.pop(get_ident(), None)
                else:
                    LOOPS[get_ident()] = outer
                self.table.thread = None

    def run_inside(self) -> None:
        """Run one pass inside a pass of another loop of this thread, without waiting."""
        self.table.thread = get_ident()
        try:
            self.run_once(0)
            self.steps.reap()
        finally:
            self.table.thread = None

    def run_once(self, most_s: float | None = None) -> None:
        """Run one pass. The poll waits at most `most_s` seconds; None: until there is something to do."""
        steps, table, mailbox = self.steps, self.table, self.mailbox
        poller, clock = self.poller, table.clock
        poll, targets, masks = poller.poll, poller.targets, poller.masks
        ready = poll(self._patience(most_s))
        now = table.now = clock()
        if steps.spent:
            steps.renew_budget()
            ready = self._rotated(ready)
        self._ready = left = iter(ready)
        for place, event in left:
            target = targets[place]
            try:
                target.on_ready(masks[event])
            except BaseException as problem:
                steps.failures.outside_step(getattr(target, "entry", None), problem)
        if poller.forks != Process.forks:
            poller.end_if_copy()
        if steps.turns:
            steps.take_turns()
        if steps.deadlines.soonest <= now:
            self._expiry.expire_due(now)
        if mailbox.timers:
            mailbox.run_timers(now, self.times)
        if mailbox.posts:
            mailbox.run_posts()
        if mailbox.at_end:
            mailbox.run_at_end()
        if table.touched:
            steps.flush_touched()
        freed = steps.reap() if steps.closed else False
        for told in self.after_pass:
            told(now, freed)
        self._ended_at = ended = clock()
        took = ended - now
        times = self.times
        times.passes += 1
        times.busy_s += took
        if took > times.pass_s_max:
            times.pass_s_max = took

    def _rotated(self, ready: Ready) -> Ready:
        """Rotate `ready`: epoll(7) keeps its order, so the requests at the end would always find the budget spent."""
        first = self.steps.large_sends % max(1, len(ready))
        return ready[first:] + ready[:first]

    def _patience(self, most_s: float | None) -> float | None:
        """Return how many seconds the poll may wait: 0 if there is something to do, else until the next deadline.

        None: no bound.
        """
        steps, mailbox = self.steps, self.mailbox
        if steps.turns or steps.closed or self.table.touched or mailbox.posts or mailbox.at_end:
            return 0
        at = steps.deadlines.soonest if not mailbox.timers else self._due_at()
        wait = at - self._ended_at
        if most_s is not None and most_s < wait:
            return most_s if wait == inf else min(most_s, _PATIENCE_MAX_S)
        return None if wait == inf else max(0.0, min(wait, _PATIENCE_MAX_S))

    def next_at(self) -> float:
        """Return when the loop next has something to do, if nothing arrives: a time on its clock, or infinity."""
        return self.table.now if self._patience(None) == 0 else self._due_at()

    def _due_at(self) -> float:
        at = self.steps.deadlines.soonest
        timers = self.mailbox.timers
        return min(at, timers[0][0]) if timers else at

    @property
    def stopping(self) -> bool:
        """True if the loop ends with this pass."""
        return bool(self._stop())

    def must_be_idle(self) -> None:
        """Raise ReqtableError if the loop runs, in this thread or in another."""
        if self.steps.running:
            raise ReqtableError("this engine's loop is running already")

    @property
    def progress(self) -> tuple[int, ...]:
        """Numbers that change while a pass makes progress, even if it runs no step of a handler."""
        steps, mailbox = self.steps, self.mailbox
        queues: tuple[Sized, ...] = (
            steps.turns,
            steps.deadlines,
            mailbox.timers,
            mailbox.posts,
            mailbox.at_end,
            steps.closed,
            self.table,
        )
        return length_hint(self._ready), *map(len, queues), self.table.last_id

    # -- its descriptors, also in a forked child ----------------------------------------------------------------------

    def open(self) -> None:
        """Open the descriptors that the loop needs, unless they are open."""
        if self.poller.is_copy:
            self.start_over()
        self.poller.open()

    def forked(self) -> None:
        """Leave the loop to the parent, in a child that was forked while the loop ran. The peers notice nothing."""
        self.table.thread = None
        for _ in self._ready:
            pass  # if the child returns into the pass, it must find nothing left to do
        self.mailbox.clear()
        for queue in (self.steps.turns, self.steps.closed, self.table.touched):
            queue.clear()
        self.poller.forked()
        for leave in self.on_forked:
            leave()
        running = self.table.running
        if running is not None and running.state is not State.CLOSED:
            running.advance(Event.LOST)  # for this process

    def start_over(self) -> None:
        """Begin anew in a forked child that will serve by itself. The unfinished requests stay with the parent."""
        self.poller.start_over()
        self.steps.start_over()
        self.steps.turns.clear()
        self.mailbox.start_over()
        for told in self.on_start_over:
            told()
