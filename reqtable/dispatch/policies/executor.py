"""Policy `executor`: each step of a state machine is shipped, as data, to any `concurrent.futures.Executor`.

The loop does the I/O. A step goes out as the handler's class, fields, state and item, and comes back as fields, output
and transition (see `shipping`), so it may run in a pool of processes or on another machine of a cluster.
"""

from __future__ import annotations

from typing import Any

from reqtable.dispatch.pickled_steps import Shipped, check_shippable
from reqtable.dispatch.policy import Policy
from reqtable.dispatch.pools import Workers
from reqtable.net.transports import Lent
from reqtable.table.errors import ConfigurationError
from reqtable.table.table import Entry, Resumable


class Executor(Policy):
    name = "executor"
    steps_on_loop = False

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        config = dispatcher.config
        self._workers = Workers("policy 'executor'", config.executor, config.origins.get("executor.factory"))

    @classmethod
    def check(cls, handler_class: Any) -> None:
        check_shippable(handler_class, cls.name)

    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        raise ConfigurationError("policy 'executor' can't run a blocking handler")  # `check` refused it

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Shipped(entry, handler, self._workers)

    def close(self, wait: bool) -> None:
        if wait:
            self._workers.settle()
        self.engine.settle()  # handlers whose step was out are closed now, over there
        self._workers.shutdown(wait=wait)

    def abandon(self) -> None:
        self._workers.abandon()
