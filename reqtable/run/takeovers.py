"""`Takeovers`: which crashed workers wait for a successor that continues their requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from reqtable.config import Config
from reqtable.loop.step import Steps
from reqtable.server.engine import Engine

if TYPE_CHECKING:
    from reqtable.run.standby import Standby


class NoStandby:
    """Stands in for a standby if workers take nothing over."""

    def started(self, pid: int, steps: Steps) -> None:
        pass

    def serves(self) -> None:
        pass

    def begin(self, engine: Engine, attempts_max: int) -> None:
        pass

    def restore(self, engine: Engine) -> None:
        pass

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        pass


AnyStandby: TypeAlias = "Standby | NoStandby"


class Takeovers:
    """Makes the standbys of workers. If a worker crashes, the next one that is started continues its requests."""

    def __init__(self, config: Config) -> None:
        self._is_on = config.takeover
        self._waiting: list[Standby] = []  # of crashed workers

    def new(self, number: int) -> AnyStandby:
        """Return the standby of a new worker, which continues what the worker that crashed first has left."""
        if not self._is_on:
            return NoStandby()
        from reqtable.run.standby import Standby  # only here: most programs do without

        return Standby(number, self._waiting.pop(0) if self._waiting else None)

    def ended(self, standby: AnyStandby, crashed: bool) -> bool:
        """Keep the standby of a worker that has crashed, and close that of another.

        Returns whether another worker is to continue its requests at once.
        """
        if not crashed or isinstance(standby, NoStandby):
            standby.close()
            return False
        rest = standby.rest()
        if rest is None:
            return False
        self._waiting.append(rest)
        return rest.may_start_at_once

    def close(self) -> None:
        """Give up what waits: no worker will continue it."""
        for each in self._waiting:
            each.close()
        self._waiting.clear()

    def abandon(self) -> None:
        """In a worker: close this process's copies of what waits."""
        for each in self._waiting:
            each.abandon()
