"""Whether a new request may enter the table, and what happens if it may not.

`when_full` says what happens if the table is full. With `"wait"`, the engine stops accepting, and new connections stay
in the kernel's queue. With `"reject"`, the newcomer is refused. With `"evict"`, the request that has been idle longest
is ended; if nothing can be evicted, the newcomer is refused. A peer that has as many requests as it may have is
refused, or loses its own idlest request. Every refusal is counted; the log has one line for many refusals.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from heapq import nsmallest
from math import inf
from typing import Any

from reqtable.loop.step import Steps
from reqtable.server.hosted import Hosted, hosted
from reqtable.table.addresses import address_text
from reqtable.table.snapshot import unwrapped
from reqtable.table.states import Ending, Event, State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

_SAY_EVERY_S = 10.0
_EVICTABLE = {State.OPENING, State.READING, State.LINGERING}  # states of requests that wait for their peer
# How many of the idlest requests a search of the whole table collects: so many, or one of so many. So the search for
# one request takes the same time on average, however many rows there are.
_FOUND_MIN = 64
_FOUND_SHARE = 64


class Admission:
    """Decides which new requests an engine admits to its table."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._idlest: list[tuple[float, int]] = []  # (last active at, id); the idlest comes last
        self._unsaid: Counter[str] = Counter()
        self._say_at = -inf

    def has_room(self, server: Hosted, request: Any, peer: Any, peer_is_known: bool = True) -> bool:
        """Return whether the table has room for a request of `peer`, or room was made.

        If there is none, the refusal has been counted and sent to the client. If the peer is not known yet, only the
        table is asked, and `has_room_for_peer` later.
        """
        table = self._steps.table
        was_made = False
        if peer_is_known and self._peer_is_full(peer, None):
            if not self._make_room_of(server, request, peer, None):
                return False
            was_made = True  # the entry that ended is in the table until the end of the pass
        if table.full and not was_made and not (table.limits.when_full == "evict" and self._evict_idlest()):
            self._refuse(server, request, peer, "entries_max", table.limits.entries_max)
            return False
        return True

    def has_room_for_peer(self, server: Hosted, request: Any, peer: Any, own: Entry) -> bool:
        """Return whether `peer` may have another request, whose `own` entry is in the table already."""
        return not self._peer_is_full(peer, own) or self._make_room_of(server, request, peer, own)

    def _peer_is_full(self, peer: Any, own: Entry | None) -> bool:
        table = self._steps.table
        most = table.limits.entries_per_peer_max
        return most is not None and len(table.census.neighbours(peer)) - (own is not None) >= most

    def _make_room_of(self, server: Hosted, request: Any, peer: Any, own: Entry | None) -> bool:
        """End the idlest request of that peer, if the limits say so; else refuse the new one."""
        table = self._steps.table
        most = table.limits.entries_per_peer_max
        assert most is not None
        others = (entry for entry in table.census.neighbours(peer) if entry is not own)
        if table.limits.when_full == "evict" and self._evict(others):
            return True
        self._refuse(server, request, peer, "entries_per_peer_max", most)
        return False

    def relieve(self) -> None:
        """End the request whose buffers hold the most, because all buffers together hold too much."""
        table = self._steps.table
        most = max(table, key=_held)
        self.note(hosted(most.server), "buffered_bytes_max", self._steps.table.limits.buffered_bytes_max, most.peer)
        most.ending = Ending.LIMIT
        self._steps.end(most, Event.LOST)
        table.hold(most, 0)  # the bytes are freed in this pass

    def note(self, server: Hosted, reason: str, limit: Any, client_address: Any) -> None:
        """Count a refusal, and log it, at most once every few seconds."""
        server._counts.refused[reason] += 1
        self._unsaid[reason] += 1
        now = self._steps.table.now
        if now >= self._say_at:
            counts = ", ".join(f"{count} for {each}" for each, count in self._unsaid.items())
            log.warning(
                "%s was refused: %s is %s (refused since the last such line: %s)",
                address_text(client_address),
                reason,
                limit,
                counts,
            )
            self._unsaid.clear()
            self._say_at = now + _SAY_EVERY_S

    def _refuse(self, server: Hosted, request: Any, client_address: Any, reason: str, limit: int) -> None:
        self.note(server, reason, limit, client_address)
        refusal = getattr(unwrapped(server.RequestHandlerClass), "refusal", b"")
        if refusal and type(request) is self._steps.system.socket and not server._begins_with_tls:
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(refusal, socket.MSG_DONTWAIT)

    def _evict_idlest(self) -> bool:
        for searched in (False, True):
            while self._idlest:
                active_at, number = self._idlest.pop()
                entry = self._steps.table.get(number)
                if entry is not None and entry.active_at == active_at and self._evict([entry]):
                    return True
            if searched:
                break
            idle = ((entry.active_at, entry.id) for entry in self._steps.table if entry.state in _EVICTABLE)
            self._idlest = nsmallest(max(_FOUND_MIN, len(self._steps.table) // _FOUND_SHARE), idle)[::-1]
        return False

    def _evict(self, entries: Any) -> bool:
        """End the idlest of `entries` that waits for its peer. Returns False if there is none."""
        idle = [entry for entry in entries if entry.state in _EVICTABLE]
        if not idle:
            return False
        longest: Entry = min(idle, key=lambda entry: entry.active_at)
        longest.ending = Ending.LIMIT
        hosted(longest.server)._counts.refused["evicted"] += 1
        self._steps.end(longest, Event.LOST)
        return True


def _held(entry: Entry) -> int:
    """Return how many bytes a request holds in its buffers, those of its connections included."""
    rows = entry.reach.connections if entry.reach is not None else ()
    return entry.held + sum(row.held for row in rows)
