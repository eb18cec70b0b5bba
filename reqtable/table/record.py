"""A request as data: its `Record`, and a record as bytes.

A record has all of a request that is not bound to a process: what its handler holds, what it waits for, how long it may
wait, what it has read and not sent. It has no socket, and no clock: times are seconds from now.

How values become bytes is the caller's to say. The executor policy pickles; another caller may take plain data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any, Protocol

from reqtable.table import engine_wants, wants
from reqtable.table.buffers import FileSlice
from reqtable.table.errors import HandlerError
from reqtable.table.snapshot import handler_name
from reqtable.table.states import TRANSITIONS, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import Want

VERSION = 1
_HEAD = b"reqtable record %d\n"

# What takes an entry to each state from RUNNING.
_EVENTS = {
    after: event for event, after in TRANSITIONS[State.RUNNING].items() if event not in (Event.RELEASED, Event.LOST)
}
_OURS = {
    name: each
    for module in (wants, engine_wants)
    for name, each in vars(module).items()
    if isinstance(each, type) and issubclass(each, Want)
}


class Saved(Protocol):
    """A handler that is data: a `StateRequestHandler`."""

    def _save(self) -> tuple[str | None, dict[str, Any], bool]:
        """The name of its state, its fields, and whether it was told of the end of file."""

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool]) -> None:
        """Go on where `_save` was called."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request. `_s` is seconds; a time that is not set is None."""

    handler: str  # the name of its class
    handler_state: str | None  # None: its first step has not run
    fields: Mapping[str, Any]
    told_of_end: bool  # the handler knows of the end of file
    state: str  # of its row, by name
    want: Want[Any] | None
    timeout_s: float | None
    deadline_s: float | None  # left until its deadline
    wakes_in_s: float | None  # left of its sleep
    peer: Any
    local: Any
    unread: Mapping[str, Any]  # its input, as `Input.save` has it
    unsent: tuple[bytes, ...]
    bytes_in: int
    bytes_out: int
    steps: int
    age_s: float
    idle_s: float


def record_of(entry: Entry, handler: Saved, buffers: bool = True) -> Record:
    """The request of `entry`, as it is now. Without `buffers`, what it has read and not sent is left out.

    Raises HandlerError while a file is being sent, which is no data.
    """
    now = entry.table.now
    handler_state, values, told_of_end = handler._save()
    pieces = entry.output.pieces if buffers else []
    if any(isinstance(piece, FileSlice) for piece in pieces):
        raise HandlerError(f"{handler_name(handler)}: send_file() sends a file, which can't be part of a record")
    return Record(
        handler=handler_name(handler),
        handler_state=handler_state,
        fields=values,
        told_of_end=told_of_end,
        state=entry.state.name,
        want=entry.want,
        timeout_s=entry.timeout,
        deadline_s=_left(entry.deadline, now),
        wakes_in_s=_left(entry.wakes_at, now),
        peer=entry.peer,
        local=entry.local,
        unread=entry.input.save() if buffers else {},
        unsent=tuple(bytes(piece) for piece in pieces),
        bytes_in=entry.bytes_in,
        bytes_out=entry.bytes_out,
        steps=entry.steps,
        age_s=now - entry.created_at,
        idle_s=now - entry.active_at,
    )


def restore(record: Record, entry: Entry, handler: Saved) -> None:
    """Have `entry`, a new one, be the request of the record, in the state of the record.

    Its deadline is set, and not armed: that, and what the selector watches, is the loop's.
    """
    now = entry.table.now
    handler._restore((record.handler_state, dict(record.fields), record.told_of_end))
    if record.unread:
        entry.input.restore(record.unread)
    for piece in record.unsent:
        entry.output.append(piece)
    entry.want = wants.NOTHING if record.want is None else record.want
    entry.timeout = record.timeout_s
    entry.deadline = _at(record.deadline_s, now)
    entry.wakes_at = _at(record.wakes_in_s, now)
    entry.bytes_in, entry.bytes_out, entry.steps = record.bytes_in, record.bytes_out, record.steps
    entry.created_at, entry.active_at = now - record.age_s, now - record.idle_s
    state = State[record.state]
    if state is not State.OPENING:
        entry.advance(Event.OPENED)
    if state is not State.RUNNING and state is not State.OPENING:
        entry.advance(_EVENTS[state])


def to_bytes(record: Record, encode: Callable[[Any], bytes]) -> bytes:
    """The record as bytes. `encode` is given lists, dicts, text, bytes and numbers, and the values of the fields."""
    plain = {each.name: getattr(record, each.name) for each in fields(record)}
    plain["want"] = None if record.want is None else _plain_want(record.want)
    return _HEAD % VERSION + encode(plain)


def from_bytes(data: bytes, decode: Callable[[bytes], Any]) -> Record:
    """The record that `to_bytes` made bytes of. Raises ValueError for bytes of another version, or of none."""
    head, found, body = data.partition(b"\n")
    if not found or head + found != _HEAD % VERSION:
        raise ValueError(f"not a record of version {VERSION}: it begins with {data[:24]!r}")
    plain = decode(body)
    want = plain["want"]
    plain["want"] = None if want is None else _want_of(*want)
    plain["unsent"] = tuple(plain["unsent"])
    return Record(**plain)


def _plain_want(want: Want[Any]) -> tuple[str, dict[str, Any]]:
    """The class of a want, by its name, and its fields."""
    if not is_dataclass(want):
        return "", {"want": want}  # of a program's own: whether that can be encoded is the caller's to say
    kind = type(want)
    name = kind.__name__ if _OURS.get(kind.__name__) is kind else f"{kind.__module__}:{kind.__qualname__}"
    return name, {each.name: getattr(want, each.name) for each in fields(want)}


def _want_of(name: str, values: Mapping[str, Any]) -> Want[Any]:
    if not name:
        return values["want"]  # type: ignore[no-any-return]
    if ":" in name:
        module, _, qualname = name.partition(":")
        kind: Any = import_module(module)
        for part in qualname.split("."):
            kind = getattr(kind, part)
    else:
        kind = _OURS[name]
    want: Want[Any] = kind(**values)
    return want


def _left(at: float | None, now: float) -> float | None:
    return None if at is None else at - now


def _at(seconds: float | None, now: float) -> float | None:
    return None if seconds is None else now + seconds
