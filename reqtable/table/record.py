"""A request as data: its `Record`.

A record has everything of a request that is not bound to a process: its handler's fields, its want, its timeouts, its
unread input and its unsent output. It has no socket and no clock: its times are in seconds from now.

`reqtable.table.saving` writes a record as bytes of plain data. The executor policy pickles it instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Protocol

from reqtable.table import wants
from reqtable.table.addresses import address_text
from reqtable.table.engine_wants import Sleeping
from reqtable.table.errors import NotMovable
from reqtable.table.input import MISSING, NO_INPUT
from reqtable.table.output import END, EndOfOutput, FileSlice
from reqtable.table.reach import Reach
from reqtable.table.reaching import Either
from reqtable.table.snapshot import handler_name
from reqtable.table.states import TRANSITIONS, Event, State
from reqtable.table.table import Entry
from reqtable.table.want import Want

# Why a request can't move in a state that no FROZEN leaves.
_HELD = {
    State.OPENING: "its PROXY header or its TLS handshake has not come",
    State.RUNNING: "its step is running",
    State.OFFLOADED: "a call, or a step that runs elsewhere, is in flight",
    State.DELEGATED: "a thread or a child has it",
    State.LINGERING: "it is done",
    State.CLOSED: "it has ended",
    State.MOVING: "it is being moved",
}


class Saved(Protocol):
    """The part of a handler that a record needs. Only a `StateRequestHandler` has it."""

    state_version: ClassVar[int]
    _no_data: ClassVar[Mapping[str, str]]  # the attributes that are no data, each with what to say if it is not None

    def _undeclared(self) -> str | None:
        """Return what is wrong with an attribute that a record would not have; None if there is none."""

    def _save(self) -> tuple[str | None, dict[str, Any], bool]:
        """Return the name of its state, its fields, and whether it was told of the end of file."""

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool], made_at: float) -> None:
        """Set the handler to what `_save` returned at the time `made_at`, by the clock of its table now."""


@dataclass(frozen=True, slots=True)
class Record:
    """Holds the data of one request. `_s` is seconds; a time that is not set is None."""

    id: int
    server: str  # the address of the server that the request came to
    handler: str  # the name of its class
    version: int  # the handler's `state_version`
    handler_state: str | None  # None: its first step has not run
    fields: dict[str, Any]
    told_of_end: bool  # the handler knows of the end of file
    state: str  # the name of the entry's state
    want: Want[Any] | None
    result: Any  # the posted item that the want has not taken; MISSING if there is none
    timeout_s: float | None
    deadline_s: float | None  # left until its deadline
    peer: Any
    local: Any
    unread: dict[str, Any]  # its input, as returned by `Input.save`
    unsent: tuple[Any, ...]  # the pieces of its output
    reach: dict[str, Any] | None  # what it has beside its client, without the connections
    bytes_in: int
    bytes_in_when_armed: int
    bytes_out: int
    steps: int
    moves: int  # how many times it has gone to another process
    age_s: float
    begun_s: float | None  # how long `request_timeout_s` has run
    idle_s: float


def why_not_movable(entry: Entry) -> str | None:
    """Return why the request of `entry` can't move to another process now; None if it can."""
    if entry.kind != "client":
        return "it is an outgoing connection, which moves with its request"
    if Event.FROZEN not in TRANSITIONS[entry.state] or entry.state is State.OPENING:
        return _HELD[entry.state]
    if entry is entry.table.running:
        return _HELD[State.RUNNING]
    if not hasattr(entry.handler, "_save"):
        return "its handler has a stack: only a state machine is data"
    if entry.transport.immovable is not None:
        return entry.transport.immovable
    each_want = _each_want(entry.want)
    if any(hasattr(each, "give_up") for each in each_want):
        return "a call, a connect or a handshake is in flight"
    rows: Any = entry.reach.connections if entry.reach is not None else ()
    for row in rows:
        if row.transport.immovable is not None:
            return f"its connection to {row.address}: {row.transport.immovable}"
        if row.state is not State.WAITING:
            return f"its connection to {row.address} is being made, or has ended"
    if entry in entry.table.elsewhere or any(isinstance(each, wants.Posted) for each in each_want):
        return _HELD[State.OFFLOADED]
    return _unsaved(entry.handler)


def _each_want(want: Want[Any]) -> tuple[Want[Any], ...]:
    return want.wants if type(want) is Either else (want,)


def _unsaved(handler: Saved) -> str | None:
    no_data = handler._no_data.items()
    return next((why for name, why in no_data if getattr(handler, name, None) is not None), handler._undeclared())


def record_of(entry: Entry, handler: Saved, buffers: bool = True) -> Record:
    """Return a record of the request of `entry`. Without `buffers`, its unread input and unsent output are left out.

    The caller has asked `why_not_movable`, or knows that the handler is data.
    """
    now = entry.table.now
    handler_state, values, told_of_end = handler._save()
    return Record(
        id=entry.id,
        server=address_text(getattr(entry.server, "server_address", None)),
        handler=handler_name(handler),
        version=handler.state_version,
        handler_state=handler_state,
        fields=values,
        told_of_end=told_of_end,
        state=entry.state.name,
        want=entry.want,
        result=entry.result if buffers else MISSING,
        timeout_s=entry.timeout,
        deadline_s=_left(entry.deadline, now),
        peer=entry.peer,
        local=entry.local,
        unread=entry.input.save() if buffers else {},
        unsent=tuple(map(_copy_of, entry.output.pieces)) if buffers else (),
        reach=save_reach(entry.reach, now) if buffers and entry.reach is not None else None,
        bytes_in=entry.bytes_in,
        bytes_in_when_armed=entry.bytes_in_when_armed,
        bytes_out=entry.bytes_out,
        steps=entry.steps,
        moves=entry.moves,
        age_s=now - entry.created_at,
        begun_s=None if entry.began_at is None else now - entry.began_at,
        idle_s=now - entry.active_at,
    )


def not_movable(entry: Entry, reason: str) -> NotMovable:
    """Return the error that says why the request of `entry` can't move."""
    error = NotMovable(f"request {entry.id} of {handler_name(entry.handler)} can't be recorded now: {reason}")
    error.reason = reason
    return error


def restore(record: Record, entry: Entry, handler: Saved, made_at: float) -> None:
    """Fill a new `entry` with the request of `record`. The entry is MOVING until it is thawed.

    The record was made at `made_at`, by the clock of the entry's table. So the time since then counts.
    """
    handler._restore((record.handler_state, dict(record.fields), record.told_of_end), made_at)
    if record.unread:
        restore_input(entry, record.unread)
    for piece in record.unsent:
        append_piece(entry, piece)
    entry.want = wants.NOTHING if record.want is None else record.want
    entry.result = record.result
    entry.timeout = record.timeout_s
    entry.deadline = _at(record.deadline_s, made_at)
    entry.bytes_in, entry.bytes_out, entry.steps = record.bytes_in, record.bytes_out, record.steps
    entry.bytes_in_when_armed = record.bytes_in_when_armed
    entry.created_at, entry.active_at = made_at - record.age_s, made_at - record.idle_s
    entry.began_at = _at(None if record.begun_s is None else -record.begun_s, made_at)
    if record.reach is not None:
        restore_reach(entry, record.reach, made_at)
    entry.advance(Event.FROZEN)


def restore_input(entry: Entry, saved: Mapping[str, Any]) -> None:
    """Have the input of a new `entry` hold what `save` returned. An empty one is shared still."""
    if entry.input is not NO_INPUT or saved != NO_INPUT.save():
        entry.own_input().restore(saved)


def append_piece(entry: Entry, piece: Any) -> None:
    """Add a piece of a record's output to the output of `entry`."""
    if type(piece) is FileSlice:
        entry.output.append_file(piece)
    elif isinstance(piece, EndOfOutput):
        entry.output.append_end()
    else:
        entry.output.append(piece)


def _copy_of(piece: Any) -> Any:
    """Return a piece of output that the kernel does not shorten while it takes the output."""
    if type(piece) is FileSlice:
        return FileSlice(piece.file, piece.offset, piece.remaining)
    return piece if piece is END else bytes(piece)


_KEPT = ("turn", "end_told", "peer_ended", "output_ended", "sent", "mistakes")


def save_reach(reach: Reach, now: float) -> dict[str, Any]:
    """Return what a request has beside its client, without its connections, as plain data."""
    own: dict[str, Any] = {name: getattr(reach, name) for name in _KEPT}
    timed = {"until_s": _left(reach.until, now), "write_until_s": _left(reach.write_until, now)}
    return own | timed | {"told": list(reach.told)}


def restore_reach(entry: Entry, saved: Mapping[str, Any], now: float) -> None:
    """Give `entry`, whose want is set, what `save_reach` returned when the time was `now`."""
    reach = entry.reach = entry.reach or Reach()
    for name in _KEPT:
        setattr(reach, name, saved[name])
    reach.until, reach.write_until = _at(saved["until_s"], now), _at(saved["write_until_s"], now)
    reach.told.extend(saved["told"])
    sleeps = [each.wakes_at for each in _each_want(entry.want) if type(each) is Sleeping]
    reach.wakes_at = min(sleeps, default=inf)


def _left(at: float | None, now: float) -> float | None:
    return None if at is None else at - now


def _at(seconds: float | None, now: float) -> float | None:
    return None if seconds is None else now + seconds
