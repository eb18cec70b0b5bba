"""Counts of a server's requests for each policy: how they ended, their bytes and their steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from reqtable.table.states import Ending


@dataclass(slots=True)
class Tally:
    """Counts one server's requests under one policy. Everything but `accepted` counts ended requests only."""

    accepted: int = 0
    finished: Counter[Ending] = field(default_factory=Counter)
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
        """Return plain data: numbers, and dicts of numbers."""
        return {
            "accepted": self.accepted,
            "finished": {ending.value: self.finished[ending] for ending in Ending},
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "steps": self.steps,
        }


@dataclass(slots=True)
class Counts:
    """Counts the requests of one server over its whole life. A refused request belongs to no policy."""

    policies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    refused: Counter[str] = field(default_factory=Counter)

    def plain(self) -> dict[str, Any]:
        """Return plain data: the sums over all policies, the refusals, and the counts of each policy."""
        policies = dict(self.policies)
        whole = Tally()
        for tally in policies.values():
            whole.add(tally)
        return {
            **whole.plain(),
            "refused": dict(self.refused),
            "policies": {name: tally.plain() for name, tally in policies.items()},
        }
