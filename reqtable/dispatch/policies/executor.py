"""Policy `executor`: each step of a state machine is shipped, as data, to any `concurrent.futures.Executor`.

The loop does the I/O. A step goes out as the handler's class, fields, state and item, and comes back as fields, output
and transition (see `shipping`), so it may run in a pool of processes or on another machine of a cluster.
"""

from __future__ import annotations

from typing import Any

from reqtable.dispatch.pickled_steps import PickledSteps, check_pickled
from reqtable.dispatch.policy import Host, Policy
from reqtable.dispatch.pools import RestartingPool
from reqtable.net.poll_only import PollOnly
from reqtable.table.errors import ConfigurationError
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry


class Executor(Policy):
    """Each step as data, in an executor."""

    name = "executor"
    steps_on_loop = False

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        config = host.config
        self._workers = RestartingPool("policy 'executor'", config.executor, config.origins.get("executor.factory"))

    @classmethod
    def check(cls, handler_class: Any) -> None:
        check_pickled(handler_class, cls.name)

    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        raise ConfigurationError("policy 'executor' can't run a blocking handler")  # `check` refused it

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return PickledSteps(entry, handler, self._workers)

    def close(self, wait: bool) -> None:
        if wait:
            self._workers.wait_for_all()
        self.host.run_posted()  # handlers whose step was out are closed now, over there
        self._workers.shutdown(wait=wait)

    def abandon(self) -> None:
        self._workers.abandon()
