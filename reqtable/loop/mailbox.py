"""The functions that the loop is asked to call: soon (from any thread), at a given time, or at the end of a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from reqtable.loop.failures import Failures
from reqtable.loop.poller import Poller
from reqtable.loop.process import Process
from reqtable.loop.times import LoopTimes
from reqtable.table.compiled import mypyc_attr

_SOON_S = 0.005


@mypyc_attr(allow_interpreted_subclasses=True)
class Mailbox:
    """Keeps the functions that one loop is asked to call, and calls them. `failures` handles their exceptions."""

    def __init__(self, clock: Callable[[], float], poller: Poller, failures: Failures) -> None:
        self.posts: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.timers: list[tuple[float, int, Callable[[], Any]]] = []  # a heap
        self.at_end: list[Callable[[], Any]] = []
        self._timers_set = 0  # breaks ties, so that functions are never compared
        self._clock = clock
        self._poller = poller
        self._failures = failures

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)` in its next pass. Callable from any thread."""
        self.posts.append((function, args))
        self._poller.wake()

    def call_later(self, function: Callable[[], Any], in_s: float = _SOON_S) -> None:
        """Have the loop call `function` in `in_s` seconds. Only for the loop's own thread."""
        self._timers_set += 1
        heappush(self.timers, (self._clock() + in_s, self._timers_set, function))

    def at_end_of_pass(self, function: Callable[[], Any]) -> None:
        """Have the loop call `function` when this pass ends. Only for the loop's own thread."""
        self.at_end.append(function)

    def run_timers(self, now: float, times: LoopTimes) -> None:
        """Call the functions that are due."""
        while self.timers and self.timers[0][0] <= now:
            due_at, _, function = heappop(self.timers)
            times.add_lag(self._clock() - due_at)
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

    def _run(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as problem:
            self._failures.outside_step(None, problem)
        if self._poller.forks != Process.forks:
            self._poller.end_if_copy()
