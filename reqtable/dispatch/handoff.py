"""Handing a whole request off: to a thread, or to a child process.

A `Handoff` is one such request, from the moment when somebody else is to have it until they are done with it. It stands
in the row in place of the handler, and, once the request is given, in place of the transport as well:

* It *waits* (want `VACANCY`) while the policy has as many requests as it may.
* It is *given* (want `ELSEWHERE`): a thread or a child has the request. The loop neither reads nor writes its socket.
* It is *returned*: the thread or the child is done. The loop ends the connection, so nobody's thread has to linger.

Where giving it away fails, `undo` puts the handler and the transport back, and the handler is told of the error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import Any, ClassVar

from reqtable.dispatch.policy import Host, Policy
from reqtable.net.poll_only import PollOnly
from reqtable.table.engine_wants import ELSEWHERE, VACANCY
from reqtable.table.parts import Resumable
from reqtable.table.table import Entry
from reqtable.table.wants import Want


class Handoff:
    """A request that a thread or a child has, or is to have.

    `handler` goes on with the request should that fail; None: a blocking handler, which has not begun.
    """

    bound_to_thread: ClassVar[bool] = False
    timeout_s: float | None = None

    def __init__(self, policy: HandoffPolicy, entry: Entry, handler: Resumable | None) -> None:
        self.policy = policy
        self.entry = entry
        self.handler = handler
        self.transport: Any = entry.transport
        self.request = entry.transport.request
        self.number = 0  # of the call that the end of it is posted with
        self.is_given = False
        self.is_let_go = False  # the server closes without waiting: the thread or the child goes on

    @property
    def ends_itself(self) -> bool:
        """A blocking handler's request is ended by the server's hooks, over there."""
        return isinstance(self.transport, PollOnly)

    def begin(self, number: int) -> Want[Any]:
        """Give the request away, or wait until that can be. Raises what hinders it: then the handler has it again."""
        self.entry.resumable = self
        self.number = number
        try:
            return self.policy.take(self)
        except BaseException:
            self.undo()
            raise

    def give(self) -> None:
        """Stand in for the transport, too: from here on what can be read is somebody else's to read."""
        self.is_given = True
        self.transport.watch(0)
        self.entry.transport = self

    def take_back(self) -> None:
        """Nobody could be found for it: the loop has the transport again."""
        if self.is_given:
            self.is_given = False
            self.entry.transport = self.transport
            if isinstance(self.transport, PollOnly):
                self.transport.take_back()

    def undo(self) -> None:
        """It is not to be given away after all: the handler and the transport are as they were."""
        self.take_back()
        if self.handler is not None:
            self.entry.resumable = self.handler

    def returned(self) -> None:
        """In the loop: the thread or the child is done with the request."""
        assert self.entry.table.owner is not None
        self.entry.table.owner.deliver(self.entry, self.number, None)

    # -- in place of the handler --------------------------------------------------------------------------------------

    def _resume(self, item: Any) -> Want[Any] | None:
        if self.is_given:
            return None
        try:
            return self.begin(self.entry.begin_call())
        except Exception as problem:
            if self.handler is None:
                raise
            return self.handler._throw(problem)

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if self.is_given or self.handler is None:
            raise error
        self.undo()
        return self.handler._throw(error)

    def _close(self) -> None:
        if not self.is_given and self.handler is not None:
            self.handler._close()

    # -- in place of the transport ------------------------------------------------------------------------------------

    def watch(self, interest: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        self.entry.transport = self.transport
        self.transport.finish()

    def release(self) -> None:
        """The request has ended before it was returned: so does what the thread or the child does for it."""
        self.transport.release()

    def shut(self) -> None:
        self.transport.shut()

    def end_input(self) -> None:
        """Nobody can tell whether code that reads by itself waits for more, or is at work and will."""

    def leave(self) -> None:
        pass

    def abandon(self) -> None:
        self.transport.abandon()


class HandoffPolicy(Policy):
    """A policy that takes requests over, each whole, as many at a time as `most` says; the others wait in the table."""

    steps_on_loop = False

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._waiting: deque[Handoff] = deque()

    @property
    @abstractmethod
    def most(self) -> int | None:
        """How many requests at a time; None: no bound."""

    @property
    @abstractmethod
    def busy(self) -> int:
        """How many requests it has now."""

    @abstractmethod
    def handoff(self, entry: Entry, handler: Resumable | None) -> Handoff:
        """What stands in the row of a request that this policy is to have."""

    @abstractmethod
    def start(self, handoff: Handoff) -> None:
        """Give the request to a thread or a child. Raises OSError or RuntimeError where the machine has none left."""

    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        return self.handoff(entry, None)

    def take_over(self, entry: Entry) -> Want[Any]:
        return self.handoff(entry, entry.resumable).begin(entry.calls)

    def take(self, handoff: Handoff) -> Want[Any]:
        """Start, or wait for a vacancy. Returns what the request waits for; raises what hinders both."""
        most = self.most
        if most is None or self.busy < most:
            try:
                self.start(handoff)
                return ELSEWHERE
            except (BlockingIOError, RuntimeError):  # fork(2): EAGAIN; "can't start new thread"
                if not self.busy:
                    raise
        self._waiting.append(handoff)
        return VACANCY

    def vacate(self) -> None:
        """There may be a vacancy: let those go on that wait for one."""
        for _ in range(len(self._waiting)):  # once each: one for which there is no thread waits again
            if self.most is not None and self.busy >= self.most:
                break
            handoff = self._waiting.popleft()
            owner = handoff.entry.table.owner
            assert owner is not None
            if owner.in_other_thread:
                owner.post_result(handoff.entry, handoff.number, None)
            else:
                owner.deliver(handoff.entry, handoff.number, None)

    @property
    def loop_goes_on(self) -> bool:
        """Whether the loop will see the end of a request that has just been given away."""
        return self.host.steps.running and not self.host.steps.failures.hooks_raise

    def in_pass(self, entry: Entry) -> bool:
        """Whether the engine takes `entry` over in a pass, so that there is an end of it to leave something for."""
        return entry.table.owner is self.host.steps and self.host.steps.in_loop_thread

    def abandon(self) -> None:
        self._waiting.clear()
