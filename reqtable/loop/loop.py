"""The loop: one pass after the other, each of them a poll and what follows from what the poll found.

The rules:

* One pass is `run_once`: poll, step what is ready, give the waiting their turn, expire deadlines, call what was asked
  for, reap what has closed.
* Deadlines of a moment are as many as there are requests: a bounded number expires in a pass, and the next one does not
  wait in its poll. Freeing is not bounded: whatever closed an entry in this pass has cost as much.
* The loop never blocks but in its poll. Everything that can end a wait can end the poll: a socket, a deadline, a timer,
  or a wake-up from another thread or a signal.
* Clock, selector, wake-up and sockets come from the `System` that the loop is given, so that a simulation can own them.
* What the loop does not know (listeners, invariants) is told of each pass by `after_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from math import inf
from operator import length_hint
from threading import get_ident
from typing import Any

from reqtable.loop.expiry import Expiry
from reqtable.loop.process import LOOPS, Process
from reqtable.loop.selector import Ready
from reqtable.loop.step import Steps
from reqtable.loop.times import LoopTimes
from reqtable.table.compiled import mypyc_attr
from reqtable.table.errors import ReqtableError
from reqtable.table.states import Event, State

_PATIENCE_MAX_S = 86_400.0  # a poll of more overflows what the kernel takes


@mypyc_attr(allow_interpreted_subclasses=True)
class Loop:
    """The loop over one table, whose requests `steps` steps."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.table = steps.table
        self.poller = steps.poller
        self.mailbox = steps.mailbox
        self.times = LoopTimes()
        self.after_pass: list[Callable[[float, bool], Any]] = []  # each is told the time, and whether a request went
        self.in_child: list[Callable[[], Any]] = []  # called in a forked child, which leaves all of this behind
        self.on_start_over: list[Callable[[], Any]] = []  # called in a forked child, which is to serve itself
        self._expiry = Expiry(steps, self.times)
        self._ready: Iterator[tuple[Any, int]] = iter(())  # what the poll found and nobody has looked at yet
        self._stop: Callable[[], Any] = bool

    def run(self, stop: Callable[[], Any], most_s: float | None = None, until: float | None = None) -> None:
        """Make passes until `stop()` is true, looking at least every `most_s` seconds, or until that time has come.

        One thread at a time: raises ReqtableError while another one, or this one, is in it.
        """
        self.must_be_idle()
        self.steps.failures.unwinding = None
        self.open()
        self.table.thread = get_ident()
        self._stop = stop
        outer = LOOPS.get(get_ident())  # a child that was forked in a pass drives its request inside that pass
        LOOPS[get_ident()] = self
        try:
            with self.poller.on_signals():
                while not stop():
                    self.run_once(most_s if until is None else max(0.0, until - self.table.clock()))
                    self.poller.end_if_copy()
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

    def run_once(self, most_s: float | None = None) -> None:
        """One pass. It waits at most `most_s` seconds for something to do; None: as long as it takes."""
        steps, table, mailbox = self.steps, self.table, self.mailbox
        ready = self.poller.poll(self._patience(most_s))
        now = table.now = table.clock()
        if steps.spent:
            steps.renew_budget()
            ready = self._rotated(ready)
        self._ready = iter(ready)
        for target, mask in self._ready:
            try:
                target.on_ready(mask)
            except BaseException as problem:
                steps.failures.outside_step(getattr(target, "entry", None), problem)
        if self.poller.forks != Process.forks:
            self.poller.end_if_copy()
        if steps.turns:
            steps.take_turns()
        if steps.deadlines.next_at() <= now:
            self._expiry.expire_due(now)
        if mailbox.timers:
            mailbox.run_timers(now, self.times)
        if mailbox.posts:
            mailbox.run_posts()
        if mailbox.at_end:
            mailbox.run_at_end()
        if table.touched:
            steps.flush_touched()
        freed = bool(steps.closed) and steps.reap()
        for told in self.after_pass:
            told(now, freed)
        self.times.add(table.clock() - now)

    def _rotated(self, ready: Ready) -> Ready:
        """Who was left out of the pass before comes first: epoll(7) names those that are ready in the same order."""
        first = self.steps.spenders % max(1, len(ready))
        return ready[first:] + ready[:first]

    def _patience(self, most_s: float | None) -> float | None:
        """How long the poll may last: not at all while there is something to do, else until the next deadline."""
        steps, mailbox = self.steps, self.mailbox
        if steps.turns or steps.closed or self.table.touched or mailbox.posts or mailbox.at_end:
            return 0
        at = self._due_at()
        if at == inf:
            return most_s
        wait = max(0.0, min(at - self.table.clock(), _PATIENCE_MAX_S))
        return wait if most_s is None else min(wait, most_s)

    def next_at(self) -> float:
        """When it has to do something by itself, on its clock; infinity where nothing is due, ever."""
        return self.table.now if self._patience(None) == 0 else self._due_at()

    def _due_at(self) -> float:
        at = self.steps.deadlines.next_at()
        timers = self.mailbox.timers
        return min(at, timers[0][0]) if timers else at

    @property
    def stopping(self) -> bool:
        """The loop ends with this pass."""
        return bool(self._stop())

    def must_be_idle(self) -> None:
        """Raise ReqtableError while the loop runs, here or in another thread."""
        if self.steps.running:
            raise ReqtableError("this engine's loop is running already")

    @property
    def progress(self) -> tuple[int, ...]:
        """What changes while a pass goes on, though no step of a handler is seen in it."""
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
        """Take the descriptors that a loop needs. Harmless when they are there."""
        if self.poller.is_copy:
            self.start_over()
        self.poller.open()

    def forked(self) -> None:
        """In a child that was forked while the loop ran: the loop runs in the parent, and not here.

        The peers are told nothing.
        """
        self.table.thread = None
        for _ in self._ready:
            pass  # the child does not go on with the pass, should it come back to it
        self.mailbox.clear()
        for queue in (self.steps.turns, self.steps.closed, self.table.touched):
            queue.clear()
        self.poller.forked()
        for leave in self.in_child:
            leave()
        running = self.table.running
        if running is not None and running.state is not State.CLOSED:
            running.advance(Event.LOST)  # to this process

    def start_over(self) -> None:
        """In a forked child, which is to serve itself: the unfinished requests are the parent's."""
        self.poller.start_over()
        self.steps.start_over()
        self.steps.turns.clear()
        for told in self.on_start_over:
            told()
