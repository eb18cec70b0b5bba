"""The waits of a blocking handler on more than its request's own socket: descriptors, a time, a name look-up.

A wait suspends the request, whose row is then WAITING, SLEEPING or OFFLOADED. The loop watches a duplicate of the
descriptor: the selector may know the descriptor itself already, for another request, and nobody tells the selector when
the handler closes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar
from weakref import ReferenceType, ref

from reqtable.dispatch.green.handler import suspend
from reqtable.loop.poller import Descriptor, close_copy
from reqtable.loop.step import Steps
from reqtable.net.poll_only import PollOnly
from reqtable.table.addresses import address_text
from reqtable.table.engine_wants import Sleeping
from reqtable.table.places import caller
from reqtable.table.states import READ, WRITE, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import Call, Posted

_INTERESTS = {READ: "readable", WRITE: "writable"}


class SocketReady(Posted[None]):
    """Waits until a socket that is not the request's own is ready. Does not keep the socket alive."""

    __slots__ = ("_fd", "_socket", "_what")

    awaits: ClassVar[Event] = Event.AWAITS_ANY

    def __init__(self, sock: Any, interest: int) -> None:
        self._socket: ReferenceType[Any] = ref(sock)
        self._fd = sock.fileno()
        self._what = _INTERESTS[interest]

    def __repr__(self) -> str:
        peer = f"fd {self._fd}"
        sock = self._socket()
        if sock is not None:
            with suppress(OSError):  # it has no peer: it listens, is not connected yet, or is closed
                name = sock.getpeername()
                peer = address_text(name) if name else peer
        return f"socket {self._what} ({peer})"


class DescriptorsReady(Posted[None]):
    """Waits until one of several descriptors is ready, for `select` and the like. `what` is what a listing shows."""

    __slots__ = ("_what",)

    awaits: ClassVar[Event] = Event.AWAITS_ANY

    def __init__(self, what: str) -> None:
        self._what = what

    def __repr__(self) -> str:
        return self._what


class LookUp(Call[Any]):
    """Waits for a name look-up, which runs in a thread."""

    __slots__ = ()

    take = Posted.take  # without the note that `call` adds to an error: the handler has not called `call`

    def __repr__(self) -> str:
        return f"{self.fn.__name__}({self.args[0]!r})"


class Watch(Descriptor):
    """Watches one descriptor for the request of `waiting`, and owns the descriptor, which `free` closes.

    If it becomes ready, or somebody closes one of `numbers`, the request is resumed. `numbers` are the descriptors that
    the handler means; the watched one is another.
    """

    __slots__ = ("free", "numbers", "steps", "waiting", "want")

    # By number: who waits for that descriptor. Several threads with a loop of their own may use it.
    by_number: ClassVar[dict[int, set[Watch]]] = {}

    def __init__(
        self, transport: PollOnly, fd: int, numbers: tuple[int, ...] = (), free: Callable[[], Any] | None = None
    ) -> None:
        super().__init__(transport.steps.poller, fd)
        self.free = free or partial(os.close, fd)
        self.steps: Steps = transport.steps
        self.waiting: Entry = transport.entry
        self.numbers = numbers
        self.want: Posted[None] | None = None
        for number in numbers:
            self.by_number.setdefault(number, set()).add(self)

    def on_ready(self, mask: int) -> None:
        self.watch(0)
        self.resume()

    def resume(self) -> None:
        """Resume the request, which then sees for itself, if it still waits."""
        entry = self.waiting
        if self.fd >= 0 and entry.want is self.want:
            entry.result = None
            entry.active_at = self.steps.table.now
            self.steps.waiting.wake(entry, Event.RESULT_POSTED)  # in any other state it takes the result in its turn

    def close(self) -> None:
        """Watch no more, and close the descriptor. May be called again."""
        if self.fd < 0:
            return
        self.watch(0)
        self.fd = -1
        for number in self.numbers:
            others = self.by_number.get(number)
            if others is not None:
                others.discard(self)
                if not others:
                    self.by_number.pop(number, None)
        self.free()

    def wait(self, interest: int, want: Posted[None], timeout_s: float | None) -> None:
        """Suspend the request until the descriptor is ready. Raises TimeoutError. Closes the descriptor."""
        entry, steps = self.waiting, self.steps
        if entry.state is State.CLOSED:  # the handler is being unwound, and waits nevertheless: nothing resumes it
            self.close()
            suspend(want)
            return
        steps.give_ups[entry] = self.close  # called if the request ends, even if its stack can't be unwound
        try:
            self.want = want
            entry.expect_result()
            self.watch(interest)
            entry.timeout = None if timeout_s is None else _from_pass(steps, timeout_s)
            suspend(want)
        finally:
            steps.give_ups.pop(entry, None)
            self.close()


def wait_for_socket(transport: PollOnly, sock: Any, interest: int, timeout_s: float | None) -> None:
    """Suspend until a socket is ready, or closed. Raises TimeoutError after `timeout_s` seconds; None: never."""
    fd = sock.fileno()
    watch = Watch(transport, os.dup(fd), (fd,))
    watch.wait(interest, SocketReady(sock, interest), timeout_s)


def wake_waiting(fd: int) -> None:
    """Wake whoever waits for a descriptor that is being closed. Callable from any thread."""
    for watch in tuple(Watch.by_number.get(fd, ())):
        watch.steps.post(watch.resume)


def sleep(transport: PollOnly, seconds: float) -> None:
    """Suspend for `seconds`, which is above 0."""
    transport.entry.timeout = None
    suspend(Sleeping(seconds, transport.steps.table.clock() + seconds))


def in_thread(transport: PollOnly, function: Callable[..., Any], *args: Any) -> Any:
    """Suspend while a thread runs a name look-up. Returns its result, or raises its error."""
    transport.entry.timeout = None
    return suspend(LookUp(function, args, {}, "thread", caller()))


class Patience:
    """Says how much of a call's timeout is left. None: the call waits for ever."""

    __slots__ = ("_clock", "_until")

    def __init__(self, transport: PollOnly, timeout_s: float | None) -> None:
        self._clock = transport.steps.table.clock
        self._until = None if timeout_s is None else self._clock() + timeout_s

    def left(self) -> float | None:
        """Return the seconds that are left. Raises TimeoutError if there are none."""
        if self._until is None:
            return None
        left = self._until - self._clock()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


def _from_pass(steps: Steps, seconds: float) -> float:
    """Return `seconds` from now as seconds from the time of the pass, from which the loop counts timeouts."""
    return seconds + steps.table.clock() - steps.table.now


def _in_child() -> None:
    """Close a forked child's copies of the watched descriptors: the parent's requests wait for them."""
    for watch in {watch for watches in Watch.by_number.values() for watch in watches}:
        close_copy(watch.fd)
        watch.fd = -1
    Watch.by_number.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
