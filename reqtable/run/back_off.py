"""`BackOff`: when the next worker may be started, after some have failed."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from reqtable.server.engine import Engine

_FIRST_S, _MOST_S = 0.1, 30.0


class BackOff:
    """Delays starts, twice as long after each failure. `then` is called when a start may be tried again."""

    def __init__(self, engine: Engine, then: Callable[[], Any]) -> None:
        self._engine = engine
        self._then = then
        self._delay_s = 0.0
        self._until = -inf

    @property
    def is_on(self) -> bool:
        """Whether nothing may be started yet."""
        return self._engine.table.now < self._until

    @property
    def left_s(self) -> float:
        """How many seconds are left of the delay."""
        return max(0.0, self._until - self._engine.table.now)

    def failed(self, started_at: float) -> None:
        """Delay the next start: a worker started at `started_at` failed. Workers started together count as one."""
        if started_at >= self._until:
            self._delay_s = min(max(2 * self._delay_s, _FIRST_S), _MOST_S)
            self._until = self._engine.table.now + self._delay_s
            self._engine.call_later(self._delay_s, self._then)

    def lasted(self) -> None:
        """Begin with the shortest delay again at the next failure: a worker has lived long enough."""
        self._delay_s = 0.0

    def reset(self) -> None:
        """Allow a start at once."""
        self._delay_s, self._until = 0.0, -inf
