"""What policies share that take whole requests over: waiting for a vacancy, and what stands in the table meanwhile."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from typing import Any, ClassVar

from reqtable.dispatch.forking.run_blocking import end_forked, serve_in_thread
from reqtable.dispatch.policy import Policy
from reqtable.dispatch.private_loop import Driver
from reqtable.net.datagram import Session
from reqtable.net.transports import Lent
from reqtable.server.drain import end_if_idle, is_idle
from reqtable.table.states import State
from reqtable.table.table import Entry, Resumable
from reqtable.table.wants import ELSEWHERE, VACANCY, Want, hand_off


class HandingOff:
    """Stands in for the handler of a request that is to be taken over as soon as there is a vacancy.

    `handler` is what goes on with it should that fail; None for a blocking handler, which has not begun.
    """

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, entry: Entry, handler: Resumable | None, policy: Delegating) -> None:
        self._entry = entry
        self._handler = handler
        self._policy = policy

    def _resume(self, item: Any) -> Want[Any]:
        if self._handler is None:
            self._entry.begin_call()
            return self._policy.take_over(self._entry)
        self._entry.resumable = self._handler
        return hand_off(self._policy.name)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if self._handler is None:
            raise error
        self._entry.resumable = self._handler
        return self._handler._throw(error)

    def _close(self) -> None:
        if self._handler is not None:
            self._handler._close()


class Delegation:
    """Stands in the table for a request that was taken over: for its handler, which is over there, and its transport.

    `number` is what the end of it is posted with.
    """

    bound_to_thread: ClassVar[bool] = False
    timeout_s: float | None = None

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.ends_itself = isinstance(entry.transport, Lent)  # by the server's hooks, over there
        self.number = entry.calls
        self.transport = entry.transport
        self.request = entry.transport.request
        self.is_let_go = False  # the server closes without waiting: who has the request goes on
        self._before = entry.resumable
        entry.resumable = entry.transport = self
        self.transport.poll(0)  # from here on what can be read is somebody else's to read

    def hand_over(self) -> None:
        """There is someone who has it now."""
        if isinstance(self.transport, Lent):
            self.transport.hand_over(hold=self.entry.server._loop_goes_on)

    def undo(self) -> None:
        """It could not be taken over after all."""
        self.entry.resumable = self._before
        self.entry.transport = self.transport
        if isinstance(self.transport, Lent):
            self.transport.take_back()

    def end(self) -> None:
        """In the loop: whoever had the request is done with it."""
        assert self.entry.table.owner is not None
        self.entry.table.owner.deliver(self.entry, self.number, None)

    # -- as the handler -----------------------------------------------------------------------------------------------

    def _resume(self, item: Any) -> Want[Any] | None:
        return None

    def _throw(self, error: BaseException) -> Want[Any] | None:
        raise error

    def _close(self) -> None:
        pass

    # -- as the transport ---------------------------------------------------------------------------------------------

    def poll(self, interest: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        self.entry.transport = self.transport
        self.transport.finish()

    def release(self) -> None:
        """The request has ended before it was done: so does whoever has it."""
        self.transport.release()

    def shut(self) -> None:
        self.transport.shut()

    def end_input(self) -> None:
        """Nobody can tell whether code that reads by itself waits for more, or is at work and will."""

    def abandon(self) -> None:
        self.transport.abandon()


class InThread(Delegation):
    """A request that a thread has: `serve()` is what the thread runs."""

    def __init__(self, entry: Entry, policy: Delegating) -> None:
        super().__init__(entry)
        self.hand_over()
        self._lock = threading.Lock()
        self._served = self._given_up = False
        self._forwarded: deque[bytes] = deque()  # later datagrams, which the driver has still to take
        self.thread: int | None = None  # the number of the thread that serves it
        self.driver: Driver | None = None
        if not isinstance(self.transport, Lent):
            self.driver = Driver(entry, policy, policy.dispatcher, self.request)
            if isinstance(self.transport, Session):
                self.transport.forward = self._forward
        entry.policy = policy

    def undo(self) -> None:
        super().undo()
        if self.driver is not None:
            self.driver.send_back()

    def serve(self) -> None:
        """In the thread: serve the request to its end."""
        self.thread = threading.get_ident()
        try:
            if self.driver is not None:
                self.driver.drive()
            else:
                serve_in_thread(self.entry, self.request)
        finally:
            with self._lock:
                self._served = True
            if self._given_up and self.driver is not None:
                self.transport.release()  # it was left open for us to the last

    def finish(self) -> None:
        if self.driver is not None:
            self.driver.send_back()
        self._readmit()
        super().finish()

    def end_input(self) -> None:
        driver = self.driver
        if driver is not None and is_idle(driver, driver.entry):
            driver.post(end_if_idle, driver, driver.entry)

    def _forward(self, data: bytes) -> None:
        assert self.driver is not None
        self._forwarded.append(data)
        self.driver.post(self._deliver)

    def _deliver(self) -> None:
        """In the driver's thread."""
        assert self.driver is not None
        while self._forwarded and self.driver.entry.state is not State.CLOSED:
            self.driver.transport.deliver(self._forwarded.popleft())

    def _readmit(self) -> None:
        """What came after the session's end, before the end was known here, begins requests of its own."""
        if isinstance(self.transport, Session):
            self.transport.readmit(list(self._forwarded))

    def release(self) -> None:
        self._readmit()
        if self.driver is None:
            assert isinstance(self.transport, Lent)
            if not self.is_let_go:
                self.transport.shut()
                end_forked(self.entry)
            self.transport.release()
            return
        with self._lock:
            self._given_up = not self._served
        if not self._given_up:
            self.transport.release()
        elif not self.is_let_go:
            self.driver.cancel_request()


class Delegating(Policy):
    """A policy that takes requests over, each whole, as many at a time as `most` says; the others wait in the table."""

    steps_on_loop = False

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        self._waiting: deque[tuple[Entry, int]] = deque()

    @property
    @abstractmethod
    def most(self) -> int | None:
        """How many requests at a time; None: no bound."""

    @property
    @abstractmethod
    def busy(self) -> int:
        """How many requests it has now."""

    @abstractmethod
    def start(self, entry: Entry) -> None:
        """Take `entry` over. Raises OSError or RuntimeError where the machine has no thread or process left."""

    def in_pass(self, entry: Entry) -> bool:
        """Whether the engine takes `entry` over in a pass, so that there is an end of it to leave something for."""
        engine = self.engine
        return entry.table.owner is engine and engine.in_loop_thread

    def blocking(self, entry: Entry, lent: Lent) -> Resumable:
        return HandingOff(entry, None, self)

    def take_over(self, entry: Entry) -> Want[Any]:
        most = self.most
        if most is not None and self.busy >= most:
            return self._wait(entry)
        try:
            self.start(entry)
        except (BlockingIOError, RuntimeError):  # fork(2): EAGAIN; "can't start new thread"
            if not self.busy:
                raise
            return self._wait(entry)
        return ELSEWHERE

    def taken_back(self, delegation: Delegation) -> None:
        """In the loop: whoever had a request is done with it, and free."""
        delegation.end()
        self.vacate()

    def vacate(self) -> None:
        """There may be a vacancy: let those go on that wait for one."""
        for _ in range(len(self._waiting)):  # once each: one for which there is no thread waits again
            if self.most is not None and self.busy >= self.most:
                break
            entry, number = self._waiting.popleft()
            owner = entry.table.owner
            assert owner is not None
            if owner.in_other_thread:
                owner.post_result(entry, number, None)
            else:
                owner.deliver(entry, number, None)

    def abandon(self) -> None:
        self._waiting.clear()

    def _wait(self, entry: Entry) -> Want[Any]:
        before = entry.resumable
        handler = None if isinstance(entry.transport, Lent) else before
        entry.resumable = HandingOff(entry, handler, self)
        self._waiting.append((entry, entry.calls))
        return VACANCY
