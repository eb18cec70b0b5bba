"""What is counted: requests, how they ended, their bytes and steps, by server and policy; the time of the loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# How a request can end.
ENDINGS = ("done", "timeout", "limit", "reset", "error", "cancelled", "drained")


@dataclass(slots=True)
class Tally:
    """Of one server's requests under one policy, those that have ended; refusals are the server's."""

    accepted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    steps: int = 0

    def add(self, other: Tally) -> None:
        self.accepted += other.accepted
        self.finished += other.finished
        self.refused += other.refused
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
class LoopTimes:
    """What the loop did with its time, in seconds. A pass's time is that after its poll."""

    passes: int = 0
    busy_s: float = 0.0
    pass_s_max: float = 0.0

    def add(self, seconds: float) -> None:
        """A pass has taken so long."""
        self.passes += 1
        self.busy_s += seconds
        if seconds > self.pass_s_max:
            self.pass_s_max = seconds

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        mean = self.busy_s / self.passes if self.passes else 0.0
        return {
            "passes": self.passes,
            "busy_s": self.busy_s,
            "pass_s_mean": mean,
            "pass_s_max": self.pass_s_max,
        }
