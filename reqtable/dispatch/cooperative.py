"""Blocking handlers that suspend: a greenlet for each, and a socket that switches where it would block.

Underneath, the socket is non-blocking. Where a call on it would block, the greenlet says which readiness it wants and
switches to the loop, which resumes it as it resumes everything else.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from reqtable.core.errors import TimedOut
from reqtable.core.table import Entry
from reqtable.core.wants import READABLE, WRITABLE, Want
from reqtable.engine.transports import Lent

T = TypeVar("T")
_UNWINDINGS_MAX = 16  # how often a handler that is being ended may catch that and wait again


class _RequestGreenlet(greenlet):
    """The greenlet of one request."""

    lent: Lent


class Suspendable:
    """A blocking handler whose stack is kept by a greenlet while it waits."""

    __slots__ = ("_greenlet",)

    bound_to_thread: ClassVar[bool] = True

    def __init__(self, entry: Entry, lent: Lent) -> None:
        self._greenlet = _RequestGreenlet(lambda _: entry.server.finish_request(lent.request, entry.peer))
        self._greenlet.lent = lent

    def _resume(self, item: Any) -> Want[Any] | None:
        # The loop is where it suspends to, whichever greenlet the loop runs in by now.
        self._greenlet.parent = getcurrent()
        want = self._greenlet.switch(item)
        return None if self._greenlet.dead else want

    def _throw(self, error: BaseException) -> Want[Any] | None:
        self._greenlet.parent = getcurrent()
        # as the socket module words it
        want = self._greenlet.throw(TimeoutError("timed out") if isinstance(error, TimedOut) else error)
        return None if self._greenlet.dead else want

    def _close(self) -> None:
        """Unwind the handler's stack, so that its `finally`s run; what they still wait for fails at once."""
        for _ in range(_UNWINDINGS_MAX):
            if self._greenlet.dead or not self._greenlet:
                return
            self._greenlet.parent = getcurrent()
            self._greenlet.throw(GreenletExit)


class CooperativeSocket(socket.socket):
    """A request's socket, to its handler a blocking one with the usual timeouts.

    The descriptor is always non-blocking; the timeout is kept here. In its own request's greenlet a call that would
    block suspends the request; anywhere else, such as in another thread, it waits by polling the descriptor.
    """

    lent: Lent
    _wait_s: float | None = None

    @classmethod
    def over(cls, plain: socket.socket) -> CooperativeSocket:
        """Take over the descriptor and the timeout of `plain`."""
        timeout = plain.gettimeout()
        taken = cls(plain.family, plain.type, plain.proto, fileno=plain.detach())
        taken._wait_s = timeout
        socket.socket.setblocking(taken, False)
        return taken

    # -- the timeout --------------------------------------------------------------------------------------------------

    def settimeout(self, value: float | None) -> None:
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._wait_s = value

    def gettimeout(self) -> float | None:
        return self._wait_s

    def setblocking(self, flag: bool) -> None:
        self._wait_s = None if flag else 0.0

    def getblocking(self) -> bool:
        return self._wait_s != 0

    @property
    def timeout(self) -> float | None:
        return self._wait_s

    # -- what may block -----------------------------------------------------------------------------------------------

    def _reading(self, operation: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        while True:
            try:
                return operation(self, *args, **kwargs)
            except BlockingIOError:
                self._wait(READABLE, select.POLLIN)

    def _writing(self, operation: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        while True:
            try:
                return operation(self, *args, **kwargs)
            except BlockingIOError:
                self._wait(WRITABLE, select.POLLOUT)

    def _wait(self, want: Want[None], events: int) -> None:
        """Suspend until the socket is ready. Raises TimeoutError after the timeout, at once for one of 0 as it came."""
        if self._wait_s == 0:
            raise  # the BlockingIOError that is being handled: that is what a non-blocking socket does
        current = getcurrent()
        if isinstance(current, _RequestGreenlet) and current.lent is self.lent:
            self.lent.entry.timeout = self._wait_s
            assert current.parent is not None
            current.parent.switch(want)
            return
        poll = select.poll()
        poll.register(self.fileno(), events)
        if not poll.poll(None if self._wait_s is None else self._wait_s * 1000):
            raise TimeoutError("timed out")

    def recv(self, *args: Any) -> bytes:
        data = self._reading(socket.socket.recv, *args)
        self.lent.entry.bytes_in += len(data)
        return data

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        count = self._reading(socket.socket.recv_into, *args, **kwargs)
        self.lent.entry.bytes_in += count
        return count

    def recvfrom(self, *args: Any) -> tuple[bytes, Any]:
        return self._reading(socket.socket.recvfrom, *args)

    def recvfrom_into(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        return self._reading(socket.socket.recvfrom_into, *args, **kwargs)

    def recvmsg(self, *args: Any) -> Any:
        return self._reading(socket.socket.recvmsg, *args)

    def recvmsg_into(self, *args: Any) -> Any:
        return self._reading(socket.socket.recvmsg_into, *args)

    def send(self, *args: Any) -> int:
        count = self._writing(socket.socket.send, *args)
        self.lent.entry.bytes_out += count
        return count

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self.send(view, flags) :]

    def sendto(self, *args: Any) -> int:
        return self._writing(socket.socket.sendto, *args)

    def sendmsg(self, *args: Any) -> int:
        return self._writing(socket.socket.sendmsg, *args)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        # not os.sendfile: the standard library's use of it polls the descriptor by itself
        return self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined,no-any-return]

    # -- the descriptor -----------------------------------------------------------------------------------------------

    def dup(self) -> CooperativeSocket:
        # the base class's dup makes the file description, which both share, blocking
        copy = type(self)(self.family, self.type, self.proto, fileno=os.dup(self.fileno()))
        copy._wait_s = self._wait_s
        copy.lent = self.lent
        return copy

    def detach(self) -> int:
        self._forget()
        if self.fileno() >= 0 and self._wait_s is None:
            socket.socket.setblocking(self, True)  # whoever takes it over expects what it was
        return super().detach()

    def _real_close(self, *args: Any) -> None:
        self._forget()
        super()._real_close(*args)  # type: ignore[misc]

    def _forget(self) -> None:
        """Stop polling a descriptor before it goes: its number may be another request's a moment later."""
        if self.lent.fd == self.fileno():
            self.lent.poll(0)
