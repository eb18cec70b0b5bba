"""Testing one handler, with the test as every peer: no sockets, no threads, no waiting.

The real loop and the real transports serve the handler, on a clock that only the test moves. So wants, limits and
timeouts work as in a server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar, Self

from reqtable.dispatch import check_servable, is_resumable
from reqtable.loop.loop import Loop
from reqtable.loop.platform import System
from reqtable.loop.step import Steps
from reqtable.net.outgoing import OutgoingDatagrams
from reqtable.net.stream import Stream
from reqtable.table.connection import ConnectionRow
from reqtable.table.limits import Limits
from reqtable.table.places import place_of
from reqtable.table.states import READ, RESET, WRITE, Ending, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Want
from reqtable.table.wants import Failure
from reqtable.testing.client import Client
from reqtable.testing.clock import FakeClock
from reqtable.testing.sides import Other, Others, Side
from reqtable.testing.wire import NoWakeup, WireSelector, no_sendfile

# pytest shows the test's line and the handler's, and hides the frames of this module between them.
__tracebackhide__ = True

PEER = ("192.0.2.1", 50_000)  # an address reserved for documentation (RFC 5737)
_PASSES_MAX = 10_000


def exercise(
    handler_class: Callable[..., Any],
    dialogue: Client | None = None,
    *,
    datagrams: bool = False,
    peer: Any = PEER,
    limits: Limits | None = None,
    server: Any = None,
) -> Exercise:
    """Begin a request of a state or async handler, and return an `Exercise` that acts as its peer.

    A `dialogue` is played at once, as by `Exercise.play`. With `datagrams`, each `send` sends one datagram and each
    `expect` takes one. `peer` is the address of the client, from RFC 5737 by default. `limits` are the limits of the
    engine; None: the defaults. The handler's `self.server` has the attributes of `server`.

    Raises TypeError for a blocking handler, which needs a socket, and ConfigurationError for a class that no server
    would accept.
    """
    if not is_resumable(handler_class):
        raise TypeError(
            f"exercise() takes a StateRequestHandler or an AsyncRequestHandler, not {handler_class!r}: a blocking "
            "handler needs a socket, such as one end of socket.socketpair()"
        )
    check_servable(handler_class)
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, such as Limits(inbox_max=10), not {limits!r}")
    begun = Exercise(handler_class, datagrams, peer, limits, server)
    return begun if dialogue is None else begun.play(dialogue)


class Exercise(Side):
    """Runs one request and acts as its client. `accept` and `refuse` answer its connects. Calls can be chained.

    A call raises the error that it causes in the handler, unless the handler catches the error. A call raises
    AssertionError if an expectation is not met, or if the request can't take the action.
    """

    def __init__(self, handler_class: Any, datagrams: bool, peer: Any, limits: Limits | None, server: Any) -> None:
        self.clock = FakeClock()
        self._selector = selector = WireSelector()
        self._steps = Steps(
            limits, System(clock=self.clock, selector=lambda: selector, wakeup=NoWakeup, sendfile=no_sendfile)
        )
        self._loop = Loop(self._steps)
        self._loop.open()
        self._others = Others(self._steps)
        self._errors: list[BaseException] = []
        self._wire = selector.new_wire(datagrams)
        self._transport: Any = (_ClientDatagrams if datagrams else _Client)(self._steps, self._wire)
        self.entry = entry = Entry(
            self._steps.table, _Server(self, handler_class, server), _InPlace(self._steps), peer, PEER, self._transport
        )
        self._transport.attach(entry)
        self._begun = False
        self.handler = entry.handler = entry.resumable = handler_class(entry)
        if not datagrams:
            self._begin()

    # -- actions ------------------------------------------------------------------------------------------------------

    def jump(self, seconds: float) -> Self:
        """Let `seconds` pass. Timeouts and sleeps that are due by then happen in their order."""
        until = self.clock.now + seconds
        while (at := self._steps.deadlines.soonest) <= until:
            self.clock.jump(max(0.0, at - self.clock.now))
            self._go_on()
        self.clock.jump(until - self.clock.now)
        return self._go_on()

    def tell(self, item: Any) -> Self:
        """Tell the request `item`, as another request would. The request must take it."""
        if not self.handler.tell(item):
            raise AssertionError(f"{item!r} was told, and not taken; the request {self._said()}")
        return self._go_on()

    def accept(self, address: str) -> Other:
        """Accept the oldest open connect to `address`. Returns the other end of the connection."""
        row = self._asked(address)
        other = Other(self, row, self._selector.new_wire(row.target.scheme == "udp"))
        self._others.accept(row, other._wire)
        return other._go_on()

    def refuse(self, address: str, reason: str = "connection refused") -> Self:
        """Refuse the oldest open connect to `address`: the handler gets ConnectFailed with this `reason`."""
        self._others.fail(self._asked(address), reason)
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

    # -- findings -----------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the request has ended."""
        return self.entry.state is State.CLOSED

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._begun = True
        if self._wire.unread:
            self._transport.deliver()
        self._steps.table.add(self.entry)
        self._steps.begin(self.entry)
        self._go_on()

    def _go_on(self) -> Self:
        if not self._begun and self._wire.unread:
            self._begin()  # with the first datagram
        for _ in range(_PASSES_MAX):
            self._loop.run_once(0)
            if self._errors:
                raise self._errors.pop()
            if self._selector.is_quiet and self._loop.next_at() > self.clock.now:
                return self
        raise AssertionError(f"the request goes on and on: it {self._said()}")

    def _asked(self, address: str) -> ConnectionRow:
        row = self._others.asked(address)
        if row is None:
            raise AssertionError(f"the handler has not asked for {address}; the request {self._said()}")
        return row

    def _said_of_end(self) -> str:
        if not self.is_over:
            return "has ended"
        handler, ending = self.handler, self.entry.ending or Ending.DONE
        state, place = handler._where()
        if state is None:
            state, place = "handle", place_of(type(handler).handle)
        name = f"{type(handler).__name__}.{state}"
        if ending is Ending.DONE and not getattr(handler, "_ended", False):
            return f"has ended: {name} returned None ({place})"
        return f"has ended ({ending.value}) in {name} ({place})"

    def _said(self) -> str:
        if self.is_over:
            return self._said_of_end()
        return f"is {self.entry.state.name} and waits for {self.entry.want!r}"


class _Client(Stream):
    """Transports the stream of the request's client. The test sees the end at once, so nothing lingers."""

    __slots__ = ()

    def attach(self, entry: Entry) -> None:
        """Become the transport of `entry`."""
        self.entry = entry

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)


class _ClientDatagrams(OutgoingDatagrams):
    """Transports the datagrams of the request's client, each as soon as the handler reads."""

    __slots__ = ()

    entry: Any  # not a connection's row

    def attach(self, row: Any) -> None:
        super().attach(row)
        row.input.has_peer = bool(row.peer)

    def on_ready(self, mask: int) -> None:
        entry, steps = self.entry, self.steps
        if mask & RESET:
            steps.end(entry, Event.LOST)
        elif mask & WRITE and entry.output.first is not None and self.flush():
            (steps if entry.state is State.WRITING else steps.waiting).output_taken(entry)
        elif mask & READ and entry.state in (State.READING, State.WAITING):
            self.deliver()
            (steps.step if entry.state is State.READING else steps.waiting.wake)(entry, Event.INPUT_ARRIVED)

    def deliver(self) -> None:
        """Put the next datagram into the inbox of the request."""
        entry, data = self.entry, self.request.recv(0)
        entry.bytes_in += len(data)
        entry.active_at = self.steps.table.now
        entry.input.deliver(data, self.steps.table.limits.inbox_max)

    def finish(self) -> None:
        self.steps.end(self.entry, Event.RELEASED)


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

    def close_request(self, request: Any) -> None:
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        self._exercise._errors.append(error)


class _InPlace:
    """Runs each call at once, as the dispatch policy; a hand-off changes nothing."""

    name: ClassVar[str] = "exercise"
    steps_on_loop: ClassVar[bool] = True
    takes_whole_requests: ClassVar[bool] = False
    forks: ClassVar[bool] = False

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
