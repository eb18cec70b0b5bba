"""Policy `inline`: everything on the loop.

A resumable handler's steps interleave with all others'. A blocking handler runs to its end before anything else does,
as under the plain four classes of `socketserver`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from reqtable.core.table import Entry, Resumable
from reqtable.dispatch.base import Policy
from reqtable.engine.transports import Lent


class Inline(Policy):
    name = "inline"

    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        return _ToItsEnd(entry, lent)


class _ToItsEnd:
    """One step: the whole handler."""

    __slots__ = ("_entry", "_lent")

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, entry: Entry, lent: Lent) -> None:
        self._entry = entry
        self._lent = lent

    def _resume(self, item: Any) -> None:
        self._entry.server.finish_request(self._lent.request, self._entry.peer)

    def _throw(self, error: BaseException) -> None:
        raise error

    def _close(self) -> None:
        pass
