"""Queries of the table: which requests an operator wants, in which order, and how many."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import inf
from operator import itemgetter
from typing import Any

from reqtable.control.jobs import PAUSE, Job
from reqtable.control.underway import with_queue
from reqtable.table.addresses import host_text
from reqtable.table.errors import ReqtableError
from reqtable.table.saving import why_not_saved
from reqtable.table.snapshot import Listing, handler_name, where
from reqtable.table.states import State
from reqtable.table.table import Entry, RequestTable

LOOK_EVERY = 16  # entries between two looks at the clock
_SHOWN_CHARACTERS = 60  # of a wrong value

# The key of each order: the largest first, but for "id".
ORDERS: dict[str, Callable[[Entry], float]] = {
    "id": lambda entry: entry.id,
    "age": lambda entry: entry.created_at,
    "idle": lambda entry: entry.active_at,
    "mem": lambda entry: -(len(entry.input) + entry.output.held),
    "in": lambda entry: -entry.bytes_in,
    "out": lambda entry: -entry.bytes_out,
    "steps": lambda entry: -entry.steps,
}
_ORDERS_OF_TABLE = ("id", "age")  # in which the rows stand, while `is_by_age`
# The same order of rows, which the supervisor has.
ROW_ORDERS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "id": itemgetter("id"),
    "age": lambda row: -row["age_s"],
    "idle": lambda row: -row["idle_s"],
    "mem": lambda row: -(row["buffered_in"] + row["buffered_out"]),
    "in": lambda row: -row["bytes_in"],
    "out": lambda row: -row["bytes_out"],
    "steps": lambda row: -row["steps"],
}


def immovable(entry: Entry) -> str | None:
    """Return why a request, or that of a connection, can't move to another process now; None if it can."""
    owner = entry if entry.parent_id is None else entry.table.get(entry.parent_id)
    return None if owner is None else why_not_saved(owner)


# What a row has if its query asks for it: each takes longer than a row.
ALSO: dict[str, Callable[[Entry], Any]] = {"immovable": immovable}
GROUPS: dict[str, Callable[[Entry], str | None]] = {
    "peer": lambda entry: host_text(entry.peer),
    "handler": lambda entry: handler_name(entry.handler),
    "handler_state": lambda entry: where(entry)[0],
    "state": lambda entry: entry.state.name,
    "policy": lambda entry: entry.policy.name,
    "server": lambda entry: type(entry.server).__name__,
    "immovable": immovable,
}


class QueryError(ReqtableError):
    """A query that can't be answered. The message names its argument, and what the argument may be."""


class Conflict(ReqtableError):
    """The server can't do this now. The message says why."""


@dataclass(frozen=True, slots=True)
class Query:
    """Says which rows are asked for. Every filter that is not None must match."""

    state: str | None = None
    handler: str | None = None
    handler_state: str | None = None
    peer: str | None = None
    path: str | None = None
    policy: str | None = None
    older: float | None = None  # seconds
    idle: float | None = None  # seconds
    worker: int | None = None
    sort: str | None = None  # a key of ORDERS; None: in the order of the table
    limit: int | None = None
    also: str | None = None  # a key of ALSO

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Query:
        """Return the query that text, or plain data, asks for. Raises QueryError."""
        values: dict[str, Any] = {}
        for name, value in arguments.items():
            if name not in cls.__dataclass_fields__:
                raise QueryError(f"there is no filter {name!r}: use {', '.join(cls.__dataclass_fields__)}")
            if value is None:
                continue
            if name in ("older", "idle"):
                values[name] = _number(name, value, float)
            elif name in ("worker", "limit"):
                values[name] = whole_number(name, value)
            else:
                values[name] = str(value)
        query = cls(**values)
        if query.sort is not None and query.sort not in ORDERS:
            raise QueryError(f"sort={query.sort}: there are {', '.join(ORDERS)}")
        if query.also is not None and query.also not in ALSO:
            raise QueryError(f"also={query.also}: there is {', '.join(ALSO)}")
        query.listing()
        return query

    def plain(self) -> dict[str, Any]:
        """Return the filters that are set, as plain data."""
        return {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}

    def listing(self) -> Listing:
        """Return what makes the rows. Raises QueryError."""
        try:
            return Listing(
                self.state, self.peer, self.handler, self.older, self.idle, self.policy, self.handler_state, self.path
            )
        except ValueError as error:
            raise QueryError(str(error)) from None

    def row(self, row: Mapping[str, Any], entry: Entry, worker: int) -> dict[str, Any]:
        """Return the row of an entry with what only the query knows."""
        more = {} if self.also is None else {self.also: ALSO[self.also](entry)}
        return {**with_queue(row, entry), "worker": worker, **more}


def whole_number(name: str, value: Any) -> int:
    """Return the number that an argument gives. Raises QueryError if it gives none."""
    return int(_number(name, value, int))


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        found = -1 if isinstance(value, bool) else kind(value)
    except (TypeError, ValueError, OverflowError):
        found = -1
    if not 0 <= found < 1e15:
        raise QueryError(f"{name}={str(value)[:_SHOWN_CHARACTERS]}: give a number, such as {name}=40")
    return found


def selected(table: RequestTable, query: Query, job: Job) -> Iterator[Any]:
    """Yield the entries that match, in the order asked for, and PAUSE in between. No row is made yet.

    Between two entries only ids are kept: what ends meanwhile is freed, however slowly the operator reads.
    """
    if query.worker is not None and query.worker != os.getpid():
        return
    if query.sort is None:
        yield from _limited(_matching(table, query, job, chain(*table.ids())), query.limit)
        return
    key = ORDERS[query.sort]
    if query.sort in _ORDERS_OF_TABLE and table.is_by_age:
        ids = heapq.merge(*table.ids(), key=lambda id: _place_of(table, id, key))
        yield from _limited(_matching(table, query, job, ids), query.limit)
        return
    runs: list[list[tuple[float, int]]] = []
    run: list[tuple[float, int]] = []
    for entry in _matching(table, query, job, chain(*table.ids())):
        if entry is PAUSE:
            yield PAUSE
            continue
        run.append((key(entry), entry.id))
        if len(run) >= 256:
            runs.append(sorted(run)[: query.limit])
            run = []
    runs.append(sorted(run)[: query.limit])
    found = (entry for _, id in heapq.merge(*runs) if (entry := table.get(id)) is not None)
    yield from _limited(found, query.limit)


def _place_of(table: RequestTable, id: int, key: Callable[[Entry], float]) -> tuple[float, int]:
    entry = table.get(id)
    return (-inf if entry is None else key(entry), id)  # it has ended meanwhile: the next one may come


def _matching(table: RequestTable, query: Query, job: Job, ids: Iterator[int]) -> Iterator[Any]:
    listing, now = query.listing(), table.clock()
    for place, id in enumerate(ids):
        if place % LOOK_EVERY == 0 and job.is_spent:
            yield PAUSE
            now = table.clock()
        entry = table.get(id)
        if entry is None:
            continue
        state = State.RUNNING if entry is table.running else entry.state
        if listing.shows(entry, state, now):
            yield entry
            del entry  # an operator who does not read the rows must not keep what has ended


def _limited(found: Iterator[Any], limit: int | None) -> Iterator[Any]:
    left = limit
    for entry in found:
        if entry is not PAUSE:
            if left == 0:
                return
            left = None if left is None else left - 1
        yield entry
