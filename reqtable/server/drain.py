"""Draining: let requests in progress finish, and accept no new ones.

A request that has been idle for `drain_idle_s` (nothing unread, nothing unsent, nothing running) sees end of file, as
if its peer had sent it, so its handler can say goodbye. Other requests go on until they are done, or until the time is
over; then they end as `drained`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from reqtable.net.idle import end_if_idle
from reqtable.server.engine import Engine
from reqtable.server.hosted import Hosted
from reqtable.table.states import Ending, State
from reqtable.table.table import Entry

_LOOK_S = 0.02
_ROWS_PER_PASS = 1_000  # looking at these takes half a millisecond


class Drain:
    """Drains some servers of an engine. For use in the loop's own thread only."""

    def __init__(
        self,
        engine: Engine,
        servers: Iterable[Hosted],
        until: float,
        done: Callable[[], None],
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        self._engine = engine
        self._servers = list(servers)
        self._until = until
        self._done = done
        self._progress = progress  # called with how many requests and seconds are left
        self._is_under_way = False  # the next pass goes on looking for requests that are idle

    def cancel(self) -> None:
        """Drain no more. The caller listens again."""
        for server in self._servers:
            server._is_draining = False
        self._servers = []

    def begin(self) -> None:
        """Stop listening, and check on the requests in the table until they are done."""
        for server in self._servers:
            server._is_draining = True
            self._engine.listeners.unlisten_for_good(server)
        self._look()

    def _look(self) -> None:
        engine = self._engine
        now = engine.table.now
        left = self._left
        if left and now < self._until:
            engine.call_later(_LOOK_S, self._look)  # first, so that an error below can't end the drain
            if not self._is_under_way:
                self._tell_some(iter(engine.table))
        if self._progress is not None:
            self._progress(left, max(0.0, self._until - now))
        if not left or now >= self._until:
            self._end()

    @property
    def _left(self) -> int:
        """How many requests have not ended. A request that has ended is in the table until the end of the pass."""
        ended = sum(each.kind == "client" and each.server in self._servers for each in self._engine.steps.closed)
        return sum(map(self._engine.table.census.count_of, self._servers)) - ended

    def _tell_some(self, entries: Iterator[Entry]) -> None:
        """End the input of those of `entries` that are idle: of some now, and of the others in the next passes."""
        self._is_under_way = False
        some = list(islice(entries, _ROWS_PER_PASS))
        for entry in some:
            if entry.server in self._servers and entry.state is not State.CLOSED:
                self._tell(entry)
        if len(some) == _ROWS_PER_PASS:
            self._is_under_way = True
            self._engine.post(self._tell_some, entries)

    def _tell(self, entry: Entry) -> None:
        """End the input of a request if it is idle."""
        try:
            if entry.state is State.DELEGATED:
                entry.transport.end_input()  # the thread or child that has it checks whether it is idle
            else:
                end_if_idle(entry)
        except BaseException as problem:
            self._engine.steps.failures.outside_step(entry, problem)

    def _end(self) -> None:
        engine = self._engine
        for entry in engine.table:
            if entry.server in self._servers and entry.state is not State.CLOSED:
                entry.ending = Ending.DRAINED
        for server in self._servers:
            server._is_draining = False
            engine.end_requests(server)
        self._done()
