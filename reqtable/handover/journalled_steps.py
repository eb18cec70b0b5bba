"""The steps of an engine whose requests are in a journal."""

from __future__ import annotations

from typing import Any, Final

from reqtable.handover.journalled import JournalledStream
from reqtable.loop.platform import System
from reqtable.loop.step import Steps
from reqtable.table.limits import Limits
from reqtable.table.states import Event
from reqtable.table.table import Entry

_step: Final = Steps.step


class JournalledSteps(Steps):
    """Runs steps, and notes them in the journal."""

    def __init__(self, limits: Limits | None, system: System) -> None:
        super().__init__(limits, system)
        self.on_thaw = self._thawed

    def begin(self, entry: Entry) -> None:
        transport = entry.transport
        if isinstance(transport, JournalledStream):
            transport.enter(_index_of(entry))
        super().begin(entry)

    def _thawed(self, entry: Entry) -> None:
        transport = entry.transport
        if isinstance(transport, JournalledStream) and transport.slot is None:  # it comes by a hot restart
            transport.enter(_index_of(entry))

    def step(self, entry: Entry, cause: Event, error: BaseException | None = None, taken: int = 0) -> None:
        transport = entry.transport
        if not isinstance(transport, JournalledStream):
            _step(self, entry, cause, error, taken)
            return
        before = entry.steps
        transport.begin_steps()
        _step(self, entry, cause, error, taken)
        transport.end_steps(entry.steps != before)

    def give(self, entry: Entry, cause: Event, item: Any) -> None:
        transport = entry.transport
        if not isinstance(transport, JournalledStream):
            super().give(entry, cause, item)
            return
        transport.begin_steps()
        super().give(entry, cause, item)
        transport.end_steps(True)


def _index_of(entry: Entry) -> int:
    engine_servers: list[Any] = entry.server._host.servers  # type: ignore[attr-defined]
    return engine_servers.index(entry.server)
