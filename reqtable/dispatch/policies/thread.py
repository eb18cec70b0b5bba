"""Policy `thread`: a thread per request.

A blocking handler runs in it unchanged; a resumable one is driven in it (see `driver`). The handlers share the memory
of the process, and need locks where they share data.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from reqtable.dispatch.handoff import Delegating, HandingOff, InThread
from reqtable.dispatch.remote_steps import Pooled
from reqtable.table.table import Entry, Resumable


class RequestThread(threading.Thread):
    """A thread whose `start()` does not wait until it runs: for that, the loop would for each request give away the
    interpreter's lock, wait for two switches between threads, and fight for it again.
    """

    def __init__(self, serve: Callable[[], None], name: str, daemon: bool) -> None:
        super().__init__(target=serve, name=name, daemon=daemon)
        self._started: Any  # the Event that `start()` would wait for; where a Python has none, it waits
        self._started.wait = bool

    def wait_until_begun(self, timeout: float | None = None) -> bool:
        return threading.Event.wait(self._started, timeout)

    def is_alive(self) -> bool:
        return not self._started.is_set() or super().is_alive()

    def join(self, timeout: float | None = None) -> None:
        if self.wait_until_begun(timeout):
            super().join(timeout)


class Thread(Delegating):
    name = "thread"

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        self.threads: dict[threading.Thread, InThread] = {}  # those that have not finished
        self._starting: deque[RequestThread] = deque()  # in this pass

    @property
    def most(self) -> int | None:
        return self.dispatcher.config.thread.threads_max

    @property
    def busy(self) -> int:
        return len(self.threads)

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        return HandingOff(entry, handler, self)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Pooled(entry, handler, self.dispatcher.executor("thread"))

    def start(self, entry: Entry) -> None:
        delegation = InThread(entry, self)
        name = f"reqtable-{entry.id}"
        thread = RequestThread(partial(self._run, delegation), name, self.dispatcher.daemon_threads)
        self.threads[thread] = delegation
        try:
            thread.start()
        except BaseException:
            del self.threads[thread]
            delegation.undo()
            raise
        # No later than this pass ends: Python does not wait at its exit for a thread that has not begun.
        if not self.in_pass(entry):
            thread.wait_until_begun()
            return
        if not self._starting:
            self.engine.retry(self._wait_until_begun, in_s=0)
        self._starting.append(thread)

    def _wait_until_begun(self) -> None:
        while self._starting:
            self._starting.popleft().wait_until_begun()

    def wait(self) -> None:
        for thread in list(self.threads):
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()

    def abandon(self) -> None:
        super().abandon()
        for delegation in self.threads.values():
            if delegation.driver is not None:
                delegation.driver.close_descriptors()
        self.threads.clear()
        self._starting.clear()

    def _run(self, delegation: InThread) -> None:
        owner = delegation.entry.table.owner
        assert owner is not None
        try:
            delegation.serve()
        finally:
            self.threads.pop(threading.current_thread(), None)
            owner.post(self.taken_back, delegation)
