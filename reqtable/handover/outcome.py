"""How far a move has come: its `Phase`, and its `Outcome`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Phase(Enum):
    """Names the phases of a move. Each begins after the one before."""

    STARTING = "starting"  # the taker is to begin
    REHEARSING = "rehearsing"  # the taker tries the records
    REHEARSED = "rehearsed"  # the taker can go on with all of them
    MOVING = "moving"
    LISTENING = "listening"  # the taker begins to accept
    DRAINING = "draining"  # what can't move ends here
    DONE = "done"
    CHECKED = "checked"  # nothing was to be moved: it was a check
    FAILED = "failed"


@dataclass(slots=True)
class Outcome:
    """Tells how far a move has come."""

    phase: Phase = Phase.STARTING
    moved: int = 0
    refused: list[str] = field(default_factory=list)  # why the taker refused a request, a line for each
    immovable: Counter[str] = field(default_factory=Counter)  # as found by the rehearsal, or of those left at the end
    problem: str = ""  # why the move has failed
    longest_freeze_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the move has ended, well or not."""
        return self.phase in (Phase.DONE, Phase.CHECKED, Phase.FAILED)
