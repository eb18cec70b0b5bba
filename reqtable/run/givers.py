"""`Givers`: the workers that give their requests away, and how far each of them is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from reqtable.handover import messages
from reqtable.handover.outcome import Phase
from reqtable.run.known_worker import Worker

_GIVEN_AWAY = {Phase.DRAINING.value, Phase.DONE.value}


class Givers:
    """Holds `workers`. They rehearse at the same time, and then move one after another."""

    def __init__(self, workers: Sequence[Worker] = ()) -> None:
        self.workers = list(workers)
        self.moving: Worker | None = None
        self._waiting = list(workers)  # those that have not begun to move
        self._progress: dict[Worker, messages.Progress] = {}

    def note(self, worker: Worker, message: messages.Progress) -> None:
        """Note how far a worker is."""
        self._progress[worker] = message

    def has_moved(self, worker: Worker) -> bool:
        """Return whether only what can't move is left in a worker."""
        return worker in self._progress and self._progress[worker].phase in _GIVEN_AWAY

    @property
    def some_have_moved(self) -> bool:
        """Whether the new process goes on with all that could move from a worker that had such requests."""
        return any(self.has_moved(each) and known.moved for each, known in self._progress.items())

    @property
    def have_rehearsed(self) -> bool:
        """Whether the new code can go on with the requests of all workers."""
        found = [each.phase for each in self._progress.values()]
        return found == [Phase.REHEARSED.value] * len(self.workers)

    def next(self) -> Worker | None:
        """Return the worker that is to move next; None if there is none left."""
        self.moving = self._waiting.pop(0) if self._waiting else None
        return self.moving

    def leave_out(self, worker: Worker) -> bool:
        """Go on without a worker. Returns whether it was the one that moves."""
        if worker in self._waiting:
            self._waiting.remove(worker)
        return worker is self.moving

    def stuck_since(self, at: float) -> Worker | None:
        """Return a worker that is to do something, but whose loop has not run since then."""
        busy = self.workers if self.moving is None else [self.moving]
        return next((each for each in busy if each.heard_at < at), None)

    def shown(self) -> dict[str, Any]:
        """Return the sums over all workers, for `Restarting.shown`."""
        found = list(self._progress.values())
        immovable: Counter[str] = Counter()
        for each in found:
            immovable.update(each.immovable)
        return {
            "moved": sum(each.moved for each in found),
            "refused": [reason for each in found for reason in each.refused],
            "left": sum(each.left for each in found),
            "immovable": dict(immovable),
            "longest_freeze_s": max([each.longest_freeze_s for each in found], default=0.0),
        }
