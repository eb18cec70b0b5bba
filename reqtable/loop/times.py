"""How the loop spent its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class LoopTimes:
    """Measures how long passes took, without their poll, and how late deadlines and timers fired. `_s` is seconds.

    `Loop.run_once` counts the passes.
    """

    passes: int = 0
    busy_s: float = 0.0
    pass_s_max: float = 0.0
    due: int = 0
    lag_s: float = 0.0
    lag_s_max: float = 0.0

    def add_lag(self, seconds: float) -> None:
        """Count a deadline or a timer that fired `seconds` late."""
        self.due += 1
        self.lag_s += seconds
        if seconds > self.lag_s_max:
            self.lag_s_max = seconds

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "passes": self.passes,
            "busy_s": self.busy_s,
            "pass_s_mean": self.busy_s / max(1, self.passes),
            "pass_s_max": self.pass_s_max,
            "due": self.due,
            "lag_s": self.lag_s,
            "lag_s_mean": self.lag_s / max(1, self.due),
            "lag_s_max": self.lag_s_max,
        }
