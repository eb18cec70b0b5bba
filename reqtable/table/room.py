"""`send` returns these to a coroutine: nothing to wait for, or room in the output."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any

from reqtable.table.places import warn_at_caller
from reqtable.table.want import Want


class _Done:
    """Completes at once when awaited, without a step."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()


class Room:
    """Waits for the peer when awaited. `send` returns it above the high-water mark.

    If `warns` is true, it warns if it is never awaited. A request that waits for more than its client need not wait
    here: its other wants wait for room.
    """

    __slots__ = ("_is_awaited", "_want")

    def __init__(self, want: Want[None], warns: bool) -> None:
        self._want = want
        self._is_awaited = not warns

    def __await__(self) -> Generator[Want[None], Any, None]:
        self._is_awaited = True
        return self._want.__await__()

    def __del__(self) -> None:
        if not self._is_awaited:
            warn_at_caller("output above high_water_bytes waits for the peer: write await self.send(…) to wait too")


DONE: Awaitable[None] = _Done()
