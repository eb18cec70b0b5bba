"""A request as data: its `Record`, and a record as bytes.

A record has everything of a request that is not bound to a process: its handler's fields, its want, its timeouts, its
unread input and its unsent output. It has no socket and no clock: its times are in seconds from now.

The caller chooses how values become bytes. The executor policy pickles them; another caller may allow only plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Any, ClassVar, Protocol

from reqtable.table import engine_wants, reaching, wants
from reqtable.table.engine_wants import Sleeping
from reqtable.table.errors import NotMovable
from reqtable.table.output import FileSlice
from reqtable.table.snapshot import handler_name
from reqtable.table.states import TRANSITIONS, Event, State
from reqtable.table.table import Entry
from reqtable.table.wants import Want

VERSION = 1
_HEAD = b"reqtable record %d\n"

# For each state, the event that leads there from RUNNING.
_EVENTS = {
    after: event for event, after in TRANSITIONS[State.RUNNING].items() if event not in (Event.RELEASED, Event.LOST)
}
_OURS = {
    name: each
    for module in (wants, engine_wants, reaching)
    for name, each in vars(module).items()
    if isinstance(each, type) and issubclass(each, Want)
}


class Saved(Protocol):
    """The part of a handler that a record needs. Only a `StateRequestHandler` has it."""

    _no_data: ClassVar[Mapping[str, str]]  # the attributes that are no data, each with what to say if it is not None

    def _save(self) -> tuple[str | None, dict[str, Any], bool]:
        """Return the name of its state, its fields, and whether it was told of the end of file."""

    def _restore(self, saved: tuple[str | None, dict[str, Any], bool]) -> None:
        """Set the handler to what `_save` returned."""


@dataclass(frozen=True, slots=True)
class Record:
    """Holds the data of one request. `_s` is seconds; a time that is not set is None."""

    handler: str  # the name of its class
    handler_state: str | None  # None: its first step has not run
    fields: Mapping[str, Any]
    told_of_end: bool  # the handler knows of the end of file
    state: str  # the name of the entry's state
    want: Want[Any] | None
    timeout_s: float | None
    deadline_s: float | None  # left until its deadline
    wakes_in_s: float | None  # left of its sleep
    peer: Any
    local: Any
    unread: Mapping[str, Any]  # its input, as returned by `Input.save`
    unsent: tuple[bytes, ...]
    bytes_in: int
    bytes_out: int
    steps: int
    age_s: float
    begun_s: float | None  # how long `request_timeout_s` has run
    idle_s: float


def record_of(entry: Entry, handler: Saved, buffers: bool = True) -> Record:
    """Return a record of the request of `entry`. Without `buffers`, its unread input and unsent output are left out.

    Raises NotMovable if the request holds something that is no data, such as a file that is still to be sent.
    """
    now = entry.table.now
    want = entry.want
    pieces = entry.output.pieces if buffers else []
    reason = next((why for name, why in handler._no_data.items() if getattr(handler, name, None) is not None), None)
    if reason is None and any(isinstance(piece, FileSlice) for piece in pieces):
        reason = "a file is half sent"
    if reason is not None:
        raise NotMovable(f"request {entry.id} of {handler_name(handler)} can't be recorded now: {reason}")
    handler_state, values, told_of_end = handler._save()
    return Record(
        handler=handler_name(handler),
        handler_state=handler_state,
        fields=values,
        told_of_end=told_of_end,
        state=entry.state.name,
        want=wants.Sleep(want.seconds) if type(want) is Sleeping else want,
        timeout_s=entry.timeout,
        deadline_s=_left(entry.deadline, now),
        wakes_in_s=want.wakes_at - now if type(want) is Sleeping else None,
        peer=entry.peer,
        local=entry.local,
        unread=entry.input.save() if buffers else {},
        unsent=tuple(bytes(piece) for piece in pieces),
        bytes_in=entry.bytes_in,
        bytes_out=entry.bytes_out,
        steps=entry.steps,
        age_s=now - entry.created_at,
        begun_s=None if entry.began_at is None else now - entry.began_at,
        idle_s=now - entry.active_at,
    )


def restore(record: Record, entry: Entry, handler: Saved) -> None:
    """Fill a new `entry` with the request of `record`, and bring it to the record's state.

    The deadline is set but not armed. The loop has to arm it, and to have the selector watch the socket.
    """
    now = entry.table.now
    handler._restore((record.handler_state, dict(record.fields), record.told_of_end))
    if record.unread:
        entry.input.restore(record.unread)
    for piece in record.unsent:
        entry.output.append(piece)
    entry.want = wants.NOTHING if record.want is None else record.want
    if record.wakes_in_s is not None and isinstance(record.want, wants.Sleep):
        entry.want = Sleeping(record.want.seconds, now + record.wakes_in_s)
    entry.timeout = record.timeout_s
    entry.deadline = _at(record.deadline_s, now)
    entry.bytes_in, entry.bytes_out, entry.steps = record.bytes_in, record.bytes_out, record.steps
    entry.created_at, entry.active_at = now - record.age_s, now - record.idle_s
    entry.began_at = None if record.begun_s is None else now - record.begun_s
    state = State[record.state]
    if state is not State.OPENING:
        entry.advance(Event.OPENED)
    if state is not State.RUNNING and state is not State.OPENING:
        entry.advance(_EVENTS[state])


def to_bytes(record: Record, encode: Callable[[Any], bytes]) -> bytes:
    """Return the record as bytes. `encode` gets lists, dicts, text, bytes, numbers, and the values of the fields."""
    plain = {each.name: getattr(record, each.name) for each in fields(record)}
    plain["want"] = None if record.want is None else _plain_want(record.want)
    return _HEAD % VERSION + encode(plain)


def from_bytes(data: bytes, decode: Callable[[bytes], Any]) -> Record:
    """Return the record that `to_bytes` encoded. Raises ValueError for another version, and for any other bytes."""
    head, found, body = data.partition(b"\n")
    if not found or head + found != _HEAD % VERSION:
        raise ValueError(f"not a record of version {VERSION}: it begins with {data[:24]!r}")
    plain = decode(body)
    want = plain["want"]
    plain["want"] = None if want is None else _want_of(*want)
    plain["unsent"] = tuple(plain["unsent"])
    return Record(**plain)


def _plain_want(want: Want[Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of the want's class, and the want's fields."""
    if not is_dataclass(want):
        return "", {"want": want}  # a program's own want: `encode` decides whether it can be encoded
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
