"""How the table shows its entries: as a `Row` of plain data each, and as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict

from reqtable.table.addresses import address_text, host_text, printable
from reqtable.table.errors import shown
from reqtable.table.input import Input
from reqtable.table.output import Output
from reqtable.table.states import State

_NAMES = {state: (state.name, state.value) for state in State}


class Row(TypedDict):
    """Holds one row of a snapshot, as plain data. `_s` is seconds; a value that is not known or not set is None."""

    id: int
    kind: str  # "client", or "connection": an outgoing one
    parent: int | None  # the id of the request that a connection belongs to
    peer: str
    local: str
    server: str
    handler: str
    handler_state: str | None  # the handler's own state; None: the handler is no state machine
    source: str | None  # `file:line` of that state, or of the line at which the handler waits
    policy: str
    state: str
    letter: str
    waits_for: str
    age_s: float
    idle_s: float
    deadline_s: float | None
    bytes_in: int
    bytes_out: int
    buffered_in: int
    buffered_out: int
    steps: int
    moves: int  # how many times it has gone to another process
    method: NotRequired[str | None]  # of an HTTP request, as are the next four; None: between two requests
    path: NotRequired[str | None]
    status: NotRequired[int | None]  # once sent
    body_in: NotRequired[int]  # bytes of the body so far
    body_out: NotRequired[int]


_PATH_CHARACTERS = 60  # of the path of an HTTP request, in a table


class Named(Protocol):
    """The part of a policy that a row shows: its name."""

    @property
    def name(self) -> str: ...


class Shown(Protocol):
    """The part of an entry that a row shows."""

    id: int
    peer: Any
    local: Any
    handler: Any
    resumable: Any
    state: State
    deadline: float | None
    created_at: float
    active_at: float
    input: Input
    output: Output
    bytes_in: int
    bytes_out: int
    steps: int

    @property
    def moves(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def parent_id(self) -> int | None: ...
    @property
    def server(self) -> object: ...
    @property
    def policy(self) -> Named: ...
    @property
    def want(self) -> object: ...


class Listing:
    """Makes the rows of the entries that match every given filter. `RequestTable.snapshot` describes the filters."""

    def __init__(
        self,
        state: State | str | None = None,
        peer: str | None = None,
        handler: Any = None,
        older_than: float | None = None,
        idle_for: float | None = None,
        policy: str | None = None,
        handler_state: str | None = None,
        path: str | None = None,
    ) -> None:
        self._state = None if state is None else _state_named(state)
        self._peer = peer
        self._handler = handler if handler is None or isinstance(handler, str) else handler_name(handler)
        self._older_than = older_than
        self._idle_for = idle_for
        self._policy = policy
        self._handler_state = handler_state
        self._path = path
        filters = (state, peer, handler, older_than, idle_for, policy, handler_state, path)
        self._shows_all = all(each is None for each in filters)
        self._texts: dict[int, tuple[Any, str]] = {}  # texts that many rows share, each made once

    def rows(self, entries: Iterable[Shown], running: Shown | None, now: float) -> list[Row]:
        """Return the rows of entries that match and have not ended. `running` is the entry whose step is running."""
        rows = []
        for entry in entries:
            state = State.RUNNING if entry is running else entry.state
            if self.shows(entry, state, now):
                rows.append(self._row(entry, state, now))
        return rows

    def shows(self, entry: Shown, state: State, now: float) -> bool:
        """Return whether an entry has not ended, and matches every filter."""
        return state is not State.CLOSED and (self._shows_all or self._matches(entry, state, now))

    def _matches(self, entry: Shown, state: State, now: float) -> bool:
        return (
            (self._state is None or state is self._state)
            and (self._peer is None or self._peer in (address_text(entry.peer), host_text(entry.peer)))
            and (self._handler is None or handler_name(entry.handler) == self._handler)
            and (self._older_than is None or now - entry.created_at > self._older_than)
            and (self._idle_for is None or now - entry.active_at > self._idle_for)
            and (self._policy is None or entry.policy.name == self._policy)
            and (self._handler_state is None or where(entry)[0] == self._handler_state)
            and (self._path is None or _path_of(entry) == self._path)
        )

    def _row(self, entry: Shown, state: State, now: float) -> Row:
        name, letter = _NAMES[state]
        deadline = entry.deadline
        handler_state, source = where(entry)
        row: Row = {
            "id": entry.id,
            "kind": entry.kind,
            "parent": entry.parent_id,
            "peer": address_text(entry.peer),
            "local": self._text(entry.local, address_text),
            "server": type(entry.server).__name__,
            "handler": handler_name(entry.handler),
            "handler_state": handler_state,
            "source": source,
            "policy": entry.policy.name,
            "state": name,
            "letter": letter,
            "waits_for": self._text(entry.want, want_text),
            "age_s": now - entry.created_at,
            "idle_s": max(0.0, now - entry.active_at),
            "deadline_s": None if deadline is None else deadline - now,
            "bytes_in": entry.bytes_in,
            "bytes_out": entry.bytes_out,
            "buffered_in": len(entry.input),
            "buffered_out": entry.output.held,
            "steps": entry.steps,
            "moves": entry.moves,
        }
        row.update(_shown_by_handler(entry))  # type: ignore[typeddict-item]
        return row

    def _text(self, thing: Any, write: Callable[[Any], str]) -> str:
        known = self._texts.get(id(thing))
        if known is None:
            known = self._texts[id(thing)] = thing, write(thing)  # keep the thing, so that its id is not reused
        return known[1]


def where(entry: Shown) -> tuple[str | None, str | None]:
    """Return the handler's own state, and `file:line` of where the request is; None for what is not known."""
    is_class = isinstance(entry.handler, type)  # a blocking handler; OPENING, there is nothing else yet
    handler = getattr(entry, "resumable", None) if is_class else entry.handler
    find = getattr(handler, "_where", None)
    return (None, None) if find is None else find()


def _shown_by_handler(entry: Shown) -> dict[str, Any]:
    """Return what the handler adds to the row of its request."""
    show = None if isinstance(entry.handler, type) else getattr(entry.handler, "_shown", None)
    return {} if show is None else show()


def _path_of(entry: Shown) -> str | None:
    return _shown_by_handler(entry).get("path")


def format_rows(rows: list[Row]) -> str:
    """Return the rows as an aligned text table with a heading, one line for each row."""
    shows_requests = any("method" in row for row in rows)
    heading = ["id", "st", "peer", "handler", "policy", "age", "idle", "left", "in", "out", "qin", "qout"]
    heading += ["request", "waits for"] if shows_requests else ["waits for"]
    cells = [
        (
            str(row["id"]),
            row["letter"],
            row["peer"],
            row["handler"],
            row["policy"],
            f"{row['age_s']:.1f}",
            f"{row['idle_s']:.1f}",
            "-" if row["deadline_s"] is None else f"{row['deadline_s']:.1f}",
            str(row["bytes_in"]),
            str(row["bytes_out"]),
            str(row["buffered_in"]),
            str(row["buffered_out"]),
            *([_request_text(row)] if shows_requests else []),
            row["waits_for"],
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [heading, *cells]) for i in range(len(heading))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heading, *cells]
    )


def _request_text(row: Row) -> str:
    """Return what an HTTP request asks for, and the status of its answer."""
    if row.get("method") is None:
        return "-"
    path = str(row.get("path"))
    if len(path) > _PATH_CHARACTERS:
        path = path[: _PATH_CHARACTERS - 1] + "…"
    return printable(f"{row.get('method')} {path} {row.get('status') or ''}".rstrip())


def want_text(want: object) -> str:
    """Return a want as one line of printable text. A program's own want, or a call, may show what a peer sent."""
    return printable(shown(want))


def handler_name(handler: Any) -> str:
    """Return the name of a handler's class. `handler` is the handler, its class, or a function that makes one."""
    handler = unwrapped(handler)
    return str(getattr(handler, "__name__", None) or type(handler).__name__)


def unwrapped(handler: Any) -> Any:
    """Return the handler class inside a `functools.partial`, or anything else as it is."""
    return handler.func if isinstance(handler, partial) else handler


def _state_named(state: State | str) -> State:
    if isinstance(state, State):
        return state
    for candidate in State:
        if state in (candidate.name, candidate.value):
            return candidate
    raise ValueError(f"no state is named {state!r}; there are {', '.join(s.name for s in State)}")
