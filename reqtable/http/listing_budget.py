"""How many rows of listings a process may hold at once, for clients that read them slowly."""

from __future__ import annotations

from threading import Lock

HELD_MAX = 500_000  # about 100 MB


class Budget:
    """Counts the rows that are held. Threads may use it at the same time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._lock = Lock()

    def take(self, count: int) -> bool:
        """Take `count` rows from the budget. Returns False, and takes none, if so many are not left."""
        with self._lock:
            if self.held + count > self.most:
                return False
            self.held += count
            return True

    def release(self, count: int) -> None:
        """Give `count` rows back."""
        with self._lock:
            self.held -= count


BUDGET = Budget(HELD_MAX)
