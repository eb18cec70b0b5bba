"""The socket of a blocking handler under policy `greenlet`: a call that would block suspends the request.

The greenlet says which readiness it wants and switches to the loop, which resumes it like any other request. The
descriptor stays blocking, because it may be handed to a subprocess or duplicated. Instead, each call passes
MSG_DONTWAIT.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable
from functools import cache
from io import DEFAULT_BUFFER_SIZE, BufferedReader
from operator import index
from typing import Any, ClassVar, TypeVar

from greenlet import getcurrent

from reqtable.dispatch.green.handler import RequestGreenlet
from reqtable.dispatch.green.reader import Reader
from reqtable.dispatch.green.transport import GreenTransport
from reqtable.dispatch.green.waiting import SocketReady, Watch
from reqtable.table.engine_wants import READABLE, TURN, WRITABLE
from reqtable.table.output import SMALL_BYTES
from reqtable.table.states import READ, WRITE
from reqtable.table.want import Want

T = TypeVar("T")
# Plain numbers: with the socket module's enum members, `&` would be a Python call in every read.
_DONTWAIT, _PEEK, _WAITALL = int(socket.MSG_DONTWAIT), int(socket.MSG_PEEK), int(socket.MSG_WAITALL)
_FREQUENT = ("recv", "recv_into", "send")
_END_OF_FILE = 4096  # how many bytes reading it counts as: some handlers do so for ever


@cache
def cooperative(plain: type[socket.socket]) -> type[CooperativeSocket]:
    """Return the class of cooperative sockets over sockets of class `plain`, which may be simulated ones."""
    calls = {} if plain is socket.socket else {f"_{name}_now": getattr(plain, name) for name in _FREQUENT}
    return type("CooperativeSocket", (CooperativeSocket, plain), {"__slots__": (), "plain": plain, **calls})


class CooperativeSocket(socket.socket):
    """Behaves, for the handler of a request, like a blocking socket with the usual methods and timeouts.

    The timeout is kept here; the plain socket underneath has none. In the greenlet of its own request, a call that
    would block suspends the request. Anywhere else, such as in another thread, it waits by polling the descriptor.
    """

    plain: ClassVar[type[socket.socket]] = socket.socket  # its calls never wait, because they pass MSG_DONTWAIT

    tells_of_close: ClassVar[bool] = True  # closing it stops the polling of its descriptor

    __slots__ = ("_is_drained", "_wait_s", "transport")

    # The most frequent calls of `plain`, which save a look-up here. They never wait. Those of the standard library are
    # taken now: later, `suspend_all_sockets` may have replaced them.
    _recv_now: ClassVar[Any] = socket.socket.recv
    _recv_into_now: ClassVar[Any] = socket.socket.recv_into
    _send_now: ClassVar[Any] = socket.socket.send

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transport: GreenTransport
        self._wait_s: float | None = None
        self._is_drained = False  # the last read did not fill its buffer, so the next one would find nothing

    @classmethod
    def over(cls, plain: socket.socket) -> CooperativeSocket:
        """Make one that takes over the descriptor and the timeout of `plain`."""
        timeout = plain.gettimeout()
        taken = cls(plain.family, plain.type, plain.proto, fileno=plain.detach())
        taken._wait_s = timeout
        if timeout is not None or socket.getdefaulttimeout() is not None:
            cls.plain.settimeout(taken, None)
        return taken

    # -- the timeout --------------------------------------------------------------------------------------------------

    def settimeout(self, value: float | None) -> None:
        if value is not None:
            value = value if isinstance(value, float) else float(index(value))
            if not value >= 0:
                raise ValueError("Timeout value out of range")
            if value > threading.TIMEOUT_MAX:
                raise OverflowError("timeout doesn't fit into C timeval")
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

    def _until_done(self, want: Want[None], flags: int, operation: Callable[..., T], *args: Any) -> T:
        """Call `operation`, and again whenever the socket is ready for `want`, until it would not block."""
        until: float | None = None
        while True:
            try:
                return operation(self, *args)
            except InterruptedError:
                continue
            except BlockingIOError:
                if not self._may_wait(flags):
                    raise
            until = self._wait(want, until)

    def _may_wait(self, flags: int) -> bool:
        return (self._wait_s is None or self._wait_s > 0) and not flags & _DONTWAIT

    def _wait(self, want: Want[None], until: float | None) -> float | None:
        """Suspend until the socket is ready. Returns when the call times out (None: never); raises TimeoutError.

        If the call waits again, it passes that time as `until`: the timeout covers the whole call, even if the socket
        is reported ready and is not.
        """
        transport = self.transport
        timeout_s = self._wait_s
        if until is not None:
            timeout_s = until - transport.steps.table.clock()
            if timeout_s <= 0:
                raise TimeoutError("timed out")
        elif timeout_s is not None:
            until = transport.steps.table.clock() + timeout_s
        if transport.runs_in is not getcurrent():
            self._wait_elsewhere(want, timeout_s)
            return until
        interest = READ if want is READABLE else WRITE
        if transport.watched != interest or transport.fd != self.fileno():
            self._watch(interest)
        transport.entry.timeout = timeout_s
        transport.share = transport.steps.table.limits.recv_bytes
        transport.runs_in.loop.switch(want)  # type: ignore[attr-defined]
        return until

    def _watch(self, interest: int) -> None:
        """Have the loop watch this socket. Closing a duplicate of it may have ended that."""
        transport, fd = self.transport, self.fileno()
        if transport.fd != fd:  # this socket is a duplicate, perhaps of a closed one
            self._check_open()
            transport.watch(0)
            transport.fd = fd
        transport.watch(interest)

    def _wait_elsewhere(self, want: Want[None], timeout_s: float | None) -> None:
        """Wait outside of the greenlet of this socket's request."""
        current = getcurrent()
        if type(current) is not RequestGreenlet or current.loop is None:
            self._poll(want, timeout_s)
            return
        own = current.transport
        assert own is not None
        del current  # a stack that refers to its own greenlet is never freed
        self._wait_for_another(own, READ if want is READABLE else WRITE, timeout_s)

    def _poll(self, want: Want[None], timeout_s: float | None) -> None:
        """Wait by polling the descriptor, without the loop."""
        self._check_open()
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN if want is READABLE else select.POLLOUT)
        if not poll.poll(None if timeout_s is None else timeout_s * 1000):
            raise TimeoutError("timed out")

    def _check_open(self) -> None:
        """Raise OSError if the socket is closed: another thread may have closed it meanwhile."""
        if self.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _wait_for_another(self, own: GreenTransport, interest: int, timeout_s: float | None) -> None:
        """Suspend the request of `own`, whose handler uses this socket of another request, as in a chat."""
        system = own.steps.system
        duplicate = system.socket(self.family, self.type, self.proto, fileno=system.dup(self.fileno()))
        watch = Watch(own, duplicate.fileno(), free=duplicate.close)
        watch.wait(interest, SocketReady(self, interest), timeout_s)

    def _came_in(self, count: int, flags: int) -> None:
        if not flags & _PEEK:
            transport = self.transport
            transport.entry.bytes_in += count
            transport.share -= count or _END_OF_FILE
            if transport.share <= 0:
                self._wait_its_turn()

    def _went_out(self, count: int) -> int:
        transport = self.transport
        transport.entry.bytes_out += count
        transport.share -= count
        if transport.share <= 0:
            self._wait_its_turn()
        return count

    def _wait_its_turn(self) -> None:
        """Suspend a request that has used its share of the pass. If its socket is always ready, nothing else would."""
        transport = self.transport
        full = transport.steps.table.limits.recv_bytes
        count, transport.share = full - transport.share, full
        if transport.runs_in is getcurrent():
            transport.steps.spend(count)
            transport.runs_in.loop.switch(TURN)  # type: ignore[attr-defined]

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        if flags & _WAITALL:
            buffer = bytearray(bufsize)
            return bytes(buffer[: self.recv_into(buffer, bufsize, flags)])
        until = None
        if self._is_drained and ((self._wait_s is None and not flags) or self._may_wait(flags)):
            until = self._wait(READABLE, None)
        while True:
            try:
                data: bytes = self._recv_now(bufsize, flags | _DONTWAIT)
                break
            except InterruptedError:
                continue
            except BlockingIOError:
                if not self._may_wait(flags):
                    raise
            until = self._wait(READABLE, until)
        count = len(data)
        self._is_drained = 0 < count < bufsize
        self._came_in(count, flags)
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        until = None
        if self._is_drained and ((self._wait_s is None and not flags) or self._may_wait(flags)):
            until = self._wait(READABLE, None)
        while True:
            try:
                count: int = self._recv_into_now(buffer, nbytes, flags | _DONTWAIT)
                break
            except InterruptedError:
                continue
            except BlockingIOError:
                if not self._may_wait(flags):
                    raise
            until = self._wait(READABLE, until)
        transport = self.transport
        if not flags and count and count < nbytes and count < transport.share:  # fast path of what follows
            self._is_drained = True
            transport.share -= count
            transport.entry.bytes_in += count
            return count
        room = nbytes or (buffer if type(buffer) is memoryview else memoryview(buffer)).nbytes
        self._is_drained = 0 < count < room
        self._came_in(count, flags)
        # MSG_WAITALL works only on a socket without a timeout. Do its work here, because MSG_DONTWAIT undoes it.
        if flags & _WAITALL and not flags & (_DONTWAIT | _PEEK) and self._wait_s is None:
            return self._fill(memoryview(buffer).cast("B")[:room], count)
        return count

    def _fill(self, view: memoryview, count: int) -> int:
        """Receive until `view` is full or the input ends. Returns how many bytes `view` has; it has `count` already."""
        more = count
        while more and count < len(view):
            more = self._until_done(READABLE, 0, self.plain.recv_into, view[count:], 0, _DONTWAIT)
            self._came_in(more, 0)
            count += more
        return count

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        data, address = self._until_done(READABLE, flags, self.plain.recvfrom, bufsize, flags | _DONTWAIT)
        self._came_in(len(data), flags)
        return data, address

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        into = self.plain.recvfrom_into, buffer, nbytes, flags | _DONTWAIT
        count, address = self._until_done(READABLE, flags, *into)
        self._came_in(count, flags)
        return count, address

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Any:
        receive = self.plain.recvmsg, bufsize, ancbufsize, flags | _DONTWAIT
        data, *others = self._until_done(READABLE, flags, *receive)
        self._came_in(len(data), flags)
        return data, *others

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0) -> Any:
        receive = self.plain.recvmsg_into, buffers, ancbufsize, flags | _DONTWAIT
        count, *others = self._until_done(READABLE, flags, *receive)
        self._came_in(count, flags)
        return count, *others

    def send(self, data: Any, flags: int = 0) -> int:
        if self._sends_all(flags):
            self.sendall(data, flags)
            return memoryview(data).nbytes
        return self._went_out(self._until_done(WRITABLE, flags, self.plain.send, data, flags | _DONTWAIT))

    def _sends_all(self, flags: int) -> bool:
        """Whether `send` takes all that it is given, as on a blocking stream without a timeout (send(2))."""
        return self._wait_s is None and not flags & _DONTWAIT and self.type == socket.SOCK_STREAM

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of `data`. As in the standard library, the timeout covers the whole call."""
        left = data if type(data) is bytes else memoryview(data).cast("B")
        until = self.transport.steps.table.clock() + self._wait_s if self._wait_s else None
        while left:
            share = (
                left if len(left) <= SMALL_BYTES else memoryview(left)[: self.transport.steps.send_share or SMALL_BYTES]
            )
            try:
                sent = self._send_now(share, flags | _DONTWAIT)
            except InterruptedError:
                continue
            except BlockingIOError:
                if not self._may_wait(flags):
                    raise
            else:
                transport = self.transport
                if sent < transport.share:  # fast path of _went_out
                    transport.share -= sent
                    transport.entry.bytes_out += sent
                else:
                    self._went_out(sent)
                if sent == len(left):
                    return
                left = memoryview(left)[sent:]
                if until is not None and self.transport.steps.table.clock() >= until:
                    raise TimeoutError("timed out")
                continue
            self._wait(WRITABLE, until)

    def sendto(self, data: Any, *flags_and_address: Any) -> int:
        *given, address = flags_and_address
        flags = given[0] if given else 0
        return self._went_out(self._until_done(WRITABLE, flags, self.plain.sendto, data, flags | _DONTWAIT, address))

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        send = self.plain.sendmsg, buffers, ancdata, flags | _DONTWAIT, address
        sent = self._went_out(self._until_done(WRITABLE, flags, *send))
        if self._sends_all(flags):
            rest = memoryview(b"".join(bytes(each) for each in buffers))[sent:]
            self.sendall(rest, flags)
            sent += len(rest)
        return sent

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        # not by os.sendfile, around which the standard library polls the descriptor itself
        if self._wait_s == 0:
            raise ValueError("non-blocking sockets are not supported")
        return self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined,no-any-return]

    def makefile(self, mode: str = "r", buffering: int | None = None, **text: Any) -> Any:
        if mode != "rb" or buffering == 0:
            return super().makefile(mode, buffering, **text)  # type: ignore[call-overload]
        self._io_refs += 1  # type: ignore[attr-defined]
        return BufferedReader(Reader(self, "rb"), buffering if buffering and buffering > 0 else DEFAULT_BUFFER_SIZE)

    # -- the descriptor -----------------------------------------------------------------------------------------------

    def dup(self) -> CooperativeSocket:
        copy = type(self)(self.family, self.type, self.proto, fileno=self.transport.steps.system.dup(self.fileno()))
        if socket.getdefaulttimeout() is not None:
            self.plain.settimeout(copy, None)
        copy._wait_s = self._wait_s
        copy.transport = self.transport
        return copy

    def detach(self) -> int:
        is_waited_for = self._forget()
        descriptor = self.plain.detach(self)
        if is_waited_for:
            self._wake_waiting()
        return descriptor

    def _real_close(self, *args: Any) -> None:
        is_waited_for = self._forget()
        self.plain._real_close(self, *args)  # type: ignore[attr-defined]
        if is_waited_for:
            self._wake_waiting()

    def _forget(self) -> bool:
        """Stop polling the descriptor before it is closed: its number may be another request's a moment later.

        True if a handler other than the closing one may be waiting for the descriptor.
        """
        transport = self.transport
        if transport.fd != self.fileno():
            return False
        by_another_thread = transport.steps.in_other_thread  # then the handler may be about to wait
        is_polled = bool(transport.watched)
        if is_polled:
            transport.watch(0)
        return by_another_thread or (is_polled and transport.entry is not transport.steps.table.running)

    def _wake_waiting(self) -> None:
        """Wake the waiting handler, which tries again and finds the socket closed."""
        self.transport.steps.post(self.transport.on_ready, READ | WRITE)
