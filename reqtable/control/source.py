"""`Source`: what answers the control API. One process answers by itself; a supervisor asks its workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from reqtable.control.jobs import Job, Then, Turns
from reqtable.control.operations import OPERATIONS, Target
from reqtable.control.recorder import recorder_of


class Asking(Protocol):
    """An operation that was asked for. Its batches are pulled one by one."""

    def pull(self, then: Then) -> None:
        """Call `then(batch)` with the next batch: END after the last one, a `Failed` if the operation fails."""

    def close(self) -> None:
        """Want no more batches."""


class Source(Protocol):
    """Answers what an operator asks."""

    def ask(self, operation: str, arguments: Mapping[str, Any]) -> Asking:
        """Begin an operation of `OPERATIONS`."""


class OwnSource:
    """Answers for the engine of this process."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._turns = Turns(target.engine.post)
        if target.operator.config.control.metrics is not None:
            recorder_of(target.engine).look(for_ever=True)

    def ask(self, operation: str, arguments: Mapping[str, Any]) -> Job:
        job = Job(self._turns)
        return job.begin(OPERATIONS[operation](self._target, arguments, job))
