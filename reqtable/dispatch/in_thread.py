"""Giving a request to a thread. Policies `thread` and `pool` differ only in where the thread comes from."""

from __future__ import annotations

import threading
from collections import deque

from reqtable.dispatch.handoff import HandedOffRequest, HandoffPolicy
from reqtable.dispatch.private_loop import PrivateLoop
from reqtable.dispatch.progress import Progress, progress_of
from reqtable.dispatch.run_blocking import end_forked, serve_in_thread
from reqtable.net.datagram import Session
from reqtable.net.idle import end_if_idle, is_idle
from reqtable.net.poll_only import PollOnly
from reqtable.table.parts import Resumable
from reqtable.table.states import State
from reqtable.table.table import Entry


class InThread(HandedOffRequest):
    """Gives a request to a thread, which runs `serve()`.

    The thread runs a blocking handler as it is, and a resumable one in a loop of its own (`PrivateLoop`).
    """

    def __init__(self, policy: HandoffPolicy, entry: Entry, handler: Resumable | None) -> None:
        super().__init__(policy, entry, handler)
        self.thread: int | None = None  # the identifier of the thread that serves the request
        self.driver: PrivateLoop | None = None
        if not self.ends_itself:  # only the requests of private loops need what follows
            self._lock = threading.Lock()
            self._served = self._given_up = False
            self._forwarded: deque[bytes] = deque()  # later datagrams that the private loop has not taken yet
        self._policy_before = entry.policy

    def give(self) -> None:
        super().give()
        if isinstance(self.transport, PollOnly):
            self.policy.hold(self)
        else:
            self.progress = progress_of(self.entry.handler, Progress, self.entry.began_at)
            self.driver = PrivateLoop(self.entry, self.policy, self.request, self.progress)
            if isinstance(self.transport, Session):
                self.transport.forward = self._forward
        self._policy_before, self.entry.policy = self.entry.policy, self.policy

    def take_back(self) -> None:
        if self.is_given:
            self.entry.policy = self._policy_before
        super().take_back()
        if self.driver is not None:
            self.driver.send_back()
            self.driver = None
            if isinstance(self.transport, Session):
                self.transport.forward = None

    def serve(self) -> None:
        """In the thread: serve the request to its end."""
        self.thread = threading.get_ident()
        if self.driver is None:
            serve_in_thread(self.entry, self.request)
            return
        try:
            self.driver.drive()
        finally:
            with self._lock:
                self._served = True
            if self._given_up:
                self.transport.release()  # `release` left the transport to this thread

    def _words_at(self, notice: int) -> bytes | None:
        assert self.driver is not None
        if notice == 1:
            self.driver.end_early(self.entry.ending)
            return None
        words = self.driver.silence()
        self.speaks = bool(words)
        return words

    def finish(self) -> None:
        if self.speaks:
            self.transport.finish()  # the thread has the handler and the counters, and does not give them back
            return
        if self.driver is not None:
            self.driver.send_back()
            self._readmit()
        super().finish()

    def end_input(self) -> None:
        driver = self.driver
        if driver is not None and is_idle(driver.entry):
            driver.post(end_if_idle, driver.entry)

    def _forward(self, data: bytes) -> None:
        assert self.driver is not None
        self._forwarded.append(data)
        self.driver.post(self._deliver)

    def _deliver(self) -> None:
        """In the thread of the private loop: deliver the later datagrams."""
        assert self.driver is not None
        while self._forwarded and self.driver.entry.state is not State.CLOSED:
            self.driver.transport.deliver(self._forwarded.popleft())

    def _readmit(self) -> None:
        """Begin new requests with the datagrams that the session did not take before it ended."""
        if isinstance(self.transport, Session):
            self.transport.readmit(list(self._forwarded))

    def release(self) -> None:
        if self.driver is None:
            assert isinstance(self.transport, PollOnly)
            if not self.is_let_go:
                self.transport.shut()
                end_forked(self.entry)
            self.transport.release()
            return
        self._readmit()
        self.transport.watch(0)  # only this thread may tell its selector
        with self._lock:
            self._given_up = not self._served
        if not self._given_up:
            self.transport.release()
        elif not self.is_let_go:
            self.driver.break_off()

    def abandon(self) -> None:
        super().abandon()
        if self.driver is not None:
            self.driver.abandon()


class InThreadPolicy(HandoffPolicy):
    """Gives each request to a thread."""

    def handoff(self, entry: Entry, handler: Resumable | None) -> InThread:
        return InThread(self, entry, handler)

    def thread_done(self, handoff: HandedOffRequest) -> None:
        """In the loop: return the request, and let a waiting request have the thread."""
        handoff.returned()
        self.vacate()
