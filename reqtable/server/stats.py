"""What is counted of the requests of a server: how they ended, their bytes and their steps, for each policy."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from reqtable.table.states import Ending


@dataclass(slots=True)
class Tally:
    """Of one server's requests under one policy; all but `accepted` of those that have ended."""

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
        """As plain data: numbers, and dicts of numbers."""
        return {
            "accepted": self.accepted,
            "finished": {ending.value: self.finished[ending] for ending in Ending},
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
