"""A clock that moves when it is told to."""

from __future__ import annotations

from math import inf

from reqtable.server.engine import Engine


class FakeClock:
    """Seconds that pass when a test says so. Calling it gives the time: `Engine(system=System(clock=FakeClock()))`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        """Let `seconds` pass, all at once. Raises ValueError for less than none."""
        if not seconds >= 0:
            raise ValueError(f"a clock can't go back by {-seconds} seconds")
        self.now += seconds

    def autojump(self, engine: Engine) -> float:
        """Jump to when `engine` has next to do something by itself, such as a deadline; returns how many seconds.

        0.0 where it has something to do now. Raises ValueError where nothing will ever be due.
        """
        at = engine.next_at()
        if at == inf:
            raise ValueError("nothing is due, ever: no request of this engine has a deadline")
        seconds = max(0.0, at - self.now)
        self.jump(seconds)
        return float(seconds)
