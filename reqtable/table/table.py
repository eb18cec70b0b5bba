"""The table of partially finished requests: `RequestTable` and its rows, `Entry`.

The rules:

* An entry is data. What it waits for, what it has read and not sent, how long it may take: all of it stands here, and
  nothing of it on a stack.
* The engine owns the table and its clock; anyone may look: `len()`, iteration and `snapshot()` are safe from a handler
  and from another thread. `cancel(id)` is too.
* Ids count up from 1 and are never used twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from math import inf
from typing import Any, ClassVar, Protocol

from reqtable.table.addresses import address_text, network_of
from reqtable.table.buffers import MISSING, Input, Output
from reqtable.table.errors import HandlerError, ReqtableError, shown
from reqtable.table.limits import Limits
from reqtable.table.parts import Resumable, Server, Transport
from reqtable.table.snapshot import Listing, Row, handler_name, want_text
from reqtable.table.states import TRANSITIONS, Ending, Event, State
from reqtable.table.wants import NOTHING, Want

_REFUSALS_MAX = 16  # wants that a handler may try on the same input
SLICE_ROWS = 250  # half a millisecond's worth


class Policy(Protocol):
    """The part of a dispatch policy that an entry shows and an engine calls."""

    name: ClassVar[str]

    def begin_call(self, entry: Entry, want: Any) -> Callable[[], Any]:
        """Run a call elsewhere and have its result delivered. Returns what gives it up."""

    def hand_off(self, entry: Entry, want: Any) -> Want[Any]:
        """Have another policy take the request over. Returns what to wait for."""

    def secured(self, entry: Entry, request: Any, context: Any) -> Any:
        """The TLS socket of a request whose handshake is about to be done."""

    def admitted(self) -> Any:
        """A request of its own has entered the table."""

    def released(self) -> Any:
        """A request of its own has left the table."""


class Owner(Protocol):
    """What works on the rows of a table. What does not say otherwise is callable from any thread."""

    @property
    def in_other_thread(self) -> bool:
        """The loop runs, and in another thread than the caller's."""

    def give_way(self) -> None:
        """Let the thread that runs the loop run, before this one goes on."""

    def cancel(self, entry: Entry) -> None:
        """End a request."""

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)`."""

    def post_result(self, entry: Entry, number: int, item: Any) -> None:
        """Give `entry` the result of its call `number`."""

    def deliver(self, entry: Entry, number: int, item: Any) -> None:
        """The same at once: only for the loop's own thread."""


class RemoteStep(Protocol):
    """A step that runs in another thread than the loop's."""

    thread: int | None  # its `threading.get_ident()`, once it runs
    output: Output  # what the step sends; the entry's own output is the loop's


class Entry:
    """One unfinished request.

    `state` is what it waits for while suspended, `want` says that more exactly, and `timeout` (seconds, or None) for
    how long. `handler` is the handler itself where it is resumable, its class otherwise.
    """

    __slots__ = (
        "active_at",
        "bytes_in",
        "bytes_in_when_armed",
        "bytes_out",
        "calls",
        "created_at",
        "deadline",
        "ending",
        "handler",
        "heap_time",
        "held",
        "id",
        "input",
        "local",
        "output",
        "peer",
        "policy",
        "result",
        "resumable",
        "server",
        "state",
        "steps",
        "table",
        "timeout",
        "transport",
        "wakes_at",
        "want",
    )

    def __init__(
        self, table: RequestTable, server: Server, policy: Policy, peer: Any, local: Any, transport: Transport
    ) -> None:
        self.id = 0
        self.table = table
        self.server = server
        self.policy = policy
        self.peer = peer
        self.local = local
        self.transport = transport
        self.handler: Any = server.RequestHandlerClass
        self.resumable: Resumable
        self.state = State.OPENING
        self.want: Want[Any] = NOTHING
        self.timeout: float | None = None
        self.deadline: float | None = None
        self.heap_time = inf  # see Deadlines
        self.calls = 0  # calls begun; a result that comes after its call was given up is told by it
        self.result: Any = MISSING  # what was posted for a want that is not satisfied from `input`
        self.wakes_at: float | None = None  # when its sleep ends
        self.created_at = self.active_at = table.now
        self.input = Input()
        self.output = Output()
        self.bytes_in = 0
        self.bytes_out = 0
        self.bytes_in_when_armed = 0  # `bytes_in` when its deadline was set
        self.held = 0  # what the table counts of its buffers
        self.ending: Ending | None = None  # how it ended, where it was not simply done
        self.steps = 0

    def advance(self, event: Event) -> None:
        """Move to the state that follows `event`. Raises ReqtableError where there is none: a bug of the engine."""
        before = self.state
        try:
            self.state = TRANSITIONS[before][event]
        except KeyError:
            raise ReqtableError(f"request {self.id}: {event.value!r} can't happen in {before.name}") from None
        if self.table.on_transition is not None:
            self.table.on_transition(self, before, event)

    def begin_call(self) -> int:
        """Wait for a result from elsewhere; returns the number that it is to come with."""
        self.result = MISSING
        self.calls += 1
        return self.calls

    def __repr__(self) -> str:
        return f"<Entry {self.id} {self.state.name} {address_text(self.peer)} {want_text(self.want)}>"


class RequestTable:
    """Every unfinished request of an engine, in the order in which they came."""

    def __init__(self, clock: Callable[[], float], limits: Limits | None = None) -> None:
        self.per_network: Counter[str | None] | None = None  # how many are of each, where that is limited
        self._entries: dict[int, Entry] = {}
        self.limits: Limits
        self.set_limits(limits if limits is not None else Limits())
        self.buffered = 0  # bytes of input and output that the entries hold, as far as they have been counted
        self.clock = clock
        self.now = clock()  # read once a pass
        self.running: Entry | None = None  # the entry whose step the loop is in
        self.accepting: Server | None = None  # the server whose `get_request` the loop is in
        self.touched: list[Entry] = []  # entries that another one's step sent to
        self.elsewhere: dict[Entry, RemoteStep] = {}  # those whose own step runs in another thread
        # What each entry waited for when a limit was exceeded, and how much of its input had been taken by then.
        self._refused: dict[Entry, tuple[int, list[Want[Any]]]] = {}
        self.last_id = 0
        self.owner: Owner | None = None
        self.thread: int | None = None  # the `threading.get_ident()` of the thread that runs the loop, while one does
        self.on_transition: Callable[[Entry, State, Event], Any] | None = None  # told of each, when it has happened
        self.driver: str | None = None  # the policy whose thread or child has this table to itself, for one request

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))  # a copy: the loop may add and remove while someone looks

    def __contains__(self, entry: Entry) -> bool:
        return self._entries.get(entry.id) is entry

    def get(self, id: int) -> Entry | None:
        """The entry with that id, or None when there is none any more."""
        return self._entries.get(id)

    @property
    def full(self) -> bool:
        """True while no more entries are admitted."""
        return len(self._entries) >= self.limits.entries_max

    def set_limits(self, limits: Limits) -> None:
        """Be held to others from here on."""
        self.limits = limits
        # A peer that has sent no part of an item may be silent for ever.
        self.unbounded = limits.idle_timeout_s is None and limits.request_timeout_s is None
        counted = limits.entries_per_peer_max is not None
        self.per_network = Counter(network_of(entry.peer) for entry in self) if counted else None

    def count_from(self, peer: Any) -> int:
        """How many entries there are of that peer's network, where that is limited."""
        network = network_of(peer)
        return 0 if self.per_network is None or network is None else self.per_network[network]

    def add(self, entry: Entry) -> None:
        self.last_id += 1
        entry.id = self.last_id
        self._entries[entry.id] = entry
        if self.per_network is not None:
            self.per_network[network_of(entry.peer)] += 1

    def remove(self, entry: Entry) -> None:
        self.hold(entry, 0)
        self._refused.pop(entry, None)
        if entry in self:
            self._discount(entry)
            del self._entries[entry.id]

    def rename(self, entry: Entry, peer: Any) -> None:
        """Its peer is another one than it seemed: a proxy has said for whom it connects."""
        self._discount(entry)
        entry.peer = peer
        if self.per_network is not None:
            self.per_network[network_of(peer)] += 1

    def _discount(self, entry: Entry) -> None:
        if self.per_network is not None:
            network = network_of(entry.peer)
            self.per_network[network] -= 1
            if not self.per_network[network]:
                del self.per_network[network]

    def refuse(self, entry: Entry, want: Want[Any]) -> None:
        """The unread input of `entry` exceeds the limit of `want`: the handler is about to be told.

        Raises HandlerError where the handler was told of this before, and has taken no input since: it would be told
        for ever.
        """
        taken = entry.bytes_in - len(entry.input)
        taken_before, refused = self._refused.get(entry, (-1, []))
        if taken != taken_before:
            refused = []
        if want in refused or len(refused) >= _REFUSALS_MAX:
            raise HandlerError(
                f"{handler_name(entry.handler)} waits for {shown(want)} again, whose limit the same input exceeds: "
                "take it away by skip_line(), take it in parts by chunk(), or end the request"
            )
        self._refused[entry] = taken, [*refused, want]

    def hold(self, entry: Entry, count: int) -> None:
        """Count what the buffers of `entry` hold now."""
        self.buffered += count - entry.held
        entry.held = count

    def cancel(self, id: int) -> bool:
        """End the request with that id; False when there is none. Callable from any thread.

        In a forked child the request is the parent's, and stays.
        """
        entry = self._entries.get(id)
        if entry is None or entry.state is State.CLOSED or self.owner is None:
            return False
        self.owner.cancel(entry)
        return True

    def snapshot(
        self,
        *,
        state: State | str | None = None,
        peer: str | None = None,
        handler: Any = None,
        older_than: float | None = None,
    ) -> list[Row]:
        """The rows as plain data, those that match every filter given.

        In another thread than the loop's it lets the loop go on meanwhile. In a step it can't: where there may be
        thousands of rows, `call(table.snapshot, on="thread")`.

        `state` is a State, its name or its letter; `peer` an address as shown, or its host alone; `handler` a class or
        its name; `older_than` an age in seconds. Raises ValueError for a state that is none.
        """
        rows: list[Row] = []
        for some in self.slices(Listing(state, peer, handler, older_than)):
            rows += some
            if self.owner is not None and self.owner.in_other_thread:
                self.owner.give_way()
        return rows

    def slices(self, listing: Listing) -> Iterator[list[Row]]:
        """The rows in parts, at least one, each as it is when it is asked for: others have their turn in between."""
        entries = list(self)
        for first in range(0, max(1, len(entries)), SLICE_ROWS):
            yield listing.rows(entries[first : first + SLICE_ROWS], self.running, self.clock())
