"""Policy `inline`: everything runs on the loop.

The steps of resumable handlers interleave. A blocking handler runs to its end before anything else does, as in the four
plain classes of `socketserver`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from reqtable.dispatch.policy import Policy
from reqtable.dispatch.run_blocking import run
from reqtable.net.poll_only import PollOnly
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry
from reqtable.table.want import Want


class Inline(Policy):
    """Runs everything on the loop."""

    name = "inline"
    blocking_holds_loop = True

    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        return _ToItsEnd(entry, transport)


class _ToItsEnd:
    """Runs a whole blocking handler as one step."""

    __slots__ = ("_entry", "_transport")

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, entry: Entry, transport: PollOnly) -> None:
        self._entry = entry
        self._transport = transport

    def _resume(self, item: Any) -> Want[Any] | None:
        return run(self._entry, self._transport)

    def _throw(self, error: BaseException) -> None:
        raise error

    def _close(self) -> None:
        pass
