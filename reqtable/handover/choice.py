"""`Choice`: which requests of an engine move to another process, and why the others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from reqtable.server.engine import Engine
from reqtable.server.shared_state import shares_of
from reqtable.table.addresses import address_text
from reqtable.table.errors import NotMovable
from reqtable.table.record import why_not_movable
from reqtable.table.states import State
from reqtable.table.table import Entry


class Choice:
    """Chooses the requests of `engine` that move.

    `is_whole` says that requests share state, so that all of them move at once. `stays` has the ids of requests that
    can't be recorded, or that the taker has refused, with the reasons.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._left_behind: list[Any] = []  # the servers whose sockets the taker does not use
        self.is_whole = any(shares_of(each) for each in engine.servers)
        self.stays: dict[int, str] = {}

    def leave_behind(self, sockets: Sequence[tuple[str, Any]], used: Sequence[str]) -> None:
        """Note which of the offered sockets the taker uses: requests of the other servers stay."""
        left = Counter(used)
        for (key, _), server in zip(sockets, self._engine.servers, strict=False):
            left[key] -= 1
            if left[key] < 0:
                self._left_behind.append(server)

    def servers(self) -> list[Any]:
        """Return the servers whose sockets the taker uses."""
        return [each for each in self._engine.servers if each not in self._left_behind]

    def all(self) -> Iterator[Entry]:
        """Yield the requests that can move now."""
        found = self._engine.mover.movable(but=self.stays)
        return (each for each in found if each.server not in self._left_behind)

    def streams(self, up_to: int, most: int) -> list[Entry]:
        """Return at most `most` requests with connections that can move now, whose ids are not above `up_to`."""
        return list(islice((each for each in self.all() if each.input.is_stream and each.id <= up_to), most))

    def records(self, entries: Sequence[Entry]) -> list[bytes]:
        """Return the records of those of `entries` that can move. Note which of the others can't be recorded."""
        found = []
        for entry in entries:
            if why_not_movable(entry) is None and entry.server not in self._left_behind:
                try:
                    found.append(self._engine.mover.record(entry).record)
                except NotMovable as error:
                    self.stays[entry.id] = error.reason
        return found

    def refusal(self) -> str:
        """Return the words of an error: some requests can't move."""
        return "some requests can't move: " + "; ".join(f"{n} because {why}" for why, n in self.immovable().items())

    def immovable(self) -> Counter[str]:
        """Return why requests that have not ended can't move, and how many there are for each reason."""
        unfinished = [each for each in self._engine.table if each.state is not State.CLOSED]
        return Counter(why for each in unfinished if (why := self._why_it_stays(each)) is not None)

    def _why_it_stays(self, entry: Entry) -> str | None:
        """Return why a request can't move; None if it can."""
        reason = why_not_movable(entry)
        if reason is None and entry.server in self._left_behind:
            reason = f"the new program does not serve {address_text(entry.server.server_address)}"
        return reason or self.stays.get(entry.id)
