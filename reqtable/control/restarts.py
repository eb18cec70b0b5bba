"""A restart that an operator has asked for, with how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from reqtable.control.jobs import WAIT, Job
from reqtable.control.query import Conflict
from reqtable.server.operator import NO_RESTART, Restarting
from reqtable.table.errors import ReqtableError

LOOK_S = 0.25  # how often the operator hears how far a restart has come


class Cancellable(Protocol):
    """Describes a timer."""

    def cancel(self) -> None: ...


def restarted(
    restart: Restarting | None, arguments: Mapping[str, Any], job: Job, call_later: Callable[..., Cancellable]
) -> Iterator[Any]:
    """Begin a restart, or a check. Yield how far it has come, again and again, and last how it went: one row each."""
    if restart is None:
        raise Conflict(NO_RESTART)
    outcomes: list[Mapping[str, Any]] = []

    def came(outcome: Mapping[str, Any]) -> None:
        outcomes.append(outcome)
        job.wake()

    try:
        restart.begin(bool(arguments.get("check")), came)
    except ReqtableError as error:
        raise Conflict(str(error)) from None
    while not outcomes:
        yield [restart.shown()]
        timer = call_later(LOOK_S, job.wake)
        try:
            if not outcomes:
                yield WAIT
        finally:
            timer.cancel()
    yield [outcomes[0]]
