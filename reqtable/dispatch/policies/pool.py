"""Policy `pool`: a bounded number of threads.

The loop does the I/O of a resumable handler. Only a step whose input is complete goes to a thread, so any number of
slow clients share a few threads. Steps of one request never overlap. A blocking handler has a thread of the pool to
itself. The server's `daemon_threads` and `block_on_close` mean the same as under policy `thread`.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Executor, Future
from threading import get_ident
from typing import Any

from reqtable.dispatch.forking.child import keep
from reqtable.dispatch.handoff import HandedOffRequest
from reqtable.dispatch.in_thread import InThread, InThreadPolicy
from reqtable.dispatch.policy import Host
from reqtable.dispatch.remote_steps import ThreadSteps
from reqtable.loop.threads import Threads
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry


class Pool(InThreadPolicy):
    """Runs all requests in a bounded number of threads."""

    name = "pool"

    _will_wake = False  # the threads are woken at the end of the pass

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._make_threads()

    @property
    def most(self) -> int | None:
        return self.host.config.pool.size

    @property
    def busy(self) -> int:
        return len(self._serving)

    def load(self) -> tuple[int, int, int]:
        """Return how many threads are busy, how many are idle, and how much waits for a thread."""
        busy, idle, waiting = self._threads.load() if isinstance(self._threads, Threads) else (self.busy, 0, 0)
        return busy, idle, waiting + len(self._waiting)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return ThreadSteps(entry, handler, self._threads)

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` in a thread of the pool, after this pass. It must not raise; it reports by itself.

        Raises RuntimeError. A thread that was woken at once would not run sooner: it would wait for the interpreter,
        and get it whenever the loop calls the system. Then the two would take turns for each request of the pass.
        """
        if not isinstance(self._threads, Threads):  # a simulation has another executor
            self._threads.submit(task)
            return
        self._threads.run(task)
        if not self._will_wake:
            self._will_wake = True
            self.host.steps.mailbox.at_end_of_pass(self._wake)

    def _wake(self) -> None:
        self._will_wake = False
        if isinstance(self._threads, Threads):
            self._threads.wake()

    def start(self, handoff: HandedOffRequest) -> None:
        assert isinstance(handoff, InThread)
        try:
            handoff.give()
            future = self._threads.submit(handoff.serve)
        except BaseException:
            handoff.take_back()
            raise
        self._serving[handoff] = future
        future.add_done_callback(lambda done: self._served(handoff, done))

    def wait(self) -> None:
        if not self.host.daemon_threads:
            own = get_ident()  # a handler that closes its server does not wait for itself
            concurrent.futures.wait([done for each, done in self._serving.items() if each.thread != own])

    def close(self, wait: bool) -> None:
        self._threads.shutdown(wait=wait and not self.host.daemon_threads, cancel_futures=True)
        self.host.run_posted()

    def abandon(self) -> None:
        super().abandon()
        for handoff in self._serving:
            if handoff.driver is not None:
                handoff.driver.abandon()
        keep(self._threads)
        self._make_threads()  # the parent's threads are not in this process

    def _make_threads(self) -> None:
        self._serving: dict[InThread, Future[None]] = {}
        self._will_wake = False
        self._threads: Executor = self.host.threads(self.host.config.pool.size, "reqtable-pool")

    def _served(self, handoff: InThread, done: Future[None]) -> None:
        self._serving.pop(handoff, None)
        owner = handoff.entry.table.owner
        assert owner is not None
        owner.post(self.thread_done, handoff)
