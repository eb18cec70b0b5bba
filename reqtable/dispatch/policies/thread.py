"""Policy `thread`: a thread per request.

The thread runs a blocking handler unchanged, and a resumable one in a loop of its own (see `private_loop`). The
handlers share the memory of the process, so they need locks around data that they share.

With `[thread] reuse`, a thread that has served its request waits a while for the next one, because a thread costs more
than a short request.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any
from weakref import WeakSet

from reqtable.dispatch.handoff import HandedOffRequest
from reqtable.dispatch.in_thread import InThread, InThreadPolicy
from reqtable.dispatch.policy import Host
from reqtable.dispatch.remote_steps import ThreadSteps
from reqtable.loop.process import Process
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry

_IDLE_MAX = 64  # how many threads wait for a request at a time
_IDLE_S = 5.0  # how long a thread waits for one


class RequestThread(threading.Thread):
    """Runs `serve` in a thread whose `start()` does not wait until the thread runs.

    To wait, the loop would, for each request, release the interpreter's lock, sit through two thread switches, and
    compete for the lock again.
    """

    def __init__(self, serve: Callable[[], None], name: str, daemon: bool) -> None:
        super().__init__(target=serve, name=name, daemon=daemon)
        self._started: Any  # the Event that `start()` waits for; `bool()` returns at once
        self._started.wait = bool

    def is_alive(self) -> bool:
        return not self._started.is_set() or super().is_alive()

    def join(self, timeout: float | None = None) -> None:
        if threading.Event.wait(self._started, timeout):
            super().join(timeout)


class _ReusedThread(RequestThread):
    """Serves one request after another. A daemon, because the interpreter's exit must not wait for an idle thread."""

    def __init__(self, policy: Thread, handoff: InThread) -> None:
        super().__init__(partial(self._serve_all, policy), _name_for(handoff), daemon=True)
        self._next: InThread | None = handoff
        self._gate = threading.Lock()  # its release wakes the idle thread
        self._gate.acquire()

    def serve_next(self, handoff: InThread | None) -> None:
        """Wake the idle thread, which serves this request; None: it ends."""
        self._next = handoff
        if handoff is not None:
            self.name = _name_for(handoff)
        self._gate.release()

    def _serve_all(self, policy: Thread) -> None:
        while (handoff := self._next) is not None:
            self._next = None
            goes_on = False
            try:
                Context().run(handoff.serve)  # no context variable outlives its request
                goes_on = True
            finally:
                stays = policy.served(self, handoff, goes_on)
            del handoff  # an idle thread must not keep it alive
            if stays and not self._gate.acquire(timeout=_IDLE_S) and not policy.forget(self):
                self._gate.acquire()  # it was given a request just then


class Thread(InThreadPolicy):
    """Starts a thread for each request, or gives the request to a thread that waits for one."""

    name = "thread"
    takes_whole_requests = True

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.threads: dict[threading.Thread, InThread] = {}  # those that serve a request
        self._lock = threading.Lock()  # of the two that follow
        self._idle: list[_ReusedThread] = []  # those that wait for a request, the latest last
        self._reuses = host.config.thread.reuse
        self._forks = Process.forks  # of the process whose threads they are
        _policies.add(self)

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
        thread: RequestThread | None = None
        try:
            handoff.give()
            idle = self._idle_thread()
            if idle is not None:
                self.threads[idle] = handoff
                idle.serve_next(handoff)
                return
            thread = self._new_thread(handoff)
            self.threads[thread] = handoff
            thread.start()
        except BaseException:
            if thread is not None:
                self.threads.pop(thread, None)
            handoff.take_back()
            raise

    def _new_thread(self, handoff: InThread) -> RequestThread:
        if self._reuses:
            return _ReusedThread(self, handoff)
        return RequestThread(partial(self._serve, handoff), _name_for(handoff), self.host.daemon_threads)

    def _serve(self, handoff: InThread) -> None:
        """In a thread of its own: serve the request."""
        try:
            handoff.serve()
        finally:
            self.threads.pop(threading.current_thread(), None)
            self._post_done(handoff)

    def _post_done(self, handoff: InThread) -> None:
        owner = handoff.entry.table.owner
        assert owner is not None
        owner.post(self.thread_done, handoff)

    # -- threads that are used again ----------------------------------------------------------------------------------

    def _idle_thread(self) -> _ReusedThread | None:
        """Return a thread that waits for a request, and does so until it is told; None if there is none."""
        if not self._idle:
            return None
        with self._lock:
            return self._idle.pop() if self._idle else None

    def served(self, thread: _ReusedThread, handoff: InThread, may_stay: bool) -> bool:
        """In the thread: return the request that it has served. Returns whether the thread waits for another one."""
        self.threads.pop(thread, None)
        with self._lock:  # before the request is returned: the loop may have another one for this thread
            stays = may_stay and self._reuses and len(self._idle) < _IDLE_MAX
            if stays:
                self._idle.append(thread)
        self._post_done(handoff)
        return stays

    def forget(self, thread: _ReusedThread) -> bool:
        """In the thread: stop waiting for a request. Returns False if the thread is given one at this moment."""
        with self._lock:
            if thread not in self._idle:
                return False
            self._idle.remove(thread)
            return True

    def _use_no_more(self) -> None:
        """End the idle threads, and have every other thread end with its request."""
        with self._lock:
            self._reuses = False
            idle, self._idle = self._idle, []
        for thread in idle:
            thread.serve_next(None)
        for thread in idle:
            thread.join()

    # -- the end ------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        self._use_no_more()
        for thread in list(self.threads):
            is_waited_for = not (self.host.daemon_threads if isinstance(thread, _ReusedThread) else thread.daemon)
            if is_waited_for and thread is not threading.current_thread():
                thread.join()

    def leave(self) -> None:
        """At the interpreter's exit: wait for the threads that it does not wait for, but should.

        These are the daemons that are used again, and those that had not begun when the exit began.
        """
        if self._forks == Process.forks:  # else they are the parent's
            self.wait()

    def close(self, wait: bool) -> None:
        self._use_no_more()

    def abandon(self) -> None:
        super().abandon()
        for handoff in self.threads.values():
            if handoff.driver is not None:
                handoff.driver.abandon()
        self.threads.clear()
        self._lock = threading.Lock()
        self._idle.clear()
        self._forks = Process.forks


def _name_for(handoff: InThread) -> str:
    return f"reqtable-{handoff.entry.id}"


_policies: WeakSet[Thread] = WeakSet()


@atexit.register
def _leave_all() -> None:
    for policy in list(_policies):
        policy.leave()
