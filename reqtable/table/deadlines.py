"""Deadlines: a heap with lazy cancellation.

The rules:

* An entry has at most one deadline, `entry.deadline` (seconds on the engine's clock, or None).
* Moving it later, or dropping it, is an assignment: the heap is not touched. When the older time, now stale, comes up,
  the entry is put back at its true deadline or forgotten. `entry.heap_time` is the heap time that counts for it.
* Moving it earlier than `heap_time` pushes again; the later item is stale and is passed over.
* Items of closed entries, and stale ones, never outnumber the live ones by more than two to one: then it is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, Protocol, TypeVar

from reqtable.table.states import State

_SMALL = 64  # a heap this small is never rebuilt


class Timed(Protocol):
    """What has a deadline: an entry of the table."""

    state: State
    deadline: float | None
    heap_time: float


T = TypeVar("T", bound=Timed)


class Deadlines(Generic[T]):
    """The deadlines of a table's entries, soonest first."""

    __slots__ = ("_heap", "live", "serial")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self.live = 0  # entries with heap_time < inf
        self.serial = 0  # of the last item; it also breaks ties, so that entries are never compared

    def __len__(self) -> int:
        return len(self._heap)

    def arm(self, entry: T, at: float) -> None:
        """`entry` expires at `at` unless it is armed again or dropped (`entry.deadline = None`) before."""
        entry.deadline = at
        if at < entry.heap_time:
            self._push(entry, at)

    def forget(self, entry: T) -> None:
        """`entry` has closed: its items are stale from now on."""
        entry.deadline = None
        if entry.heap_time < inf:
            entry.heap_time = inf
            self.live -= 1
        self._rebuild_if_stale()

    def next_at(self) -> float:
        """When to look again: the soonest deadline, or a stale one before it; infinity where there is none."""
        return self._heap[0][0] if self._heap else inf

    def expired(self, now: float, most: int) -> Iterator[tuple[float, T]]:
        """Each entry whose deadline has passed, and when that was, the soonest first; its deadline is taken from it.

        At most `most` items are looked at; the others are there the next time. One that is armed meanwhile is left for
        then, too: it stops the search, as nothing is due sooner.
        """
        heap = self._heap
        armed = self.serial
        for _ in range(most):
            if not heap or heap[0][0] > now or heap[0][1] > armed:
                return
            at, serial, entry = heappop(heap)
            if at != entry.heap_time:
                continue
            entry.heap_time = inf
            self.live -= 1
            if entry.deadline is None or entry.state is State.CLOSED:
                continue
            if entry.deadline > at:
                # With its old number: it was not armed just now, and may be due by now all the same.
                entry.heap_time = entry.deadline
                self.live += 1
                heappush(heap, (entry.deadline, serial, entry))
                continue
            entry.deadline = None
            yield at, entry

    def _push(self, entry: T, at: float) -> None:
        if entry.heap_time == inf:
            self.live += 1
        entry.heap_time = at
        self.serial += 1
        heappush(self._heap, (at, self.serial, entry))
        self._rebuild_if_stale()

    def _rebuild_if_stale(self) -> None:
        if len(self._heap) > _SMALL and len(self._heap) > 3 * self.live:
            self._heap[:] = [item for item in self._heap if item[0] == item[2].heap_time]
            heapify(self._heap)
