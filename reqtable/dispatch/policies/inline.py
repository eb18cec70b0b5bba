"""Policy `inline`: everything on the loop.

A resumable handler's steps interleave with all others'. A blocking handler runs to its end before anything else does,
as under the plain four classes of `socketserver`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from reqtable.dispatch.forking.run_blocking import run
from reqtable.dispatch.policy import Policy
from reqtable.net.transports import Lent
from reqtable.table.table import Entry, Resumable
from reqtable.table.wants import Want


class Inline(Policy):
    name = "inline"

    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        return _ToItsEnd(self, entry, lent)


class _ToItsEnd:
    """One step: the whole handler."""

    __slots__ = ("_entry", "_lent", "_policy")

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, policy: Policy, entry: Entry, lent: Lent) -> None:
        self._policy = policy
        self._entry = entry
        self._lent = lent

    def _resume(self, item: Any) -> Want[Any] | None:
        return self._policy.returned(self._entry, run(self._entry, self._lent))

    def _throw(self, error: BaseException) -> None:
        raise error

    def _close(self) -> None:
        pass
