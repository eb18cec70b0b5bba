"""Handing a whole request off to a thread or to a child process.

A `HandedOffRequest` stands in the row in place of the handler. Once the request is given, it stands in for the
transport as well. It goes through three stages:

* *Waiting* (want `VACANCY`): the policy already has as many requests as it may.
* *Given* (want `ELSEWHERE`): a thread or a child has the request. The loop neither reads nor writes its socket.
* *Returned*: the thread or the child is done. The loop ends the connection, so no thread has to linger.

If the request can't be given, `undo` puts the handler and the transport back, and the handler gets the error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import Any, ClassVar, Final

from reqtable.dispatch.policy import Host, Policy
from reqtable.dispatch.progress import AnyProgress
from reqtable.net.poll_only import PollOnly
from reqtable.table.engine_wants import ELSEWHERE, VACANCY
from reqtable.table.parts import NoTransport, Resumable
from reqtable.table.states import RESET, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.table.wants import Failure

_NOTICE_S = 0.1  # how long a thread or a child has to end a request whose connection was reset
_SOON_S = 0.05  # a request that goes on for this long is watched for a reset: most requests end sooner

# Global names, as in step.py, because looking a member up in its Enum is slow.
_OPENED: Final = Event.OPENED
_RESULT_POSTED: Final = Event.RESULT_POSTED
_RUNNING: Final = State.RUNNING
_DELEGATED: Final = State.DELEGATED


class HandedOffRequest(NoTransport):
    """Stands in the row of a request that a thread or a child has, or will have.

    If the request can't be given, `handler` goes on with it. None: a blocking handler, which has not begun.
    """

    bound_to_thread: ClassVar[bool] = False

    def __init__(self, policy: HandoffPolicy, entry: Entry, handler: Resumable | None) -> None:
        self.policy = policy
        self.entry = entry
        self.handler = handler
        self.transport: Any = entry.transport
        self.request = entry.transport.request
        # The thread or the child ends the request by the server's hooks: its handler is a blocking one.
        self.ends_itself = isinstance(entry.transport, PollOnly)
        self.number = 0  # of the wait that the result is for: `Entry.expect_result` returned it
        self.is_given = False
        self.is_let_go = False  # the server closes, but the thread or the child goes on
        self.progress: AnyProgress | None = None  # None: the request has no last words
        self.speaks = False  # the loop answers the client, because the thread or the child does not
        self._notices = 0  # how often the request was told to end early

    def try_give(self, number: int) -> Want[Any]:
        """Give the request, or wait for a vacancy. Returns the want. On an error the handler has the request again."""
        self.entry.resumable = self
        self.number = number
        try:
            return self.policy.take(self)
        except BaseException:
            if not self.is_given:  # else a thread or a child has it already
                self.undo()
            raise

    def give(self) -> None:
        """Stand in for the transport too: from here on only the thread or the child reads the socket."""
        self.is_given = True
        if not self.ends_itself:  # `PollOnly.give` holds a descriptor of its own
            self.transport.watch(RESET)
        self.entry.transport = self

    def take_back(self) -> None:
        """Put the transport back: no thread or child could be had."""
        if self.is_given:
            self.is_given = False
            self.entry.transport = self.transport
            if isinstance(self.transport, PollOnly):
                self.transport.take_back()

    def undo(self) -> None:
        """Put the transport and the handler back."""
        self.take_back()
        if self.handler is not None:
            self.entry.resumable = self.handler

    def returned(self) -> None:
        """In the loop: tell the entry that the thread or the child is done with the request."""
        entry = self.entry
        if self.ends_itself and entry.state is _DELEGATED and entry.call_number == self.number:
            # fast path of Steps.deliver and Steps.step: the last step of a blocking handler does nothing
            steps = self.transport.steps
            entry.active_at = steps.table.now
            entry.steps += 1
            try:
                steps.finish(entry, _RESULT_POSTED)
            except BaseException as problem:
                steps.failures.outside_step(entry, problem)
            return
        assert entry.table.owner is not None
        entry.table.owner.deliver(entry, self.number, None)

    # -- in place of the handler --------------------------------------------------------------------------------------

    def _resume(self, item: Any) -> Want[Any] | None:
        if self.is_given:
            return None
        number = self.entry.expect_result()
        try:
            return self.try_give(number)
        except Exception as problem:
            if self.handler is None:
                raise
            # The handler gets the error in a step of its own: the loop may hold an item here, for the next step.
            assert self.entry.table.owner is not None
            self.entry.table.owner.post_result(self.entry, number, Failure(problem))
            return VACANCY

    def _throw(self, error: BaseException) -> Want[Any] | None:
        if self.is_given or self.handler is None:
            raise error
        self.undo()
        return self.handler._throw(error)

    def _last_words(self) -> bytes | None:
        if not self.is_given:
            return b"" if self.handler is None else self.handler._last_words()  # type: ignore[attr-defined]
        if self.progress is None:
            return b""
        self._notices += 1
        return self._words_at(self._notices)

    @abstractmethod
    def _words_at(self, notice: int) -> bytes | None:
        """Have the request end soon, at the first notice by itself. Returns as `EarlyEndings._last_words` does."""

    def _close(self) -> None:
        if not self.is_given:
            self.transport = self.request = None  # this may stand in the policy's queue for long
            if self.handler is not None:
                self.handler._close()

    # -- in place of the transport ------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        if self.progress is not None:
            self.entry.began_at = self.progress.began_at

    def watch(self, interest: int) -> None:
        if self.speaks:
            self.transport.watch(interest)

    def flush(self) -> bool:
        return self.transport.flush() if self.speaks else True

    def finish(self) -> None:
        self.entry.transport = self.transport
        self.transport.finish()

    def release(self) -> None:
        """Release the transport. If the request was not returned yet, subclasses also stop the thread or the child."""
        self.transport.release()

    def shut(self) -> None:
        self.transport.shut()

    def on_reset(self) -> None:
        """End the request soon. A thread or a child that uses the connection meets the error at once, and ends first.

        A child can then clean up before it is killed, and a private loop returns its counters.
        """
        self.transport.steps.mailbox.call_later(self._end_lost, _NOTICE_S)

    def _end_lost(self) -> None:
        if self.entry.transport is self:  # else it has been returned
            self.transport.steps.end(self.entry, Event.LOST)

    def end_input(self) -> None:
        """Do nothing: the loop can't tell whether code that reads by itself is waiting for input or busy."""

    def abandon(self) -> None:
        self.transport.abandon()


class HandoffPolicy(Policy):
    """Takes over whole requests, at most `most` at a time. The others wait in the table."""

    steps_on_loop = False

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._waiting: deque[HandedOffRequest] = deque()
        # The ids of the requests that were given since the last look for resets, and before.
        self._young: list[int] = []
        self._older: list[int] = []

    @property
    @abstractmethod
    def most(self) -> int | None:
        """How many requests the policy may have at a time; None: any number."""

    @property
    @abstractmethod
    def busy(self) -> int:
        """How many requests the policy has now."""

    @abstractmethod
    def handoff(self, entry: Entry, handler: Resumable | None) -> HandedOffRequest:
        """Make what stands in the row of a request that is handed off to this policy."""

    @abstractmethod
    def start(self, handoff: HandedOffRequest) -> None:
        """Give the request to a thread or a child. Raises OSError or RuntimeError if the machine has none left."""

    def blocking(self, entry: Entry, transport: PollOnly) -> Resumable:
        return self.handoff(entry, None)

    def take_on(self, entry: Entry) -> Want[Any]:
        return self.handoff(entry, entry.resumable).try_give(entry.call_number)

    def begin(self, entry: Entry) -> None:
        """Run the first step of a request, which gives the request to a thread or a child.

        fast path of Steps.begin and Steps.step: the first step of a blocking handler does nothing else.
        """
        handoff = entry.resumable
        if not isinstance(handoff, HandedOffRequest) or not handoff.ends_itself:
            super().begin(entry)
            return
        steps, table = self.host.steps, entry.table
        entry.advance(_OPENED)
        table.running = entry
        try:
            want = handoff.try_give(entry.expect_result())
        except BaseException as problem:
            steps.step(entry, _OPENED, problem)
        else:
            table.running = None
            entry.steps += 1
            entry.want = want
            if entry.state is _RUNNING:
                steps.move(entry, _OPENED, want.awaits)
                if table.limits.request_timeout_s is not None:
                    steps.timeouts.arm(entry)
        if table.thread is None:
            steps.reap()  # see Steps.begin

    def take(self, handoff: HandedOffRequest) -> Want[Any]:
        """Give the request, or have it wait for a vacancy. Returns the want. Raises if waiting would not help."""
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
        """Let the waiting requests try again, because there may be a vacancy."""
        for _ in range(len(self._waiting)):  # each once: a request that gets no thread waits again
            if self.most is not None and self.busy >= self.most:
                break
            handoff = self._waiting.popleft()
            owner = handoff.entry.table.owner
            assert owner is not None
            if owner.in_other_thread:
                owner.post_result(handoff.entry, handoff.number, None)
            else:
                owner.deliver(handoff.entry, handoff.number, None)

    def hold(self, handoff: HandedOffRequest) -> None:
        """Give the transport of a blocking handler's request. It is watched for a reset if the request lasts.

        If no loop will see the end of the request, the transport keeps no descriptor: see `PollOnly.give`.
        """
        steps = self.host.steps
        holds = steps.running and not steps.failures.hooks_raise
        handoff.transport.give(holds)
        if holds:
            if not self._young and not self._older:
                steps.mailbox.call_later(self._look_for_resets, _SOON_S)
            self._young.append(handoff.entry.id)

    def _look_for_resets(self) -> None:
        """Watch the connections of the requests that were given before the last look."""
        for number in self._older:
            entry = self.host.steps.table.get(number)
            handoff = None if entry is None else entry.transport
            if isinstance(handoff, HandedOffRequest) and handoff.ends_itself:
                handoff.transport.tell_of_reset()
        self._older, self._young = self._young, []
        if self._older:
            self.host.steps.mailbox.call_later(self._look_for_resets, _SOON_S)

    def in_pass(self, entry: Entry) -> bool:
        """Whether the engine hands `entry` off during a pass, so that work can be left for the end of the pass."""
        return entry.table.owner is self.host.steps and self.host.steps.in_loop_thread

    def abandon(self) -> None:
        for queue in (self._waiting, self._young, self._older):
            queue.clear()
