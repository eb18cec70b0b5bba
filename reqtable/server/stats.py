"""What is counted: requests, how they ended, their bytes and steps, by server and policy; the time of the loop."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

# How a request can end.
ENDINGS = ("done", "timeout", "limit", "reset", "error", "cancelled", "drained")


@dataclass(slots=True)
class Tally:
    """Of one server's requests under one policy; all but `accepted` of those that have ended."""

    accepted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    steps: int = 0

    def add(self, other: Tally) -> None:
        self.accepted += other.accepted
        self.finished += other.finished
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.steps += other.steps

    def plain(self) -> dict[str, Any]:
        """As plain data: numbers, and dicts of numbers."""
        return {
            "accepted": self.accepted,
            "finished": {ending: self.finished[ending] for ending in ENDINGS},
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "steps": self.steps,
        }


@dataclass(slots=True)
class Counts:
    """Of one server, for as long as there is one: an engine adds to them. Who is refused is under no policy."""

    policies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    refused: Counter[str] = field(default_factory=Counter)

    def plain(self) -> dict[str, Any]:
        """As plain data: the whole, who was refused, and each policy."""
        policies = dict(self.policies)
        whole = Tally()
        for tally in policies.values():
            whole.add(tally)
        return {
            **whole.plain(),
            "refused": dict(self.refused),
            "policies": {name: tally.plain() for name, tally in policies.items()},
        }


@dataclass(slots=True)
class LoopTimes:
    """What the loop did with its time, in seconds. A pass's time is that after its poll."""

    passes: int = 0
    busy_s: float = 0.0
    pass_s_max: float = 0.0
    due: int = 0
    lag_s: float = 0.0
    lag_s_max: float = 0.0

    def add(self, seconds: float) -> None:
        """A pass has taken so long."""
        self.passes += 1
        self.busy_s += seconds
        if seconds > self.pass_s_max:
            self.pass_s_max = seconds

    def add_lag(self, seconds: float) -> None:
        """What was due at a time of its own, a deadline or a timer, comes so late."""
        self.due += 1
        self.lag_s += seconds
        if seconds > self.lag_s_max:
            self.lag_s_max = seconds

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "passes": self.passes,
            "busy_s": self.busy_s,
            "pass_s_mean": self.busy_s / max(1, self.passes),
            "pass_s_max": self.pass_s_max,
            "lag_s_mean": self.lag_s / max(1, self.due),
            "lag_s_max": self.lag_s_max,
        }
