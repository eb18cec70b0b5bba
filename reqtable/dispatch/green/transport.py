"""The transport of a blocking handler that runs in a greenlet."""

from __future__ import annotations

from typing import Any, Final

from greenlet import getcurrent

from reqtable.loop.step import Steps
from reqtable.net.poll_only import PollOnly
from reqtable.table.engine_wants import READABLE
from reqtable.table.states import READ, WRITE, Event, State

# Names, as in the loop: looking up an Enum member takes 100 ns.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_INPUT_ARRIVED: Final = Event.INPUT_ARRIVED
_OUTPUT_TAKEN: Final = Event.OUTPUT_TAKEN


class GreenTransport(PollOnly):
    """Polls the socket of a handler that runs in a greenlet, and resumes the handler when the socket is ready.

    `runs_in` is the greenlet of the handler; None: the handler has not begun, or is over, or this is a forked child.
    `share` is how many bytes the handler may move until it waits for its turn.
    """

    __slots__ = ("runs_in", "share")

    def __init__(self, steps: Steps, request: Any) -> None:
        super().__init__(steps, request)
        self.runs_in: Any = None
        self.share = steps.table.limits.recv_bytes

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        if entry.state is not _READING:
            self._while_not_reading(mask)
            return
        if not mask & READ:
            return
        # The lean path: if the handler then waits for the same again, nothing is settled.
        steps = self.steps
        table = steps.table
        entry.active_at = table.now
        own = self.runs_in
        table.running = entry
        try:
            loop = getcurrent()
            if own.loop is not loop:
                own.resumed_by(loop)
            want = own.switch(None)
        except BaseException as problem:
            entry.steps += 1
            steps.leave(entry, _INPUT_ARRIVED, None, True, False, steps.fail(entry, problem))
            return
        finally:
            table.running = None
        entry.steps += 1
        if want is READABLE and entry.timeout is None and table.idle_is_unbounded and entry.state is _READING:
            entry.deadline = None
        else:
            steps.leave(entry, _INPUT_ARRIVED, want, True, True)

    def _while_not_reading(self, mask: int) -> None:
        entry = self.entry
        if entry.state is not _WRITING:
            super().on_ready(mask)
        elif mask & WRITE and self.steps.send_share:  # without a share, the socket is reported again in the next pass
            entry.active_at = self.steps.table.now
            entry.result = None
            self.steps.step(entry, _OUTPUT_TAKEN)

    def release(self) -> None:
        self.runs_in = None  # a stack that its transport keeps alive is never freed, because it has the transport
        super().release()

    def abandon(self) -> None:
        self.runs_in = None
        super().abandon()
