"""Transports that do no I/O of their own.

`Lent` is for handlers that read and write their socket themselves: the engine only polls it for them, or, where the
handler never waits in the loop, does not touch it at all. `RELEASED` and `OVER` stand in for the transport and the
handler of an entry that has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from reqtable.table.compiled import mypyc_attr
from reqtable.table.errors import PeerError
from reqtable.table.states import READ, WRITE, Event, State
from reqtable.table.table import Entry

if TYPE_CHECKING:
    from reqtable.loop.loop import Loop

# As in the loop: names, because looking a member up takes 100 ns.
_READING: Final = State.READING
_WRITING: Final = State.WRITING
_LINGERING: Final = State.LINGERING
_INPUT_ARRIVED: Final = Event.INPUT_ARRIVED
_OUTPUT_TAKEN: Final = Event.OUTPUT_TAKEN
_PEEK_NOW: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
# What a call on a socket fails with though the peer and the network have done nothing: the descriptor is closed or no
# socket, an argument is wrong, or the kernel is out of memory.
_NOT_PEERS = {
    errno.EBADF,
    errno.ENOTSOCK,
    errno.EFAULT,
    errno.EINVAL,
    errno.EMSGSIZE,
    errno.EDESTADDRREQ,
    errno.EOPNOTSUPP,
    errno.ENOMEM,
    errno.ENOBUFS,
}
_SOMETHING = b"?"  # stands in for input that is the handler's to read


@mypyc_attr(allow_interpreted_subclasses=True)
class Watched:
    """It has a descriptor, `fd`, that the selector watches for whatever was last asked of `poll`, and nothing else."""

    __slots__ = ("engine", "watched")

    def __init__(self, engine: Loop) -> None:
        self.engine = engine
        self.watched = 0

    @property
    def fd(self) -> int:
        raise NotImplementedError

    def poll(self, interest: int) -> None:
        if interest == self.watched or self.engine.is_copy:
            return
        selector = self.engine.selector
        try:
            if not interest:
                selector.unregister(self.fd)
            elif not self.watched:
                selector.register(self.fd, interest, self)
            else:
                selector.modify(self.fd, interest, self)
        except KeyError:
            # An exception from a signal handler (Ctrl-C) may have come between the selector and the next line.
            if interest:
                with contextlib.suppress(KeyError):
                    selector.unregister(self.fd)
                selector.register(self.fd, interest, self)
        self.watched = interest


@mypyc_attr(allow_interpreted_subclasses=True)
class Polled(Watched):
    """The descriptor itself."""

    __slots__ = ("fd",)

    fd: int

    def __init__(self, engine: Loop, fd: int) -> None:
        super().__init__(engine)
        self.fd = fd


class Lent(Polled):
    """The socket of a handler that does its own I/O; `request` is what the server's hooks are called with."""

    __slots__ = ("_ended", "_hold", "entry", "request")

    timeout_s: float | None = None

    def __init__(self, engine: Loop, request: Any) -> None:
        super().__init__(engine, request.fileno() if isinstance(request, socket.socket) else -1)
        self.request = request
        self.entry: Entry
        self._ended = False  # the server's hooks have ended the request
        self._hold: socket.socket | None = None  # our own hold on the connection

    def on_ready(self, mask: int) -> None:
        entry = self.entry
        state = entry.state
        engine = self.engine
        if state is _READING:
            if mask & READ:
                entry.active_at = engine.table.now
                entry.input.data = _SOMETHING
                engine.step(entry, _INPUT_ARRIVED)
        elif state is _WRITING:
            if mask & WRITE and engine.send_share:  # else it comes up again in the next pass
                entry.active_at = engine.table.now
                entry.posted = None
                engine.step(entry, _OUTPUT_TAKEN)
        elif state is _LINGERING:
            self._discard()

    def flush(self) -> bool:
        return True

    def hand_over(self, hold: bool = True) -> None:
        """A thread or a child has the request from here on, and ends it with the server's hooks.

        Our hold on the connection is what a cancellation shuts, and what lingers. Without `hold` there is none: the
        kernel sends no end of file while a duplicate is open, and only the loop would close it.
        """
        self.poll(0)
        self._ended = True
        self._hold = self._duplicate() if hold else None

    def take_back(self) -> None:
        """It could not be handed over after all."""
        self._ended = False
        self._let_go()

    def finish(self) -> None:
        """The handler has returned: the hooks `shutdown_request` and `close_request` end its request.

        Closing a connection with unread input resets it (tcp(7)), and the reset may overtake the answer. So where
        there is some, a duplicate of the descriptor outlives the hooks, and lingers.
        """
        self.poll(0)
        if not self._ended:
            self._ended = True
            if has_unread(self.request, self.engine.system.socket):
                self._hold = self._duplicate()
            try:
                end_request(self.entry.server.shutdown_request, self.request)
            except BaseException:
                self.engine.end(self.entry, Event.RELEASED)
                raise
        elif not has_unread(self._hold, self.engine.system.socket):
            self._let_go()
        if self._hold is None:
            self.engine.end(self.entry, Event.RELEASED)
        else:
            self.fd = self._hold.fileno()
            self.engine.linger(self.entry)

    def shut(self) -> None:
        """End the connection for whoever has the request now: what they wait for comes to an end."""
        connection = self._hold if self._hold is not None else self.request
        if isinstance(connection, socket.socket):
            with contextlib.suppress(OSError):  # it has ended already
                self.engine.system.socket.shutdown(connection, socket.SHUT_RDWR)

    def end_input(self) -> None:
        """Have the handler meet the end of its input: shut the reading side, and it reads what there is, then that."""
        if isinstance(self.request, socket.socket) and not has_unread(self.request, self.engine.system.socket):
            with contextlib.suppress(OSError):  # it has ended already
                self.request.shutdown(socket.SHUT_RD)

    def release(self) -> None:
        self.poll(0)
        self._let_go()
        if not self._ended:
            self._ended = True
            end_request(self.entry.server.shutdown_request, self.request)
        self.request = None  # a cooperative socket knows its transport: a cycle would keep open what no hook closes

    def abandon(self) -> None:
        self.watched = 0
        abandon(self.request)
        abandon(self._hold)

    def _duplicate(self) -> socket.socket | None:
        """Another hold on the connection; None where there is none to be had."""
        own, system = self.request, self.engine.system
        if not isinstance(own, socket.socket) or own.fileno() < 0:
            return None
        try:
            return system.socket(fileno=system.dup(own.fileno()))
        except OSError:
            return None  # out of descriptors

    def _let_go(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    def _discard(self) -> None:
        assert self._hold is not None
        if discarded_all(self._hold, self.engine.limits.recv_bytes):
            self.engine.end(self.entry, Event.INPUT_ENDED)


def has_unread(request: Any, plain: type[socket.socket]) -> bool:
    """Whether a stream connection has input that nobody has read.

    `plain` is the class whose calls are made: a cooperative socket's would wait.
    """
    if not isinstance(request, socket.socket) or request.fileno() < 0:
        return False
    try:
        # As a number: for `request.type` a member of an Enum is looked up.
        if socket.SocketType.type.__get__(request) == socket.SOCK_STREAM:
            if plain.gettimeout(request):
                plain.settimeout(request, 0)  # with a timeout MSG_DONTWAIT waits; the descriptor is non-blocking then
            return bool(plain.recv(request, 1, _PEEK_NOW))
    except OSError:
        pass  # nothing is there, or nobody is
    return False


def discarded_all(connection: socket.socket, count: int) -> bool:
    """Throw away up to `count` bytes of input; True at its end."""
    try:
        return not connection.recv(count, socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


def end_request(hook: Callable[[Any], Any], request: Any) -> None:
    """Have a hook of the server close a request. Where the hook raises, its socket is closed all the same."""
    try:
        hook(request)
    except BaseException:
        if isinstance(request, socket.socket):
            request.close()
        raise


def is_peers_error(error: OSError) -> bool:
    """Whether a call on a connected socket failed by the peer's doing, or the network's."""
    return error.errno not in _NOT_PEERS


def abandon(request: Any) -> None:
    """In a forked child: close its copy of a socket, for good, and without a word to the peer or the selector."""
    if isinstance(request, socket.socket):
        close_copy(socket.socket.detach(request))  # `close` would wait for the files made of it


def close_copy(fd: int) -> None:
    """In a forked child: close its copy of a descriptor, if it has one: another thread may just have closed it."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.close(fd)


def is_tls(request: socket.socket) -> bool:
    """Whether it is a TLS socket. There may be no ssl here."""
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(request, ssl.SSLSocket)


def is_peers_doing(error: BaseException | None) -> bool:
    """Whether the other end has brought it about: worth a line, and no traceback.

    A group is the other end's doing if all of its exceptions are.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(is_peers_doing(each) for each in error.exceptions)
    if isinstance(error, PeerError | ConnectionError | TimeoutError):
        return not isinstance(error, ConnectionRefusedError)  # it is that of a connection which the handler made
    ssl = sys.modules.get("ssl")
    return ssl is not None and isinstance(error, ssl.SSLError)


class _Released:
    """Of an entry that has ended."""

    request: Any = None
    timeout_s: float | None = None

    def poll(self, interest: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def finish(self) -> None:
        pass

    def release(self) -> None:
        pass

    def shut(self) -> None:
        pass

    def end_input(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _Over:
    """Stands in for the handler of an entry whose handler's part is over."""

    bound_to_thread: ClassVar[bool] = False

    def _resume(self, item: Any) -> None:
        return None

    def _throw(self, error: BaseException) -> None:
        return None

    def _close(self) -> None:
        pass


RELEASED = _Released()
OVER = _Over()
