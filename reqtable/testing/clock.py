"""A clock that only a test moves."""

from __future__ import annotations

from math import inf

from reqtable.server.engine import Engine


class FakeClock:
    """Gives a time in seconds that only a test moves. Usage: `Engine(system=System(clock=FakeClock()))`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        """Move the clock forward by `seconds`. Raises ValueError if they are negative."""
        if not seconds >= 0:
            raise ValueError(f"a clock can't go back by {-seconds} seconds")
        self.now += seconds

    def autojump(self, engine: Engine) -> float:
        """Jump to the next timer of `engine`, such as a deadline; returns by how many seconds.

        Returns 0.0 if the engine has work to do now. Raises ValueError if it has no timer.
        """
        at = engine.next_at()
        if at == inf:
            raise ValueError("nothing is due, ever: no request of this engine has a deadline")
        seconds = max(0.0, at - self.now)
        self.jump(seconds)
        return float(seconds)
