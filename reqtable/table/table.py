"""The table of partially finished requests: `RequestTable` and its rows, `Entry`.

The rules:

* An entry is data. It holds what the request waits for, its unread input, its unsent output and its deadline. None of
  this is kept on a stack.
* Only the engine changes the table. Anyone may read it: `len()`, iteration and `snapshot()` are safe from a handler and
  from another thread. So are `cancel(id)` and `save()`.
* Ids count up from 1 and are never reused. A request that moves to another process keeps its id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from math import inf
from typing import Any, ClassVar, Protocol

from reqtable.table.addresses import address_text, packed, unpacked
from reqtable.table.census import Census
from reqtable.table.errors import HandlerError, ReqtableError, shown
from reqtable.table.gradually import SLICE_ROWS, gradually
from reqtable.table.input import MISSING, NO_INPUT, Input
from reqtable.table.limits import Limits
from reqtable.table.output import Output
from reqtable.table.parts import Mover, Policy, RemoteStep, Resumable, Server, Transport
from reqtable.table.reach import Reach
from reqtable.table.snapshot import Listing, Row, handler_name, want_text
from reqtable.table.states import TRANSITIONS, Ending, Event, State
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING

_REFUSALS_MAX = 16  # how many wants a handler may try on the same input
IDS_PER_PROCESS = 10**10  # the ids of the third process that was started begin with 3: unique, and below 2**53


class Owner(Protocol):
    """Runs the requests of a table. Its methods may be called from any thread, unless they say otherwise."""

    @property
    def in_other_thread(self) -> bool:
        """True if the loop runs in another thread than the caller's."""

    @property
    def is_copy(self) -> bool:
        """True in a forked child, if the requests are the parent's."""

    def give_way(self) -> None:
        """Let the loop's thread run before the caller continues."""

    def cancel(self, entry: Entry) -> None:
        """End the request of `entry`."""

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the loop call `function(*args)`."""

    def post_result(self, entry: Entry, number: int, item: Any) -> None:
        """Give `entry` the result of its call `number`."""

    def deliver(self, entry: Entry, number: int, item: Any) -> None:
        """Give `entry` the result of its call `number` at once. Only for the loop's own thread."""


class Entry:
    """Holds everything about one unfinished request.

    `state` says what a suspended request waits for, and `want` says it exactly. `timeout` is how long it may wait, in
    seconds, or None. `handler` is the handler object if that is resumable, and the handler's class otherwise.
    """

    __slots__ = (
        "active_at",
        "began_at",
        "bytes_in",
        "bytes_in_when_armed",
        "bytes_out",
        "call_number",
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
        "packed_peer",
        "policy",
        "reach",
        "result",
        "resumable",
        "server",
        "state",
        "steps",
        "table",
        "timeout",
        "transport",
        "want",
    )

    kind: ClassVar[str] = "client"  # or "connection": see ConnectionRow

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
        self.call_number = 0  # number of the latest call: an older number marks the result of a call that was given up
        self.result: Any = MISSING  # the item posted for a want that does not read from `input`
        self.created_at = self.active_at = table.now
        self.began_at: float | None = table.now  # when `request_timeout_s` began to run; None: it does not run
        self.input: Input = NO_INPUT  # to be read; see own_input
        self.output = Output()
        self.bytes_in = 0
        self.bytes_out = 0
        self.bytes_in_when_armed = 0  # `bytes_in` when its deadline was set
        self.held = 0  # bytes of its buffers, as the table last counted them
        self.ending: Ending | None = None  # how the request ends; None: DONE
        self.reach: Reach | None = None  # what it has beside its client; None: nothing
        self.steps = 0

    @property
    def peer(self) -> Any:
        """The address of the peer, which is packed: a million hosts would take much memory."""
        return unpacked(self.packed_peer)

    @peer.setter
    def peer(self, peer: Any) -> None:
        self.packed_peer = packed(peer)

    def own_input(self) -> Input:
        """Return its input, to be written. Until then, it shares an empty one with the other requests."""
        if self.input is NO_INPUT:
            self.input = Input()
        return self.input

    @property
    def parent_id(self) -> int | None:
        """The id of the request that an outgoing connection belongs to; None for a request."""
        return None

    @property
    def moves(self) -> int:
        """How many times it has gone to another process."""
        return self.table.moves.get(self, 0)

    @property
    def attempt(self) -> int:
        """How many crashes of a worker have cut off the step that runs now: 0, unless another worker has taken over."""
        return getattr(self.transport, "attempt", 0)

    def advance(self, event: Event) -> None:
        """Move to the state that follows `event`. If there is none, raise ReqtableError: the engine has a bug."""
        before = self.state
        try:
            self.state = TRANSITIONS[before][event]
        except KeyError:
            raise ReqtableError(f"request {self.id}: {event.value!r} can't happen in {before.name}") from None
        if self.table.on_transition is not None:
            self.table.on_transition(self, before, event)

    def expect_result(self) -> int:
        """Prepare to wait for a result from elsewhere. Returns the number that the result must carry."""
        self.result = MISSING
        self.call_number += 1
        return self.call_number

    def __repr__(self) -> str:
        return f"<Entry {self.id} {self.state.name} {address_text(self.peer)} {want_text(self.want)}>"


class RequestTable:
    """Holds the unfinished requests of an engine, in order of arrival, and their outgoing connections.

    Iterating it gives the requests; `connections` has the rows of the connections.
    """

    __slots__ = ("__dict__", "idle_is_unbounded", "limits", "now", "running", "thread")  # those that lean.c uses

    def __init__(self, clock: Callable[[], float], limits: Limits | None = None) -> None:
        self.last_id = 0
        self.is_by_age = True  # an older row comes before a younger one; not if a row has come from another process
        self._entries: dict[int, Entry] = {}
        self.census: Census[Entry] = Census()
        self.set_limits(limits if limits is not None else Limits())
        self.buffered = 0  # bytes of input and output in the entries' buffers: the sum of their `held`
        self.clock = clock
        self.now = clock()  # read once a pass
        self.running: Entry | None = None  # the entry whose step the loop is running
        self.accepting: Server | None = None  # the server whose `get_request` the loop is calling
        self.touched: list[Entry] = []  # entries to which another entry's step has sent, or told, something
        self.connections: dict[int, Entry] = {}  # the outgoing connections, by id
        self.connection_counts: Counter[str] = Counter()  # how many were opened, reused, failed
        self.elsewhere: dict[Entry, RemoteStep] = {}  # entries whose step runs in another thread
        self._refused: dict[Entry, tuple[int, list[Want[Any]]]] = {}  # see note_refusal
        self.moves: dict[Entry, int] = {}  # how many times a request has moved, if it has; until it is released
        self.owner: Owner | None = None
        self.thread: int | None = None  # the `threading.get_ident()` of the loop's thread; None: the loop does not run
        self.on_transition: Callable[[Entry, State, Event], Any] | None = None  # called after each transition
        self.driving_policy: str | None = None  # the policy whose thread or child runs this table, for one request
        self.mover: Mover | None = None  # None: the requests of this table can't be saved

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return filter(None, map(self._entries.get, gradually(self._entries, self.last_id)))

    def __contains__(self, entry: Entry) -> bool:
        return self._entries.get(entry.id) is entry

    def ids(self) -> tuple[Iterator[int], Iterator[int]]:
        """Return the ids of the requests, and those of the connections. This leaves out rows that come meanwhile."""
        return gradually(self._entries, self.last_id), gradually(self.connections, self.last_id)

    def rows(self) -> Iterator[Entry]:
        """Yield the requests, then the connections. This leaves out rows that come or go meanwhile."""
        return filter(None, map(self.get, chain(*self.ids())))

    def get(self, id: int) -> Entry | None:
        """Return the entry of the request or the connection with that id, or None if there is none."""
        return self._entries.get(id) or self.connections.get(id)

    @property
    def full(self) -> bool:
        """True while no more entries are admitted."""
        return len(self._entries) >= self.limits.entries_max

    def set_limits(self, limits: Limits) -> None:
        """Apply `limits` from now on."""
        self.limits = limits
        # True: a peer that has sent no part of an item may be silent for ever.
        self.idle_is_unbounded = limits.idle_timeout_s is None and limits.request_timeout_s is None
        self.census.know_networks(None if limits.entries_per_peer_max is None else self)

    def add(self, entry: Entry, id: int | None = None) -> None:
        """Enter a request under the next id, or under the `id` that it had in another process, if that is free."""
        self._entries[self._number(entry, id)] = entry
        self.census.add(entry)

    def add_connection(self, row: Entry, id: int | None = None) -> None:
        """Enter an outgoing connection, as `add` does a request."""
        self.connections[self._number(row, id)] = row

    def _number(self, row: Entry, id: int | None) -> int:
        if id is not None:
            self.is_by_age = False
            if self.get(id) is None:
                self.last_id = max(self.last_id, id)
                row.id = id
                return id
        self.last_id = row.id = self.last_id + 1
        return row.id

    def remove(self, entry: Entry) -> None:
        self.hold(entry, 0)
        self._refused.pop(entry, None)
        if entry in self:
            self.census.remove(entry)
            del self._entries[entry.id]
        else:
            self.connections.pop(entry.id, None)

    def set_peer(self, entry: Entry, peer: Any) -> None:
        """Set the peer of `entry` to the client that a proxy has named."""
        self.census.remove(entry)
        entry.peer = peer
        self.census.add(entry)

    def note_refusal(self, entry: Entry, want: Want[Any]) -> None:
        """Note that the unread input of `entry` exceeds the limit of `want`. The caller then tells the handler.

        Raises HandlerError if the handler was told so before and has taken no input since: it would repeat this for
        ever.
        """
        taken = entry.bytes_in - len(entry.input)
        taken_before, refused = self._refused.get(entry, (-1, []))
        if taken != taken_before:
            refused = []
        if want in refused or len(refused) >= _REFUSALS_MAX:
            raise HandlerError(
                f"{handler_name(entry.handler)} waits for {shown(want)} again, but the same input still exceeds the "
                "limit: skip the line with skip_line(), read the input in parts with chunk(), or end the request"
            )
        self._refused[entry] = taken, [*refused, want]

    def touch(self, entry: Entry) -> None:
        """Note that another request has sent, or told, something to `entry`. Only for the loop's own thread."""
        self.touched.append(entry)

    def hold(self, entry: Entry, count: int) -> None:
        """Set the count of bytes in the buffers of `entry`."""
        self.buffered += count - entry.held
        entry.held = count

    def cancel(self, id: int) -> bool:
        """End the request, or the outgoing connection, with that id. Returns False if there is none.

        Callable from any thread. In a forked child it ends nothing: the request belongs to the parent.
        """
        entry = self.get(id)
        if entry is None or entry.state is State.CLOSED or self.owner is None:
            return False
        self.owner.cancel(entry)
        return True

    def save(self, ids: Iterable[int] | None = None) -> list[bytes]:
        """Return the requests with these ids as records, which `restore` takes. The requests go on.

        Without ids, these are all requests that can move now. Raises NotMovable, with the reason, if a request that was
        named can't. Callable from any thread: the loop does it, between two steps.
        """
        return self._mover().save(ids)

    def restore(self, records: Iterable[bytes], sockets: Iterable[Any] = ()) -> list[int]:
        """Go on with the requests of `records` in this table. Returns their ids: the old ones, if these are free.

        `sockets` are, for each record in turn: the socket of its client (none for a datagram session), those of its
        outgoing connections, and the descriptors of its files. The table owns them from now on. Raises ReqtableError
        if anything can't be used; then the table is as before, and the sockets are the caller's. Callable from any
        thread, but not by a step.
        """
        return self._mover().restore(records, sockets)

    def _mover(self) -> Mover:
        if self.mover is None:
            raise ReqtableError("only the table of an engine can save and restore requests")
        return self.mover

    def snapshot(
        self,
        *,
        state: State | str | None = None,
        peer: str | None = None,
        handler: Any = None,
        older_than: float | None = None,
        idle_for: float | None = None,
        policy: str | None = None,
        handler_state: str | None = None,
        path: str | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """Return the rows that match every given filter, as plain data: the oldest `limit` of them, or all.

        If another thread calls this, the loop runs in between. If a step calls this, the loop stands still. With
        thousands of rows, use `call(table.snapshot, on="thread")` there.

        `state` is a State, its name or its letter. `peer` is an address as shown, or its host alone. `handler` is a
        class or its name. `older_than` is an age in seconds, and `idle_for` how long it has been idle. `path` is that
        of an HTTP request. Raises ValueError for an unknown state.
        """
        rows: list[Row] = []
        listing = Listing(state, peer, handler, older_than, idle_for, policy, handler_state, path)
        for some in self.slices(listing, SLICE_ROWS if limit is None else min(SLICE_ROWS, limit)):
            rows += some
            if limit is not None and len(rows) >= limit:
                return rows[:limit]
            if self.owner is not None and self.owner.in_other_thread:
                self.owner.give_way()
        return rows

    def slices(self, listing: Listing, size: int = SLICE_ROWS) -> Iterator[list[Row]]:
        """Yield the matching rows in one or more parts. Between two parts the loop may run and change the entries."""
        rows = self.rows()
        yield listing.rows(islice(rows, size), self.running, self.clock())
        while some := list(islice(rows, size)):
            yield listing.rows(some, self.running, self.clock())
