"""Policy `thread`: a thread per request.

A blocking handler runs in it unchanged; a resumable one is driven in it (see `driver`). The handlers share the memory
of the process, and need locks where they share data.
"""

from __future__ import annotations

import threading
from typing import Any

from reqtable.core.table import Entry, Resumable
from reqtable.dispatch.delegating import Delegating, HandingOff, InThread
from reqtable.dispatch.stepping import Pooled


class Thread(Delegating):
    name = "thread"

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        self.threads: dict[threading.Thread, InThread] = {}  # those that have not finished

    @property
    def most(self) -> int | None:
        return self.dispatcher.config.thread.threads_max

    @property
    def busy(self) -> int:
        return len(self.threads)

    def resumable(self, entry: Entry, handler: Any) -> Resumable:
        return HandingOff(entry, handler, self.name)

    def stepping(self, entry: Entry, handler: Any) -> Resumable:
        return Pooled(entry, handler, self.dispatcher.executor("thread"))

    def start(self, entry: Entry) -> None:
        delegation = InThread(entry, self)
        daemon = bool(getattr(entry.server, "daemon_threads", False))
        name = f"reqtable-{entry.id}"
        thread = threading.Thread(target=self._run, args=(delegation,), name=name, daemon=daemon)
        self.threads[thread] = delegation
        try:
            thread.start()
        except BaseException:
            del self.threads[thread]
            delegation.undo()
            raise

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

    def _run(self, delegation: InThread) -> None:
        owner = delegation.entry.table.owner
        assert owner is not None
        try:
            delegation.serve()
        finally:
            self.threads.pop(threading.current_thread(), None)
            owner.post(self.taken_back, delegation)
