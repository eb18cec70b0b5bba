"""A request has this beside its client: outgoing connections, the items told to it, and what it has begun to wait for.

Most requests talk to their client alone, and have no `Reach`: `entry.reach` is None then.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Any, Protocol

from reqtable.table.errors import HandlerError
from reqtable.table.input import Input
from reqtable.table.limits import Limits
from reqtable.table.output import Output
from reqtable.table.states import State

_MISTAKES_MAX = 16  # how many wants that can't be satisfied a request may wait for


class Begun(Protocol):
    """A want that something was begun for: a call, a connect, a handshake."""

    def give_up(self) -> None:
        """Give up what was begun: the request no longer waits for it."""


class Holder(Protocol):
    """The part of a table that a want uses: its limits, its time, and its count of the bytes in buffers."""

    limits: Limits
    now: float
    driving_policy: str | None

    def hold(self, entry: Any, count: int) -> None: ...


class Connected(Protocol):
    """The part of a connection's row that the request of the connection uses."""

    id: int
    address: str
    connection: Any  # the `Connection` that the handler has
    state: State
    input: Input
    output: Output
    result: Any
    reach: Reach | None
    end_told: bool  # an item has told the handler of the end of the input
    held: int
    failure: Exception | None
    failure_told: bool
    want: Any  # what its request waits for, of its input
    wants_input: bool

    @property
    def table(self) -> Holder: ...

    @property
    def parent(self) -> Any:
        """The row of the connection's request; None if the request has closed or released the connection."""

    def watch(self, interest: int) -> None:
        """Have the selector watch the connection for exactly `interest`."""

    def flush(self) -> bool:
        """Give the kernel as much output as it takes. Returns whether that was all of it."""


class Reach:
    """Holds what one request has beside its client."""

    __slots__ = (
        "begun",
        "connections",
        "end_told",
        "held_back",
        "mistakes",
        "output_ended",
        "peer_ended",
        "sent",
        "told",
        "turn",
        "until",
        "wakes_at",
        "watched_for",
        "write_until",
    )

    def __init__(self) -> None:
        self.connections: list[Connected] = []
        self.told: deque[Any] = deque()
        self.begun: tuple[Begun, ...] = ()  # what the present wait has begun
        self.turn = 0  # the want of an `either` that is asked first next time, so that no side starves
        self.held_back = False  # a want was not satisfied because too much output waits: ask again when it is taken
        self.end_told = False  # an item has told the handler of its client's end of file
        self.peer_ended = False  # the client has ended its output, although some of its input may be unread
        self.output_ended = False  # the handler has ended its output to the client
        self.until: float | None = None  # when the handler's timeout for the present wait is over
        self.wakes_at = inf  # when the soonest sleep of the present wait is over
        self.write_until: float | None = None  # when the client must have taken some of its output
        self.sent = 0  # how many bytes the client had taken when `write_until` was set
        self.watched_for: Any = None  # the want that is polled for now; None: this must be looked at again
        self.mistakes = 0

    def is_full_beside(self, side: object, own_held: int, high_water: int) -> bool:
        """Return whether the input of `side` has nowhere to go: another side of the request has too much output.

        `side` is the row of a connection; None: the client, whose unsent output is `own_held` bytes. A request without
        connections can send only to its client.
        """
        if own_held > high_water and (side is not None or not self.connections):
            return True
        for row in self.connections:  # noqa: SIM110  # any(…) would make a generator
            if row.output.held > high_water and row is not side:
                return True
        return False

    def give_up(self) -> None:
        """Give up what the present wait has begun, because the request no longer waits for it."""
        begun, self.begun = self.begun, ()
        for each in begun:
            each.give_up()

    def end_timers(self) -> None:
        """Forget the timeout and the sleeps of a wait that is over: they must not wake the request any more."""
        self.until = None
        self.wakes_at = inf

    def note_mistake(self, problem: HandlerError) -> None:
        """Count a want that can't be satisfied. Raises `problem` if the handler makes such mistakes without end."""
        self.mistakes += 1
        if self.mistakes > _MISTAKES_MAX:
            raise problem
