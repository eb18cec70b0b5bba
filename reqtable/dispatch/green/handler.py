"""Blocking handlers that suspend: each runs in a greenlet, which keeps the handler's stack while it waits."""

from __future__ import annotations

import os
import threading
from types import FrameType
from typing import Any, ClassVar

from greenlet import GreenletExit, getcurrent, greenlet

from reqtable.dispatch.green.transport import GreenTransport
from reqtable.dispatch.run_blocking import run
from reqtable.net.poll_only import PollOnly
from reqtable.table.engine_wants import TURN
from reqtable.table.errors import TimedOut
from reqtable.table.places import place_in
from reqtable.table.want import Want

_SPARE_MAX = 64
_UNWINDINGS_MAX = 16  # how often a handler may catch the GreenletExit that ends it, and wait again
_SMALL = 1024  # how many bytes a call that moves fewer counts as: some handlers read end of file for ever


class RequestGreenlet(greenlet):
    """Runs the handler of one request, and later those of others.

    `transport` is that of the request; None: the greenlet is spare. `loop` is the greenlet that the loop runs in, to
    which this one suspends; None: this is a forked child, which has no loop and waits by polling. `moved` is how many
    bytes its handler has moved through sockets of its own since it was last suspended.
    """

    __slots__ = ("loop", "moved", "transport")

    transport: GreenTransport | None
    loop: greenlet | None
    moved: int

    def resumed_by(self, loop: greenlet) -> None:
        """Suspend to `loop` from here on. Raises ValueError in any thread but the greenlet's own."""
        self.parent = self.loop = loop


def can_suspend() -> bool:
    """Whether the caller is in a request's greenlet, and not in the loop."""
    return isinstance(getcurrent(), RequestGreenlet)


def suspending() -> GreenTransport | None:
    """Return the transport of the request whose handler calls this, if whatever it waits for suspends the request."""
    current = getcurrent()
    if type(current) is not RequestGreenlet or current.loop is None or current.transport is None:
        return None
    return current.transport if getattr(current.transport.entry.policy, "suspends_all", False) else None


def suspend(want: Want[Any]) -> Any:
    """Suspend the request whose handler calls this, until it has what it wants. Returns the item."""
    current: Any = getcurrent()
    current.moved = 0
    loop = current.loop
    del current  # a stack that refers to its own greenlet is never freed
    return loop.switch(want)


def note_moved(transport: PollOnly, count: int) -> None:
    """Count bytes. A handler whose sockets are always ready waits for its turn after its share of the pass."""
    current: Any = getcurrent()
    current.moved += max(count, _SMALL)
    total = current.moved
    del current
    if total >= transport.steps.table.limits.recv_bytes:
        transport.steps.spend(total)
        suspend(TURN)


# Greenlets that are free for other requests, because making one maps memory, and ending it unmaps the memory. Only the
# main thread's: those of another thread would outlive the thread.
_spare: list[RequestGreenlet] = []


def _in_child() -> None:
    _spare.clear()  # another thread may be the main one in the child
    current = getcurrent()
    if type(current) is RequestGreenlet:
        current.loop = None
        if current.transport is not None:
            current.transport.runs_in = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _serve(_: object) -> Want[Any] | None:
    """Serve one request after another, in a greenlet. Ends when a handler raises, or if no spare greenlet is needed."""
    while True:
        transport: GreenTransport = getcurrent().transport  # type: ignore[attr-defined]
        outcome = run(transport.entry, transport)
        own: Any = getcurrent()  # not before: a stack that refers to its own greenlet is never freed
        own.transport = transport.runs_in = None
        if len(_spare) >= _SPARE_MAX or not _in_main_thread():
            return outcome
        _spare.append(own)
        loop = own.loop
        del own, transport  # a spare greenlet keeps nothing alive
        loop.switch(outcome)


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class GreenHandler:
    """Runs a blocking handler in a greenlet, and resumes it when its wait is over."""

    __slots__ = ("_greenlet", "_transport")

    bound_to_thread: ClassVar[bool] = True

    def __init__(self, transport: GreenTransport) -> None:
        self._transport = transport
        self._greenlet: RequestGreenlet | None = None  # None: the handler has not begun

    def _resume(self, item: Any) -> Want[Any] | None:
        own = self._greenlet
        if own is None:
            own = self._begun()
        loop = getcurrent()
        if own.loop is not loop:
            own.resumed_by(loop)
        return own.switch(item)  # type: ignore[no-any-return]

    def _where(self) -> tuple[str | None, str | None]:
        """Return None, because a blocking handler has no states, and `file:line` of the line at which it waits."""
        return None, place_in(self._frame())

    def _frame(self) -> FrameType | None:
        """Return the suspended frame of the handler, if it has begun."""
        own = self._greenlet
        return None if own is None or own.transport is not self._transport else own.gr_frame

    def _begun(self) -> RequestGreenlet:
        """Return a greenlet for the handler, a spare one if possible."""
        if _spare and _in_main_thread():
            own = _spare.pop()
            own.gr_context = None
        else:
            own = RequestGreenlet(_serve)
            own.loop = getcurrent()
        own.transport = self._transport
        own.moved = 0
        self._greenlet = self._transport.runs_in = own
        return own

    def _throw(self, error: BaseException) -> Want[Any] | None:
        own = self._greenlet
        if own is None:
            raise error
        own.resumed_by(getcurrent())
        # as the socket module words it
        return own.throw(TimeoutError("timed out") if isinstance(error, TimedOut) else error)  # type: ignore[no-any-return]

    def _close(self) -> None:
        """Unwind the handler's stack, so that its `finally` blocks run. If these wait, their waits fail at once."""
        own = self._greenlet
        for _ in range(_UNWINDINGS_MAX):
            if own is None or own.dead or own.transport is not self._transport:
                return
            try:
                own.resumed_by(getcurrent())
            except ValueError:
                return  # the greenlet is bound to another thread, and can only be dropped
            own.throw(GreenletExit)
