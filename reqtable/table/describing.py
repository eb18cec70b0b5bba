"""Describes a record for a person, as plain data. This needs no class of the program.

Anybody may have written the bytes. So nothing in them is believed: values that must be of a kind are checked, and all
other values become short text.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from reqtable.table import plain
from reqtable.table.addresses import address_text, printable
from reqtable.table.errors import ReqtableError
from reqtable.table.plain import Described
from reqtable.table.saving import Head, body_of, head_of

HEAD_BYTES = 512  # of unread input, and of unsent output
_MOST = 2.0**63  # of a number
_NUMBERS = ("timeout_s", "deadline_s", "age_s", "idle_s", "bytes_in", "bytes_out", "steps", "moves")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 400
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 50


def description_of(data: bytes) -> dict[str, Any]:
    """Return what a record says, as plain data. Raises ReqtableError if the bytes are no record of this format."""
    head = head_of(data)
    try:
        return _description(head, body_of(plain.describe(head.body, _KINDS)))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ReqtableError(f"not a record: {type(error).__name__}: {error}") from None


def _description(head: Head, body: Mapping[str, Any]) -> dict[str, Any]:
    unread, reach = body["unread"], body["reach"]
    return {
        "format": head.format,
        "id": _number(head.id),
        "server": printable(head.server),
        "handler": printable(head.handler),
        "version": _number(head.version),
        "handler_state": None if head.handler_state is None else printable(head.handler_state),
        "state": printable(head.state),
        "peer": address_text(head.peer),
        "local": address_text(head.local),
        "waits_for": None if body["want"] is None else _text(body["want"]),
        **{name: _number(body[name]) for name in _NUMBERS},
        "end_told": bool(body["told_of_end"]),
        "fields": {printable(name): _text(value) for name, value in body["fields"].items()},
        "told": [] if reach is None else [_text(each) for each in reach["told"]],
        "unread": _bytes([*unread.get("datagrams", ()), unread["data"]]),
        "unread_ended": bool(unread["ended"]),
        "unsent": _bytes([each for each in body["unsent"] if isinstance(each, bytes)]),
        "unsent_else": [_text(each) for each in body["unsent"] if not isinstance(each, bytes)],
        "connections": [_connection(each) for each in head.connections],
        "files": [{"name": _text(each["name"]), "mode": _text(each["mode"])} for each in head.files],
    }


def _connection(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _number(saved["id"]),
        "address": printable(saved["target"][3]),
        "unread": _bytes([saved["unread"]["data"]]),
        "unsent": _bytes([each for each in saved["unsent"] if isinstance(each, bytes)]),
    }


def _bytes(pieces: list[Any]) -> dict[str, Any]:
    """Return how many bytes there are, and the first ones as text: a character for each byte."""
    head = b"".join(bytes(memoryview(each)[:HEAD_BYTES]) for each in pieces)[:HEAD_BYTES]
    return {"bytes": sum(map(len, pieces)), "head": head.decode("latin-1")}


def _number(value: Any) -> float | None:
    if value is None or (type(value) in (int, float) and abs(value) < _MOST):
        return value  # type: ignore[no-any-return]
    raise ReqtableError(f"not a record: {_SHORT.repr(value)} is no number")


def _text(value: Any) -> str:
    return printable(_SHORT.repr(value))


def _want(value: Any) -> Described:
    """Return a stand-in for a want, under the name of the function that makes such a want."""
    name, values = value
    kind = name.rpartition(":")[2].rpartition(".")[2].lower()
    return Described(kind, values)


# Stand-ins for the values that the codec does not know.
_KINDS = {
    "want": _want,
    "slice": lambda value: Described("file", {"number": value[0], "offset": value[1], "remaining": value[2]}),
    "end": lambda _: Described("END"),
    "missing": lambda _: Described("MISSING"),
    "file": lambda number: Described("file", {"number": number}),
    "connection": lambda place: Described("connection", {"place": place}),
}
