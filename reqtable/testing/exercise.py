"""Testing one handler, with the test as its peer: no sockets, no threads, no waiting.

The real loop steps the handler, on a clock that only the test moves. So wants, limits and timeouts work as in a server.
"""

from __future__ import annotations

import selectors
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from reqtable.dispatch import check_servable, is_resumable
from reqtable.loop.loop import Loop
from reqtable.loop.platform import System
from reqtable.loop.step import Steps
from reqtable.loop.wakeup import Wakeup
from reqtable.table.input import Inbox
from reqtable.table.limits import Limits
from reqtable.table.output import FileSlice
from reqtable.table.parts import NoTransport
from reqtable.table.states import READ, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import Failure, Want
from reqtable.testing.client import Client, as_bytes
from reqtable.testing.clock import FakeClock

PEER = ("192.0.2.1", 50_000)  # an address reserved for documentation (RFC 5737)
_PASSES_MAX = 10_000


def exercise(
    handler_class: Any,
    dialogue: Client | None = None,
    *,
    datagrams: bool = False,
    peer: Any = PEER,
    limits: Limits | None = None,
    server: Any = None,
) -> Exercise:
    """Begin a request of a state or async handler, and return an `Exercise` that acts as its peer.

    A `dialogue` is played at once, as by `Exercise.play`. With `datagrams`, each `send` sends one datagram and each
    `expect` takes one. `server` becomes the handler's `self.server`. Raises TypeError for a blocking handler, which
    needs a socket, and ConfigurationError for a class that no server would accept.
    """
    if not is_resumable(handler_class):
        raise TypeError(
            f"exercise() takes a StateRequestHandler or an AsyncRequestHandler, not {handler_class!r}: a blocking "
            "handler needs a socket, such as one end of socket.socketpair()"
        )
    check_servable(handler_class)
    begun = Exercise(handler_class, datagrams, peer, limits, server)
    return begun if dialogue is None else begun.play(dialogue)


class Exercise:
    """Runs one request and acts as its peer. Calls can be chained.

    A call raises the error that it causes in the handler, unless the handler catches it.
    """

    def __init__(self, handler_class: Any, datagrams: bool, peer: Any, limits: Limits | None, server: Any) -> None:
        self.clock = FakeClock()
        self._steps = Steps(limits, System(clock=self.clock, selector=_NoSelector, wakeup=_NoWakeup))
        self._loop = Loop(self._steps)
        self._loop.open()
        self._errors: list[BaseException] = []
        self._wire = _Wire(self._steps, datagrams)
        self._begun = False
        self._unread: list[bytes] = []  # data that was sent and that the loop has not read
        self._end_sent = False
        self.entry = entry = Entry(
            self._steps.table, _Server(self, handler_class, server), _InPlace(self._steps), peer, PEER, self._wire
        )
        self._wire.entry = entry
        if datagrams:
            entry.input = Inbox()
            entry.input.has_peer = bool(peer)
        self.handler = entry.handler = entry.resumable = handler_class(entry)
        if not datagrams:
            self._begin()

    # -- the peer's actions -------------------------------------------------------------------------------------------

    def send(self, data: bytes) -> Self:
        """Send `data`. It arrives in one piece as soon as the handler reads."""
        data = as_bytes("send", data)
        if self._end_sent or self.is_over:
            raise AssertionError(f"{data!r} can't be sent: the {'peer' if self._end_sent else 'handler'} has ended")
        self._unread.append(data)
        if not self._begun:
            assert isinstance(self.entry.input, Inbox)
            self.entry.input.deliver(self._unread.pop(), self._steps.table.limits.inbox_max)
            self._begin()
        return self._go_on()

    def end(self) -> Self:
        """Half-close: the handler sees the end of file, and its answer still arrives."""
        self._end_sent = True
        return self._go_on()

    def reset(self) -> Self:
        """Reset the connection."""
        self._steps.end(self.entry, Event.LOST)
        return self._go_on()

    def jump(self, seconds: float) -> Self:
        """Let `seconds` pass. Timeouts and sleeps that are due by then happen in their order."""
        until = self.clock.now + seconds
        while (at := self._steps.deadlines.next_at()) <= until:
            self.clock.jump(max(0.0, at - self.clock.now))
            self._go_on()
        self.clock.jump(until - self.clock.now)
        return self._go_on()

    def read_nothing(self) -> Self:
        """Stop reading: from here on, output stays in the handler's buffer until `read_on()`."""
        self._wire.is_blocked = True
        return self

    def read_on(self) -> Self:
        """Resume reading."""
        self._wire.is_blocked = False
        return self._go_on()

    def play(self, script: Client) -> Self:
        """Play a client's script; a `pause` becomes a `jump`.

        As in a simulation, output beyond an expectation is left for the next expectation. Raises TypeError for `then()`
        and `may_fail()`, which need a network.
        """
        for name, args in script.steps:
            if name in ("expect", "expect_end", "take_rest"):
                self.read_on()
            if name == "pause":
                self.jump(*args)
            elif name == "read_nothing":
                self.read_nothing()
            elif name == "expect" and not self._wire.datagrams:
                (data,) = args
                found = self.output
                self._wire.received[:] = [found[len(data) :]]
                if not found.startswith(data):
                    raise AssertionError(f"expected {data!r}, found {found!r}; the request {self._said()}")
            elif name == "take_rest":
                self._wire.received.clear()
                self.expect_end()
            elif name in ("then", "may_fail"):
                raise TypeError(f"exercise() can't play {name}(), which needs a network: use simulate()")
            else:
                getattr(self, name)(*args)
        return self

    # -- the peer's findings ------------------------------------------------------------------------------------------

    @property
    def output(self) -> bytes:
        """Output that has arrived and was not yet expected; with datagrams, all of them joined."""
        return b"".join(self._wire.received)

    @property
    def is_over(self) -> bool:
        """Whether the connection or the request has ended."""
        return self._wire.ended or self.entry.state is State.CLOSED

    def expect(self, data: bytes) -> Self:
        """Take the output so far (with datagrams, the next one), which must be exactly `data`."""
        data = as_bytes("expect", data)
        received = self._wire.received
        if self._wire.datagrams:
            found = received.pop(0) if received else None
        else:
            found = self.output
            received.clear()
        if found != data:
            raise AssertionError(f"expected {data!r}, found {found!r}; the request {self._said()}")
        return self

    def expect_end(self) -> Self:
        """Check that the connection has ended, and that no output is left."""
        if self.output or not self.is_over:
            raise AssertionError(f"expected the end, found {self.output!r}; the request {self._said()}")
        return self

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._begun = True
        self._steps.table.add(self.entry)
        self._steps.begin(self.entry)
        self._go_on()

    def _go_on(self) -> Self:
        """Run the loop until the request waits for its peer or for time to pass."""
        entry = self.entry
        for _ in range(_PASSES_MAX):
            before = entry.state, entry.steps, entry.bytes_in, entry.bytes_out
            self._deliver()
            self._loop.run_once(0)
            if self._errors:
                raise self._errors.pop()
            if before == (entry.state, entry.steps, entry.bytes_in, entry.bytes_out) and entry.state is not State.READY:
                return self
        raise AssertionError(f"the request goes on and on: it {self._said()}")

    def _deliver(self) -> None:
        """Do the kernel's part: deliver the peer's input to the request, and take the request's output."""
        entry = self.entry
        if entry.state is State.READING and self._unread:
            data = self._unread.pop(0)
            entry.bytes_in += len(data)
            entry.active_at = self.clock.now
            if isinstance(entry.input, Inbox):
                entry.input.deliver(data, self._steps.table.limits.inbox_max)
            else:
                entry.input.feed(data)
            self._steps.step(entry, Event.INPUT_ARRIVED)
        elif entry.state is State.READING and self._end_sent and not entry.input.ended:
            entry.input.ended = True
            self._steps.step(entry, Event.INPUT_ENDED)
        elif entry.state is State.WRITING and not self._wire.is_blocked and self._wire.flush():
            self._steps.output_taken(entry)

    def _said(self) -> str:
        if self.is_over:
            return "has ended"
        return f"is {self.entry.state.name} and waits for {self.entry.want!r}"


class _Wire(NoTransport):
    """Passes output straight to the test, as the request's transport."""

    def __init__(self, steps: Steps, datagrams: bool) -> None:
        self.datagrams = datagrams
        self.received: list[bytes] = []
        self.is_blocked = False
        self.ended = False
        self.entry: Entry
        self._steps = steps

    def flush(self) -> bool:
        entry = self.entry
        while entry.output.first is not None and not self.is_blocked:
            piece = entry.output.first
            data = bytes(piece.read() if isinstance(piece, FileSlice) else piece)
            self.received.append(data)
            entry.bytes_out += len(data)
            entry.output.consume(len(data))
        return entry.output.first is None

    def finish(self) -> None:
        self.ended = True
        self._steps.end(self.entry, Event.RELEASED)

    def release(self) -> None:
        self.ended = True


class _Server:
    """Stands in for the handler's `self.server`, with the table and the attributes of the test's own server."""

    server_address = PEER

    def __init__(self, exercise: Exercise, handler_class: Any, own: Any) -> None:
        self.RequestHandlerClass = handler_class
        self._exercise = exercise
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    @property
    def table(self) -> Any:
        return self._exercise._loop.table

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        self._exercise._errors.append(error)


class _InPlace:
    """Runs each call at once, as the dispatch policy; a hand-off changes nothing."""

    name: ClassVar[str] = "exercise"

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def begin_call(self, entry: Entry, want: Any) -> Callable[[], Any]:
        try:
            result = want.fn(*want.args, **want.kwargs)
        except Exception as error:
            result = Failure(error)
        self._steps.post_result(entry, entry.call_number, result)
        return bool

    def hand_off(self, entry: Entry, want: Want[Any]) -> Want[Any]:
        self._steps.post_result(entry, entry.call_number, None)
        return want

    def admitted(self) -> None:
        pass

    def released(self) -> None:
        pass

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        raise NotImplementedError


class _NoSelector(selectors.BaseSelector):
    """Watches nothing and never waits."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, READ, None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class _NoWakeup(Wakeup):
    """Does nothing: no other thread wakes this loop."""

    def __init__(self) -> None:
        pass

    def fileno(self) -> int:
        return -1

    def wake(self) -> None:
        pass

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        pass
