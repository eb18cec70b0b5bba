"""The functions that the loop is asked to call: soon (from any thread), at a given time, or at the end of a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from typing import Any

from reqtable.loop.failures import Failures
from reqtable.loop.poller import Poller
from reqtable.loop.process import Process
from reqtable.loop.times import LoopTimes

_SOON_S = 0.005
_SWEEP_LEAST = 64


class Timer:
    """Calls a function of the program in the loop's thread, once or again and again, until `cancel()`.

    `Engine.call_later` and `Engine.every` make timers.
    """

    __slots__ = ("_call", "_due_at", "_every_s", "_mailbox", "forks")

    def __init__(self, mailbox: Mailbox, due_at: float, every_s: float | None, call: Callable[[], Any]) -> None:
        self._mailbox = mailbox
        self._due_at = due_at
        self._every_s = every_s
        self._call: Callable[[], Any] | None = call
        self.forks = Process.forks  # of the process that made the timer

    def cancel(self) -> None:
        """Call the function no more. Callable from any thread, any number of times.

        Another thread's `cancel` does not wait for a call that has begun.
        """
        self._call = None

    @property
    def active(self) -> bool:
        """True if a call is still to come, or runs and is to be repeated."""
        return self._call is not None

    def arm(self) -> None:
        """Have the loop call the function when it is due. For the loop's own thread only."""
        if self._call is not None:
            self._mailbox.add_timer(self._due_at, self)

    def __call__(self) -> None:
        call = self._call
        if call is None:
            return
        if self._every_s is None:
            self._call = None
            call()
            return
        try:
            call()
        finally:
            self._due_at = next_due(self._due_at, self._every_s, self._mailbox.clock())
            self.arm()


def next_due(due_at: float, every_s: float, now: float) -> float:
    """Return the first time after `now` that is a whole number of `every_s` after `due_at`."""
    missed = max(0.0, (now - due_at) // every_s)
    at = due_at + (missed + 1) * every_s
    return at if now < at < inf else now + every_s  # for a tiny `every_s`, the floats have no such time


class Mailbox:
    """Keeps the functions that one loop is asked to call, and calls them. `failures` handles their exceptions."""

    def __init__(self, clock: Callable[[], float], poller: Poller, failures: Failures) -> None:
        self.posts: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.timers: list[tuple[float, int, Callable[[], Any]]] = []  # a heap
        self.clock = clock
        self.at_end: list[Callable[[], Any]] = []
        self._numbers = count()  # they break ties, so that functions are never compared
        self._arrived: deque[Timer] = deque()  # timers that are not in the heap yet
        self._sweep_at = _SWEEP_LEAST
        self._poller = poller
        self._failures = failures

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self.posts.append((function, args))
        self._poller.wake()

    def call_later(self, function: Callable[[], Any], in_s: float = _SOON_S) -> None:
        """Have the loop call `function` in `in_s` seconds. Only for the loop's own thread."""
        self.add_timer(self.clock() + in_s, function)

    def add_timer(self, due_at: float, function: Callable[[], Any]) -> None:
        """Have the loop call `function` at the time `due_at`. Only for the loop's own thread."""
        if len(self.timers) >= self._sweep_at:
            self._sweep()
        heappush(self.timers, (due_at, next(self._numbers), function))

    def new_timer(self, seconds: Any, repeats: bool, function: Any, args: tuple[Any, ...]) -> Timer:
        """Return a timer that is due in `seconds`, and then every `seconds` if it `repeats`. Callable from any thread.

        Raises TypeError or ValueError for a wrong argument.
        """
        name = "every" if repeats else "call_later"
        if not isinstance(seconds, int | float) or isinstance(seconds, bool):
            raise TypeError(f"{name}(seconds, fn): seconds must be a number, not {seconds!r}")
        if not seconds > 0:
            raise ValueError(f"{name}(seconds, fn): seconds must be above 0, not {seconds!r}")
        if not callable(function):
            raise TypeError(f"{name}(seconds, fn): fn must be a function, not {function!r}")
        timer = Timer(self, self.clock() + seconds, seconds if repeats else None, partial(function, *args))
        self._arrived.append(timer)
        self.post(self._take_arrived)  # the heap belongs to the loop's thread, and the post ends the poll
        return timer

    def at_end_of_pass(self, function: Callable[[], Any]) -> None:
        """Have the loop call `function` when this pass ends. Only for the loop's own thread."""
        self.at_end.append(function)

    def run_timers(self, now: float, times: LoopTimes) -> None:
        """Call the functions that are due. Timers that are set meanwhile wait for the next pass."""
        first_new = next(self._numbers)
        while self.timers and self.timers[0][0] <= now and self.timers[0][1] < first_new:
            due_at, _, function = heappop(self.timers)
            if is_pending(function):
                times.add_lag(self.clock() - due_at)
                self._run(function)

    def run_posts(self) -> None:
        """Call the posted functions. Functions that are posted meanwhile wait for the next pass."""
        for _ in range(len(self.posts)):
            function, args = self.posts.popleft()
            self._run(function, *args)

    def run_at_end(self) -> None:
        """Call the functions that wait for the end of the pass."""
        while self.at_end:
            self._run(self.at_end.pop(0))

    def clear(self) -> None:
        """Drop all functions, in a forked child: they belong to the parent."""
        self.posts.clear()
        self.timers.clear()
        self.at_end.clear()
        self._arrived.clear()

    def cancel_timers(self) -> None:
        """Cancel the timers of the program: the engine closes."""
        for timer in self.program_timers():
            timer.cancel()

    def start_over(self) -> None:
        """Cancel the timers that were set before the fork, in a forked child: they belong to the parent."""
        for timer in self.program_timers():
            if timer.forks != Process.forks:
                timer.cancel()

    def program_timers(self) -> list[Timer]:
        """Return the timers of the program, with cancelled ones."""
        return [*(each for _, _, each in list(self.timers) if isinstance(each, Timer)), *list(self._arrived)]

    def _take_arrived(self) -> None:
        while self._arrived:
            self._arrived.popleft().arm()

    def _sweep(self) -> None:
        """Drop the cancelled timers from the heap: they may be due much later."""
        self.timers[:] = [each for each in self.timers if is_pending(each[2])]
        heapify(self.timers)
        self._sweep_at = max(_SWEEP_LEAST, 2 * len(self.timers))

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as problem:
            self._failures.outside_step(None, problem)
        if self._poller.forks != Process.forks:
            self._poller.end_if_copy()


def is_pending(function: Callable[[], Any]) -> bool:
    """Return whether `function`, which is due, is still to be called: its timer was not cancelled."""
    return not isinstance(function, Timer) or function.active
