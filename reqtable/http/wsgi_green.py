"""A call of a WSGI application in a greenlet of its request, which is suspended while the application waits.

The policy `greenlet` with the option `suspend_all_sockets` knows the greenlet by its class: sockets, `select`,
`time.sleep` and name look-ups that the application uses give the loop the want to wait for.
"""

from __future__ import annotations

import os
import threading
from typing import Any, ClassVar

from greenlet import GreenletExit, getcurrent

from reqtable.dispatch.green.handler import RequestGreenlet
from reqtable.http.wsgi_call import ApplicationCall
from reqtable.table.errors import TimedOut
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING

_SPARE_MAX = 64
_STOPPED = object()  # what a greenlet gives the loop when the application has stopped
_UNWINDINGS_MAX = 16  # how often an application may catch the GreenletExit that ends it, and wait again


# Greenlets that are free for other requests, because making one maps memory. Only the main thread's: those of another
# thread would outlive the thread.
_spare: list[RequestGreenlet] = []


def _serve(work: Any) -> Any:
    """Run one piece of work after another, in a greenlet. Ends if no spare greenlet is needed, or by an exception."""
    while True:
        work()
        own: Any = getcurrent()
        own.transport = None
        if len(_spare) >= _SPARE_MAX or not _in_main_thread():
            return _STOPPED
        _spare.append(own)
        loop = own.loop
        del own, work  # a spare greenlet keeps nothing alive
        work = loop.switch(_STOPPED)


def _in_child() -> None:
    _spare.clear()  # another thread may be the main one in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class GreenCall:
    """Takes the steps of a handler while the application is suspended in its greenlet.

    If the application waits, `begin` puts the methods of this object before those of the handler. They are taken away
    when the application has sent something or has returned.
    """

    bound_to_thread: ClassVar[bool] = True

    def __init__(self, handler: Any, call: ApplicationCall) -> None:
        self._handler = handler
        self._call = call
        self._transport: Any = None  # that of the request, also once the request has ended
        self._until: float | None = None  # when the application must have sent something
        self._first: tuple[Any, float | None] | None = None  # what the application waits for at first, and how long
        if _spare and _in_main_thread():
            self._greenlet = _spare.pop()
            self._greenlet.gr_context = None
        else:
            self._greenlet = RequestGreenlet(_serve)

    def begin(self) -> Any:
        """Have the application begin or go on, until it waits or has sent something. Returns the handler's transition.

        An application that never waits costs two switches of stacks, and no step of the handler more.
        """
        handler, own = self._handler, self._greenlet
        entry = handler.entry
        if handler.timeout_s is not None:
            self._until = entry.table.now + handler.timeout_s
        own.transport = self._transport = entry.transport
        own.moved = 0
        own.resumed_by(getcurrent())
        want = own.switch(self._run)
        if want is _STOPPED or own.dead:
            return handler._go_on(self._call)
        self._first = want, entry.timeout  # the transition sets the timeout of the state
        handler.__dict__ |= {"_resume": self._resume, "_throw": self._throw, "_close": self._close}
        return handler.application, NOTHING

    def _run(self) -> None:
        self._call.advance(self._handler.entry.table.limits.high_water_bytes, True)

    def _resume(self, item: Any) -> Want[Any] | None:
        if self._first is not None:
            want, self._handler.entry.timeout = self._first
            self._first = None
            return self._went_on(want)
        self._greenlet.resumed_by(getcurrent())
        return self._went_on(self._greenlet.switch(item))

    def _throw(self, error: BaseException) -> Want[Any] | None:
        self._first = None
        is_timeout = isinstance(error, TimedOut)
        if is_timeout and self._until is not None and self._until <= self._handler.entry.table.now:
            self._unwind()
            self._leave()
            return self._handler._throw(error)  # type: ignore[no-any-return]
        self._greenlet.resumed_by(getcurrent())
        # as the socket module words it
        return self._went_on(self._greenlet.throw(TimeoutError("timed out") if is_timeout else error))

    def _went_on(self, want: Any) -> Want[Any] | None:
        """Return the want that the application waits for, or the handler's if the application has stopped."""
        handler = self._handler
        if want is not _STOPPED and not self._greenlet.dead:
            if self._until is not None:
                entry = handler.entry
                left = max(0.0, self._until - entry.table.now)
                entry.timeout = left if entry.timeout is None else min(left, entry.timeout)
            return want  # type: ignore[no-any-return]
        self._leave()
        return handler._resume(None)  # type: ignore[no-any-return]

    def _leave(self) -> None:
        for name in ("_resume", "_throw", "_close"):
            self._handler.__dict__.pop(name, None)
        del self._greenlet  # it refers to this object

    def _close(self) -> None:
        self._call.client.is_gone = True
        self._unwind()
        self._leave()
        self._handler._close()

    def _unwind(self) -> None:
        """Unwind the application's stack, so that its `finally` blocks run. If these wait, their waits fail at once."""
        for _ in range(_UNWINDINGS_MAX):
            if self._greenlet.dead or self._greenlet.transport is not self._transport:
                return
            try:
                self._greenlet.resumed_by(getcurrent())
            except ValueError:
                return  # the greenlet is bound to another thread, and can only be dropped
            self._greenlet.throw(GreenletExit)
