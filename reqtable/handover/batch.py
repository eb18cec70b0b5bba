"""`Batch`: requests that are frozen together, until all of them are committed or thawed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from reqtable.handover import messages
from reqtable.server.engine import Engine
from reqtable.table import plain
from reqtable.table.errors import NotMovable
from reqtable.table.saving import Movable
from reqtable.table.states import State
from reqtable.table.table import Entry

log = logging.getLogger("reqtable")

T = TypeVar("T")

ROWS_PER_MESSAGE = 250


def parts_of(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the parts that go into one message each."""
    return (things[first : first + ROWS_PER_MESSAGE] for first in range(0, len(things), ROWS_PER_MESSAGE))


@dataclass(slots=True)
class Frozen:
    """A frozen request, with how much was waiting for it when its record was made."""

    entry: Entry
    movable: Movable
    pieces: int
    told: int
    is_refused: bool = False
    is_ended: bool = False  # and the taker knows


class Batch:
    """Freezes requests. `stays` has the ids of those that can't be recorded, and why: they are not frozen."""

    def __init__(self, engine: Engine, entries: Sequence[Entry]) -> None:
        self._engine = engine
        self._freezer = engine.mover.freezer
        self._began_at = engine.table.clock()
        self.frozen: list[Frozen] = []
        self.stays: dict[int, str] = {}
        for entry in entries:
            try:
                movable = engine.mover.record(entry)
            except NotMovable as error:
                self.stays[entry.id] = error.reason
                log.info("%s", error)
                continue
            told = len(entry.reach.told) if entry.reach is not None else 0
            self.frozen.append(Frozen(entry, movable, len(entry.output.pieces), told))
        self._freezer.freeze([each.entry for each in self.frozen])
        self._unsent = parts_of(self.frozen)
        self._sent: Sequence[Frozen] = ()

    @property
    def lasted_s(self) -> float:
        """For how many seconds the requests have been frozen."""
        return self._engine.table.clock() - self._began_at if self.frozen else 0.0

    def next_part(self) -> Sequence[Frozen]:
        """Return the requests for the next message; none if all are sent."""
        self._sent = next(self._unsent, ())
        return self._sent

    def refuse(self, place: int) -> int:
        """Keep a request of the part that was sent last: the taker can't go on with it. Returns its id."""
        refused = self._sent[place]
        refused.is_refused = True
        return refused.entry.id

    def late(self) -> list[messages.Late]:
        """Return what has happened to the requests since their records were made."""
        return [found for place, each in enumerate(self.frozen) if (found := _late(place, each)) is not None]

    def later(self) -> list[messages.Late]:
        """Return what has happened to the requests since `late` was called: the kernel had no room for the Commit.

        Anything but plain data is dropped.
        """
        found = []
        for place, each in enumerate(self.frozen):
            entry = each.entry
            pieces = [piece for piece in entry.output.pieces[each.pieces :] if isinstance(piece, bytes)]
            told = [] if entry.reach is None else _plain_among(list(entry.reach.told)[each.told :])
            is_cancelled = entry.ending is not None and not each.is_ended
            if not each.is_refused and (pieces or told or is_cancelled):
                found.append(messages.Late(place, pieces, plain.encode(told), is_cancelled))
        return found

    def let_go(self) -> int:
        """End the rows of the requests, which are the taker's now. Thaw those that were refused.

        Returns how many have moved.
        """
        moved = 0
        for each in self.frozen:
            if each.is_refused:
                self._freezer.thaw(each.entry)
            elif each.entry.state is State.MOVING:
                self._freezer.let_go(each.entry)
                moved += 1
        return moved

    def thaw(self) -> None:
        """Go on with all of the requests here."""
        frozen, self.frozen = self.frozen, []
        for each in frozen:
            if each.entry.state is State.MOVING:
                self._freezer.thaw(each.entry)


def _late(place: int, frozen: Frozen) -> messages.Late | None:
    """Return what has happened to a frozen request since its record was made; None if nothing has."""
    entry = frozen.entry
    if frozen.is_refused:
        return None
    pieces = entry.output.pieces[frozen.pieces :]
    told = list(entry.reach.told)[frozen.told :] if entry.reach is not None else []
    is_cancelled = entry.ending is not None
    frozen.pieces, frozen.told, frozen.is_ended = frozen.pieces + len(pieces), frozen.told + len(told), is_cancelled
    if not (pieces or told or is_cancelled):
        return None
    try:
        if not all(isinstance(each, bytes) for each in pieces):
            raise NotMovable("a file was sent to it while it was frozen")
        return messages.Late(place, pieces, plain.encode(told), is_cancelled)
    except NotMovable as error:
        log.info("request %d stays in this process: %s", entry.id, error)
        frozen.is_refused = True
        return messages.Late(place, [], b"", False, stays=True)


def _plain_among(items: list[Any]) -> list[Any]:
    """Return the items that are plain data."""
    found = []
    for each in items:
        try:
            plain.encode(each)
        except NotMovable as error:
            log.warning("a message to a request that has moved is lost: %s", error)
        else:
            found.append(each)
    return found
