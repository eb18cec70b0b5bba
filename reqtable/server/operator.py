"""`Operator`: steers an engine for an operator, who uses a signal or the control socket."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Protocol

from reqtable.config import CONFIG_VARIABLE, Config, changed, differences, effective, from_environment
from reqtable.server.configured import reconfigure
from reqtable.server.drain import Drain
from reqtable.server.engine import Engine
from reqtable.table.errors import ConfigurationError
from reqtable.table.states import State

log = logging.getLogger("reqtable")

HANDOVER_VARIABLE = "REQTABLE_HANDOVER"  # the number of a descriptor: the pair with the process before
SET_BY_HAND = "reqtable set"  # where a value comes from that was set while the server runs
NO_RESTART = (
    "this program can't be restarted from here: "
    "that needs serve(), reqtable serve, http or wsgi, and the package msgspec"
)


class Restarting(Protocol):
    """Moves the requests to the next version of the program."""

    @property
    def counts(self) -> Counter[str]:
        """How often the program was restarted, by how that went: "done" or "failed"."""

    def begin(self, only_checks: bool = False, on_outcome: Callable[[Mapping[str, Any]], Any] = bool) -> None:
        """Begin, and call `on_outcome` once it is known whether this works. Raises ReqtableError if it can't begin."""

    def stop(self) -> bool:
        """End a restart that is under way: this process was told to end. Returns whether it drains already."""

    def close(self) -> None:
        """End a restart that is under way: this process ends at once."""

    def shown(self) -> Mapping[str, Any] | None:
        """Return how far the restart has come, as plain data; None if there is none."""


class Taking(Protocol):
    """Takes the requests of another process over."""

    taken: int  # how many requests
    is_over: bool  # no more will come
    longest_freeze_s: float
    began_at: float  # by the table's clock


class Operator:
    """Steers one engine. For the loop's own thread only.

    `config` is the configuration in force, `read` a function that reads it again. Without them, the configuration is
    that of the first server, and the file that `REQTABLE_CONFIG` names is read.
    """

    def __init__(self, engine: Engine, config: Config | None = None, read: Callable[[], Config] | None = None) -> None:
        self.engine = engine
        self._config = config
        self._read = read
        self.began_at = engine.table.clock()
        self.changed_at: float | None = None  # when the configuration was changed last, by the table's clock
        self.changes: list[dict[str, Any]] = []  # the keys that were changed then
        self.reloads: Counter[str] = Counter(applied=0, refused=0)
        self.restart: Restarting | None = None  # moves the requests to the next version of the program
        self.takers: Sequence[Taking] = ()  # have taken requests over, when this process began
        self.reopen: Callable[[], Any] = bool  # has the control socket back: the process that had taken it is gone

    @property
    def config(self) -> Config:
        """The configuration in force."""
        if self._config is None:
            servers: list[Any] = list(self.engine.servers)
            return servers[0]._policies.config if servers else Config(limits=self.engine.limits)
        return self._config

    def shown(self) -> list[dict[str, Any]]:
        """Return every key of the configuration, with its value and where the value comes from."""
        return [{"key": key, "value": value, "origin": origin} for key, value, origin in effective(self.config)]

    def set(self, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Change some values, such as `{"limits.entries_max": 5000}`, and serve new requests by them.

        Returns what has changed. Raises ConfigurationError, and changes nothing, if a value can't be used.
        """
        return self._apply(changed(self.config, changes, SET_BY_HAND))

    def reload(self) -> list[dict[str, Any]]:
        """Read the configuration again, and serve new requests by it. Returns what has changed.

        Raises ConfigurationError, and changes nothing, if it can't be used.
        """
        if self._read is None and not os.environ.get(CONFIG_VARIABLE):
            raise ConfigurationError(f"this program reads no configuration: name its file in {CONFIG_VARIABLE}")
        try:
            changes = self._apply((self._read or from_environment)())
        except ConfigurationError:
            self.reloads["refused"] += 1
            raise
        self.reloads["applied"] += 1
        return changes

    def _apply(self, config: Config) -> list[dict[str, Any]]:
        before = self.config
        reconfigure(self.engine.servers, config)
        self._config = config
        found = differences(before, config)
        if found:
            self.changes, self.changed_at = found, self.engine.table.clock()
        return found

    def announce_drain(self) -> None:
        """In a signal handler, before `drain`: a step that is running may be about to answer."""
        for server in self.engine.servers:
            server._is_draining = True

    def drain(
        self,
        stay: bool = False,
        hint: str = "",
        progress: Callable[[int, float], None] | None = None,
        ended: Callable[[], Any] | None = None,
    ) -> Drain | None:
        """Stop accepting. Unless `stay`, stop serving once all requests are done or `drain_timeout_s` is over.

        `ended` is called then; None: the engine's loop stops. Returns the drain, unless `stay`.
        """
        engine = self.engine
        if stay:
            for server in engine.servers:
                server._is_draining = True
                engine.listeners.unlisten_for_good(server)
            return None
        most_s = engine.limits.drain_timeout_s
        at_first = sum(entry.state is not State.CLOSED for entry in engine.table)
        if at_first:
            are = "1 request is" if at_first == 1 else f"{at_first} requests are"
            log.info("ending when %s done, or in %g s%s", are, most_s, hint)
        until = engine.table.now + most_s if most_s < inf else inf
        drain = Drain(engine, engine.servers, until, ended or engine.stop, progress)
        drain.begin()
        return drain
