"""Policy `thread`: a thread per request.

The thread runs a blocking handler unchanged, and a resumable one in a loop of its own (see `private_loop`). The
handlers share the memory of the process, so they need locks around data that they share.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from reqtable.dispatch.handoff import HandedOffRequest
from reqtable.dispatch.in_thread import InThread, InThreadPolicy
from reqtable.dispatch.policy import Host
from reqtable.dispatch.remote_steps import ThreadSteps
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry


class RequestThread(threading.Thread):
    """Runs `serve` in a thread whose `start()` does not wait until the thread runs.

    To wait, the loop would, for each request, release the interpreter's lock, sit through two thread switches, and
    compete for the lock again.
    """

    def __init__(self, serve: Callable[[], None], name: str, daemon: bool) -> None:
        super().__init__(target=serve, name=name, daemon=daemon)
        self._started: Any  # the Event that `start()` waits for; `bool()` returns at once
        self._started.wait = bool

    def wait_until_begun(self, timeout: float | None = None) -> bool:
        return threading.Event.wait(self._started, timeout)

    def is_alive(self) -> bool:
        return not self._started.is_set() or super().is_alive()

    def join(self, timeout: float | None = None) -> None:
        if self.wait_until_begun(timeout):
            super().join(timeout)


class Thread(InThreadPolicy):
    """Starts a thread for each request."""

    name = "thread"
    takes_whole_requests = True

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.threads: dict[threading.Thread, InThread] = {}  # those that have not ended
        self._starting: deque[RequestThread] = deque()  # those started in this pass

    @property
    def most(self) -> int | None:
        return self.host.config.thread.threads_max

    @property
    def busy(self) -> int:
        return len(self.threads)

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        return self.handoff(entry, handler)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return ThreadSteps(entry, handler, self.host.executor("thread"))

    def start(self, handoff: HandedOffRequest) -> None:
        assert isinstance(handoff, InThread)
        name = f"reqtable-{handoff.entry.id}"
        thread = RequestThread(partial(self._run, handoff), name, self.host.daemon_threads)
        self.threads[thread] = handoff
        try:
            handoff.give()
            thread.start()
        except BaseException:
            del self.threads[thread]
            handoff.take_back()
            raise
        # The interpreter's exit does not wait for a thread that has not begun, so wait here or at the end of the pass.
        if not self.in_pass(handoff.entry):
            thread.wait_until_begun()
            return
        if not self._starting:
            self.host.steps.mailbox.at_end_of_pass(self._wait_until_begun)
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
        for handoff in self.threads.values():
            if handoff.driver is not None:
                handoff.driver.abandon()
        self.threads.clear()
        self._starting.clear()

    def _run(self, handoff: InThread) -> None:
        owner = handoff.entry.table.owner
        assert owner is not None
        try:
            handoff.serve()
        finally:
            self.threads.pop(threading.current_thread(), None)
            owner.post(self.thread_done, handoff)
