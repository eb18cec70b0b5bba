"""Letting what has begun finish, and nothing new begin.

A request that has been idle for a while as the peer sees it (nothing unread, nothing unsent, nothing running) is told:
its input ends, as if the peer had ended it, so that its handler takes leave as it would then. The others go on until
they are done, or until the time is over; then they end as `drained`.
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
    """Drains some servers of an engine. Only for the loop's own thread."""

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
        self._progress = progress  # told how many requests and how many seconds are left

    def begin(self) -> None:
        """Take nothing new, and look after what is there until that is done."""
        for server in self._servers:
            self._engine.listeners.unlisten_for_good(server)
        self._look()

    def _look(self) -> None:
        engine = self._engine
        now = engine.table.now
        left = [each for each in engine.table if each.server in self._servers and each.state is not State.CLOSED]
        if left and now < self._until:
            engine.call_later(self._look, _LOOK_S)  # whatever goes wrong now
            for entry in left:
                self._tell(entry)
        if self._progress is not None:
            self._progress(len(left), max(0.0, self._until - now))
        if not left or now >= self._until:
            self._end(left)

    def _tell(self, entry: Entry) -> None:
        """Tell a request that is idle that there will be no more."""
        try:
            if entry.state is State.DELEGATED:
                entry.transport.end_input()  # whether it is idle, who has it knows
            else:
                end_if_idle(entry)
        except BaseException as problem:
            self._engine.steps.failures.outside_step(entry, problem)

    def _end(self, left: list[Entry]) -> None:
        engine = self._engine
        for entry in left:
            entry.ending = Ending.DRAINED
        for server in self._servers:
            engine.end_requests(server)
        self._done()
