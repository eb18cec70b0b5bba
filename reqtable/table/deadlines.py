"""Deadlines: a heap with lazy cancellation.

The rules:

* An entry has at most one deadline, `entry.deadline` (seconds on the engine's clock, or None).
* To move a deadline later, or to drop it, only `entry.deadline` is assigned. The heap is not touched. When the old item
  comes up, the entry is pushed again at its true deadline, or forgotten.
* `entry.heap_time` is the time of the one item that is live for the entry. All other items of the entry are stale.
* To move a deadline earlier than `heap_time`, a new item is pushed. The older item becomes stale and is skipped.
* If stale items outnumber live items by more than two to one, the heap is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, Protocol, TypeVar

from reqtable.table.states import State

_SMALL = 64  # a heap this small is never rebuilt


class Timed(Protocol):
    """The part of an entry that its deadline needs."""

    state: State
    deadline: float | None
    heap_time: float


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """Orders the deadlines of a table's entries, soonest first."""

    __slots__ = ("_heap", "live", "serial", "soonest")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self.live = 0  # entries with heap_time < inf
        self.serial = 0  # the number of the newest item; numbers break ties, so that entries are never compared
        self.soonest = inf  # when to look again: the time of the first item, live or stale; infinity: there is none

    def __len__(self) -> int:
        return len(self._heap)

    def arm(self, entry: T, at: float) -> None:
        """Set the deadline of `entry` to `at`. To drop it later, assign `entry.deadline = None`."""
        entry.deadline = at
        if at < entry.heap_time:
            self._push(entry, at)

    def forget(self, entry: T) -> None:
        """Make all items of `entry` stale: it has closed."""
        entry.deadline = None
        if entry.heap_time < inf:
            entry.heap_time = inf
            self.live -= 1
        self._rebuild_if_stale()

    def expired(self, now: float, most: int) -> Iterator[tuple[float, T]]:
        """Yield each entry whose deadline has passed, with that time, soonest first. The entry loses its deadline.

        At most `most` items are looked at; the others are left for the next call. If an entry is armed during this
        call, its item is left too. It ends the search, because no other item is due sooner.
        """
        heap = self._heap
        armed = self.serial
        for _ in range(most):
            if self.soonest > now or heap[0][1] > armed:
                return
            at, serial, entry = heappop(heap)
            self._note_soonest()
            if at != entry.heap_time:
                continue
            entry.heap_time = inf
            self.live -= 1
            if entry.deadline is None or entry.state is State.CLOSED:
                continue
            if entry.deadline > at:
                # The item keeps its number: it was not armed during this call, and its true deadline may have passed.
                entry.heap_time = entry.deadline
                self.live += 1
                heappush(heap, (entry.deadline, serial, entry))
                self._note_soonest()
                continue
            entry.deadline = None
            yield at, entry

    def _push(self, entry: T, at: float) -> None:
        if entry.heap_time == inf:
            self.live += 1
        entry.heap_time = at
        self.serial += 1
        heappush(self._heap, (at, self.serial, entry))
        self.soonest = self._heap[0][0]
        self._rebuild_if_stale()

    def _rebuild_if_stale(self) -> None:
        if len(self._heap) > _SMALL and len(self._heap) > 3 * self.live:
            self._heap[:] = [item for item in self._heap if item[0] == item[2].heap_time]
            heapify(self._heap)
            self._note_soonest()

    def _note_soonest(self) -> None:
        self.soonest = self._heap[0][0] if self._heap else inf
