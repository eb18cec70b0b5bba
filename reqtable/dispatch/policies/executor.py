"""Policy `executor`: each step of a state machine is shipped, as data, to any `concurrent.futures.Executor`.

The loop does the I/O. A step and its result are plain data (see `pickled_steps`), so the step may run in a pool of
processes or on another machine of a cluster.
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


class ExecutorPolicy(Policy):
    """Ships each step to an executor, as data."""

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
        raise ConfigurationError("policy 'executor' can't run a blocking handler")  # `check` has refused it before

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return PickledSteps(entry, handler, self._workers)

    def close(self, wait: bool) -> None:
        if wait:
            self._workers.wait_for_all()
        self.host.run_posted()  # close the handlers, in the executor, of requests that ended during a step
        self._workers.shutdown(wait=wait)

    def abandon(self) -> None:
        self._workers.abandon()
