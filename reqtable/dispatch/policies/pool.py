"""Policy `pool`: a bounded number of threads.

The loop does the I/O of a resumable handler; only a step whose input is complete goes to a thread, so any number of
slow clients share a few. Steps of one request never overlap. A blocking handler has a thread of the pool to itself.
The server's `daemon_threads` and `block_on_close` mean what they mean under policy `thread`.
"""

from __future__ import annotations

import concurrent.futures
from concurrent.futures import Future
from threading import get_ident
from typing import Any

from reqtable.dispatch.forking.child import keep
from reqtable.dispatch.handoff import Delegating, InThread
from reqtable.dispatch.remote_steps import Pooled
from reqtable.table.table import Entry, Resumable


class Pool(Delegating):
    name = "pool"

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        self._make_threads()

    @property
    def most(self) -> int | None:
        return self.dispatcher.config.pool.size

    @property
    def busy(self) -> int:
        return len(self._serving)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Pooled(entry, handler, self._threads)

    def start(self, entry: Entry) -> None:
        delegation = InThread(entry, self)
        try:
            future = self._threads.submit(delegation.serve)
        except BaseException:
            delegation.undo()
            raise
        self._serving[delegation] = future
        future.add_done_callback(lambda done: self._served(delegation, done))

    def wait(self) -> None:
        if not self.dispatcher.daemon_threads:
            own = get_ident()  # a handler that closes its server does not wait for itself
            concurrent.futures.wait([done for each, done in self._serving.items() if each.thread != own])

    def close(self, wait: bool) -> None:
        self._threads.shutdown(wait=wait and not self.dispatcher.daemon_threads, cancel_futures=True)
        self.engine.settle()

    def abandon(self) -> None:
        super().abandon()
        for delegation in self._serving:
            if delegation.driver is not None:
                delegation.driver.close_descriptors()
        keep(self._threads)
        self._make_threads()  # the parent's are not in this process

    def _make_threads(self) -> None:
        self._serving: dict[InThread, Future[None]] = {}
        self._threads = self.dispatcher.threads(self.dispatcher.config.pool.size, "reqtable-pool")

    def _served(self, delegation: InThread, done: Future[None]) -> None:
        self._serving.pop(delegation, None)
        owner = delegation.entry.table.owner
        assert owner is not None
        owner.post(self.taken_back, delegation)
