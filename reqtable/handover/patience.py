"""`Patience`: bounds how long the other process may take to answer."""

from __future__ import annotations

from collections.abc import Callable

from reqtable.loop.mailbox import Timer
from reqtable.server.engine import Engine


class Patience:
    """Calls `over(why)` if the taker does not answer in time."""

    def __init__(self, engine: Engine, over: Callable[[str], None]) -> None:
        self._engine = engine
        self._over = over
        self._timer: Timer | None = None

    def begin(self, seconds: float, why: str) -> None:
        """Wait for an answer from now on. `why` completes the sentence about the new process."""
        self.end()
        self._timer = self._engine.call_later(seconds, self._over, f"the new process {why} within {seconds:g} s")

    def end(self) -> None:
        """Wait no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
