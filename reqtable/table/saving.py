"""A record of a request as bytes, and back.

The bytes begin with a head, which says what the record needs: its format, its server, and which sockets and files go
with it. Then comes the body, which can be read once these are there: the fields may refer to them.

Objects that are bound to a process go beside the bytes, in this order: the socket of the client (none for a datagram
session), the sockets of its outgoing connections, the files that its output or its fields have.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

from reqtable.table import engine_wants, plain, reaching, wants
from reqtable.table.connecting import Target
from reqtable.table.connection import ConnectionRow
from reqtable.table.engine_wants import Sleeping
from reqtable.table.errors import NotMovable, ReqtableError
from reqtable.table.input import MISSING
from reqtable.table.moved_files import check_file, save_file
from reqtable.table.output import END, EndOfOutput, FileSlice
from reqtable.table.reaching import Either, OfConnection
from reqtable.table.record import Record, append_piece, not_movable, record_of, restore_input, why_not_movable
from reqtable.table.saved import SavedFile, SavedReach, SavedRow, check_mapping, check_pieces, checked
from reqtable.table.shapes import shape_of
from reqtable.table.table import Entry
from reqtable.table.want import Want

FORMAT = 1
_OURS: dict[str, type[Want[Any]]] = {
    name: each
    for module in (wants, engine_wants, reaching)
    for name, each in vars(module).items()
    if isinstance(each, type) and issubclass(each, Want)
}
# Wants that the engine compares by identity.
_SINGLE = {"Ended": engine_wants.ENDED}


@dataclass(frozen=True, slots=True)
class Head:
    """Holds what can be read of a record without its sockets. Times are in seconds."""

    format: int
    boot: str  # which start of the machine `time` belongs to
    time: float  # when the record was made, by the clock of its table
    id: int
    server: str
    handler: str
    version: int
    state: str  # of the entry
    handler_state: str | None
    peer: Any
    local: Any
    control: list[Any] | None  # of a datagram session: how its answers leave from `local`; None: it is a stream
    connections: tuple[dict[str, Any], ...]
    files: tuple[dict[str, Any], ...]
    body: bytes

    @property
    def attachments(self) -> int:
        """How many sockets and files go with the record."""
        return (self.control is None) + len(self.connections) + len(self.files)


_IN_HEAD = tuple(each.name for each in fields(Head))
_IN_BODY = tuple(each.name for each in fields(Record) if each.name not in _IN_HEAD)
_IN_BOTH = tuple(each.name for each in fields(Record) if each.name in _IN_HEAD)


@dataclass(frozen=True, slots=True)
class Movable:
    """A request as bytes, with what goes beside them: objects that have a `fileno()`."""

    record: bytes
    attachments: tuple[Any, ...]


def save(entry: Entry, boot: str) -> Movable:
    """Return the request of `entry`, which goes on. Raises NotMovable, with the reason, if it can't move now."""
    reason = why_not_movable(entry)
    if reason is not None:
        raise not_movable(entry, reason)
    record = record_of(entry, entry.handler)
    attached = _Attached(entry)
    rows = attached.rows
    try:
        body = plain.encode([getattr(record, name) for name in _IN_BODY], attached.attach)
        head = Head(
            FORMAT,
            boot,
            entry.table.now,
            record.id,
            record.server,
            record.handler,
            record.version,
            record.state,
            record.handler_state,
            entry.peer,
            entry.local,
            None if entry.input.is_stream else list(getattr(entry.transport.request, "control", [])),
            tuple([_save_row(row) for row in rows]),
            tuple([save_file(file) for file in attached.files]),
            body,
        )
        data = plain.encode([getattr(head, name) for name in _IN_HEAD])
    except (NotMovable, OSError, ValueError) as error:
        raise not_movable(entry, _blamed(record, entry) or str(error)) from error
    own = (entry.transport.request,) if entry.input.is_stream else ()
    return Movable(data, (*own, *(row.transport.request for row in rows), *attached.files))


def why_not_saved(entry: Entry) -> str | None:
    """Return why the request of `entry` can't move now, also if it holds something that is no plain data; else None.

    Its unread input and its unsent output, which may be long, are left out.
    """
    reason = why_not_movable(entry)
    if reason is not None:
        return reason
    record = record_of(entry, entry.handler, buffers=False)
    told = [] if entry.reach is None else list(entry.reach.told)
    try:
        plain.encode([record.want, entry.result, told], _Attached(entry).attach)
    except (NotMovable, OSError, ValueError) as error:
        return str(error)
    return _blamed(record, entry)


def head_of(data: bytes) -> Head:
    """Return the head of a record. Raises ReqtableError if the bytes are no record of this format."""
    found = plain.describe(data)
    if not isinstance(found, list) or not found or found[0] != FORMAT:
        of = f", but of format {found[0]!r}" if isinstance(found, list) and found else ""
        raise ReqtableError(f"not a record of format {FORMAT}{of}")
    if len(found) != len(_IN_HEAD):
        raise ReqtableError(f"not a record of format {FORMAT}: its head has other values")
    head: Head = checked(Head, dict(zip(_IN_HEAD, found, strict=True)))
    for each in head.connections:
        check_mapping("connection", each, SavedRow)
    for each in head.files:
        check_mapping("file", each, SavedFile)
    return head


def read(head: Head, handler_class: Any, made_at: float, attached: Attachments | None = None) -> Record:
    """Return the record of `head`, for a handler class that may be newer. Raises ReqtableError if it can't be used.

    The record was made at `made_at`, by the clock of the table that it is for. Without `attached`, this only finds out
    whether the record can be read: connections and files in it are None.
    """
    is_current = head.version == handler_class.state_version
    found = plain.decode(head.body, _Resolver(handler_class, made_at, attached).kinds(), lenient=not is_current)
    values = body_of(found)
    for name in _IN_BOTH:
        values[name] = getattr(head, name)
    record: Record = checked(Record, values)
    if record.reach is not None:
        check_mapping("reach", record.reach, SavedReach)
    check_pieces(record.unsent)
    if not is_current:
        handler_state, own = handler_class._migrated(record.id, record.version, record.handler_state, record.fields)
        record = replace(record, handler_state=handler_state, fields=own)
    handler_class._check_saved(record.version, record.handler_state, record.fields)
    return record


def body_of(found: Any) -> dict[str, Any]:
    """Return what is decoded of a body, by the names in a `Record`. Raises ReqtableError if it is no body."""
    if not isinstance(found, list) or len(found) != len(_IN_BODY):
        raise ReqtableError(f"not a record of format {FORMAT}: its body has other values")
    return dict(zip(_IN_BODY, found, strict=True))


class Attachments(NamedTuple):
    """Holds the outgoing connections and the files of a record, in the process that goes on with its request."""

    rows: Sequence[ConnectionRow]
    files: Sequence[Any]


# -- writing ----------------------------------------------------------------------------------------------------------


class _Attached:
    """Collects what goes beside a record, and writes what the codec does not know."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self.rows: list[ConnectionRow] = list(entry.reach.connections) if entry.reach is not None else []  # type: ignore[arg-type]
        self.files: list[Any] = []

    def attach(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, Want):
            return "want", self._want(value)
        if isinstance(value, wants.Failure):
            raise NotMovable("a call has failed, and its step has not been told yet")
        if isinstance(value, FileSlice):
            return "slice", [self._file(value.file), value.offset, value.remaining]
        if isinstance(value, EndOfOutput):
            return "end", None
        if value is MISSING:
            return "missing", None
        if isinstance(value, io.IOBase):
            return "file", self._file(value)
        row = getattr(value, "row", None)
        if isinstance(row, ConnectionRow):
            return "connection", self._row(row)
        return None

    def _row(self, row: Any) -> int:
        if row in self.rows:
            return self.rows.index(row)
        if row.parent is None or row.parent is self._entry:
            raise NotMovable(f"it has a connection to {row.address} that is over")
        raise NotMovable(f"it has the connection to {row.address} of request {row.parent.id}")

    def _file(self, file: Any) -> int:
        for number, each in enumerate(self.files):
            if each is file:
                return number
        check_file(file)
        self.files.append(file)
        return len(self.files) - 1

    def _want(self, want: Want[Any]) -> Any:
        kind = type(want)
        if isinstance(want, Sleeping):
            return ["Sleeping", {"seconds": want.seconds, "left": want.wakes_at - self._entry.table.now}]
        if isinstance(want, Either):
            return ["Either", {"wants": want.wants}]
        if isinstance(want, OfConnection):
            return ["OfConnection", {"want": want.want, "row": self._row(want.row)}]
        if isinstance(want, wants.Posted):
            raise NotMovable(f"it waits for {want!r}, which runs in this process")
        if not is_dataclass(want):
            raise NotMovable(f"it waits for {want!r}, which is no plain data: make its class a dataclass")
        name = kind.__name__ if _OURS.get(kind.__name__) is kind else f"{kind.__module__}:{kind.__qualname__}"
        values = {each.name: getattr(want, each.name) for each in fields(want)}
        if isinstance(want, wants.Parsed):
            values["parse"] = _function_name(type(self._entry.handler), want.parse)
        return [name, values]


def _blamed(record: Record, entry: Entry) -> str | None:
    """Return which field of a handler is no plain data, and why; None if all are."""
    for name, value in record.fields.items():
        try:
            plain.encode(value, _Attached(entry).attach)
        except (NotMovable, OSError, ValueError) as error:
            return f"its field {name!r}: {error}"
    return None


def _save_row(row: ConnectionRow) -> dict[str, Any]:
    """Return an outgoing connection as plain data. Its socket goes beside it."""
    if any(type(piece) is FileSlice for piece in row.output.pieces):
        raise NotMovable(f"a file is half sent to {row.address}")
    target = row.target
    return {
        "id": row.id,
        "target": [target.scheme, target.host, target.port, target.text],
        "is_reusable": row.key is not None,
        "peer": row.peer,
        "local": row.local,
        "unread": row.input.save(),
        "unsent": [None if piece is END else bytes(piece) for piece in row.output.pieces],
        "end_told": row.end_told,
        "output_ended": row.output_ended,
        "bytes_in": row.bytes_in,
        "bytes_out": row.bytes_out,
        "age_s": row.table.now - row.created_at,
        "write_s": None if row.deadline is None else row.deadline - row.table.now,
    }


# -- reading ----------------------------------------------------------------------------------------------------------


class _Resolver:
    """Reads what the codec does not know, for one handler class."""

    def __init__(self, handler_class: Any, made_at: float, attached: Attachments | None) -> None:
        self._handler_class = handler_class
        self._made_at = made_at
        self._attached = attached

    def kinds(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "want": self._want,
            "slice": self._slice,
            "end": lambda _: END,
            "missing": lambda _: MISSING,
            "file": self._file,
            "connection": self._connection,
        }

    def _file(self, number: int) -> Any:
        return None if self._attached is None else self._attached.files[number]

    def _slice(self, value: list[int]) -> FileSlice:
        number, offset, remaining = value
        if not (type(offset) is type(remaining) is int and offset >= 0 < remaining):
            raise ReqtableError(f"not a record: {remaining!r} bytes of a file from {offset!r} can't be sent")
        return FileSlice(self._file(number), offset, remaining)

    def _row(self, place: int) -> Any:
        return None if self._attached is None else self._attached.rows[place]

    def _connection(self, place: int) -> Any:
        row = self._row(place)
        return None if row is None else row.connection

    def _want(self, value: list[Any]) -> Want[Any]:
        name, values = value
        if name in _SINGLE:
            return _SINGLE[name]
        if name == "Sleeping":
            return Sleeping(values["seconds"], self._made_at + float(values["left"]))
        if name == "Either":
            return Either(tuple([_checked_want(each) for each in values["wants"]]), True)
        if name == "OfConnection":
            return OfConnection(_checked_want(values["want"]), self._row(values["row"]))
        kind: Any = _OURS.get(name) or plain.class_named(name)
        shape = None if kind is None or not issubclass(kind, Want) or issubclass(kind, wants.Posted) else shape_of(kind)
        if shape is None or shape.refusal:
            raise ReqtableError(f"the want {name} is not there")
        if kind is wants.Parsed:
            values = {**values, "parse": self._function(values["parse"])}
        misfit = shape.misfit(values)
        if misfit is not None:
            raise ReqtableError(misfit)
        made: Want[Any] = shape.make(values)
        return made

    def _function(self, name: str) -> Any:
        found = _function_named(self._handler_class, name)
        if found is None:
            raise ReqtableError(f"{name}, the function of parsed(…), is not at the top of the handler's module")
        return found


def _checked_want(value: Any) -> Want[Any]:
    if not isinstance(value, Want) or isinstance(value, Either):
        raise ReqtableError(f"not a record: it waits for a {type(value).__name__}")
    return value


def _function_name(handler_class: type, function: Any) -> str:
    """Return the name by which a function is found in the modules of a handler class. Raises NotMovable."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    if _function_named(handler_class, name) is not function:
        shown = getattr(function, "__name__", function)
        raise NotMovable(f"the function of parsed({shown}) is not at the top of the handler's module")
    return name


def _function_named(handler_class: type, name: str) -> Any:
    """Return the function `module:name` if it is defined in a module of a handler class; else None."""
    module, _, rest = name.partition(":")
    if module not in {base.__module__ for base in handler_class.__mro__}:
        return None
    found = vars(sys.modules[module]).get(rest)
    return found if isinstance(found, FunctionType) and found.__module__ == module else None


# -- outgoing connections and files ------------------------------------------------------------------------------------


def fill_row(row: ConnectionRow, saved: Mapping[str, Any], made_at: float) -> None:
    """Fill the row of an outgoing connection, which has its transport, with what `save` wrote of it at `made_at`."""
    check_pieces(END if piece is None else piece for piece in saved["unsent"])
    row.peer, row.local = saved["peer"], saved["local"]
    restore_input(row, saved["unread"])
    for piece in saved["unsent"]:
        append_piece(row, END if piece is None else piece)
    row.end_told, row.output_ended = saved["end_told"], saved["output_ended"]
    row.bytes_in, row.bytes_out = saved["bytes_in"], saved["bytes_out"]
    row.created_at = made_at - saved["age_s"]
    if saved["write_s"] is not None:
        row.deadline = made_at + saved["write_s"]


def target_of(saved: Mapping[str, Any]) -> Target:
    """Return the target of a connection that `save` has written."""
    return Target(*saved["target"])
