"""Draining: let requests in progress finish, and accept no new ones.

A request that has been idle for `drain_idle_s` (nothing unread, nothing unsent, nothing running) sees end of file, as
if its peer had sent it, so its handler can say goodbye. Other requests go on until they are done, or until the time is
over; then they end as `drained`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from reqtable.net.idle import end_if_idle
from reqtable.server.engine import Engine
from reqtable.server.hosted import Hosted
from reqtable.table.states import Ending, State
from reqtable.table.table import Entry

_LOOK_S = 0.02


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
        left = [each for each in engine.table if each.server in self._servers and each.state is not State.CLOSED]
        if left and now < self._until:
            engine.call_later(_LOOK_S, self._look)  # first, so that an error below can't end the drain
            for entry in left:
                self._tell(entry)
        if self._progress is not None:
            self._progress(len(left), max(0.0, self._until - now))
        if not left or now >= self._until:
            self._end(left)

    def _tell(self, entry: Entry) -> None:
        """End the input of a request if it is idle."""
        try:
            if entry.state is State.DELEGATED:
                entry.transport.end_input()  # the thread or child that has it checks whether it is idle
            else:
                end_if_idle(entry)
        except BaseException as problem:
            self._engine.steps.failures.outside_step(entry, problem)

    def _end(self, left: list[Entry]) -> None:
        engine = self._engine
        for entry in left:
            entry.ending = Ending.DRAINED
        for server in self._servers:
            server._is_draining = False
            engine.end_requests(server)
        self._done()
