"""The contents of a row's record in the journal: what never changes, packed once, and what a step may change.

Most values are None, numbers, text or bytes, which MessagePack writes at once. Other plain data goes through
`reqtable.table.plain`, which takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from msgspec import msgpack

from reqtable.table import plain
from reqtable.table.engine_wants import ENDED, TURN
from reqtable.table.errors import ReqtableError
from reqtable.table.reaching import Either
from reqtable.table.want import Want
from reqtable.table.wants import NOTHING

SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})
_write: Final[Callable[[Any], bytes]] = msgpack.Encoder().encode
_read: Final[Callable[[bytes], Any]] = msgpack.Decoder().decode
# Wants that are compared by identity.
_MARKS: Final[dict[str, Want[Any]]] = {"ended": ENDED, "turn": TURN, "nothing": NOTHING}
_MARK_OF: Final = {id(want): mark for mark, want in _MARKS.items()}


@dataclass(slots=True)
class Origin:
    """Says where a request comes from. It does not change. The bytes are those before the connection was its."""

    server: int  # the index of its server among those of the engine
    handler: str
    peer: Any
    local: Any
    created_at: float
    received_before: int
    sent_before: int


@dataclass(slots=True)
class Progress:
    """Says how far a request has come. Times are by the clock that all processes of a machine share."""

    lost: str  # why the request can't be continued; "": it can. Then nothing else is known
    fields: Any = ()  # their values in the order of their names; or, if not all are set, by name
    want: Want[Any] | None = None  # None: the one that the state declares
    state: str | None = None  # of its handler; None: no step of it was done
    told_of_end: bool = False
    timeout: float | None = None
    ended: bool = False  # the end of the input was seen
    unread: bytes = b""
    unsent: Sequence[bytes] = ()
    ends_output: bool = False  # after `unsent`, the output ends
    is_simple: bool = False  # later steps may have changed nothing but the totals: then they have written no record
    attempt: int = 0
    steps: int = 0
    began_at: float | None = None
    moves: int = 0
    made_at: float = 0.0
    reach: Any = None  # as `save_reach` returned it at time 0
    input: Any = None  # what its input has beside unread bytes


def pack_origin(origin: Origin) -> bytes:
    """Return what never changes, with its length before it."""
    data = _write([getattr(origin, name) for name in Origin.__dataclass_fields__])
    return len(data).to_bytes(4, "big") + data


def pack_lost(origin: bytes, why: str) -> bytes:
    """Return the contents of the record of a request that can't be continued now."""
    return origin + _write((why,))


def pack(origin: bytes, fields: Any, are_scalars: bool, want: Want[Any] | None, changing: Sequence[Any]) -> bytes:
    """Return the contents of a record. `changing` has the other attributes of a Progress, from `state` on, in order.

    Raises NotMovable if a value is no plain data.
    """
    packed_want = None if want is None else _packed_want(want)
    if are_scalars:
        try:
            return origin + _write(("", fields, packed_want, *changing))
        except (OverflowError, UnicodeEncodeError):
            pass  # a number that is too large for MessagePack, or text that is no UTF-8
    return origin + _write(("", plain.encode(fields), packed_want, *changing))


def unpack(payload: bytes) -> tuple[bytes, Origin, Progress]:
    """Return what `pack` or `pack_lost` wrote, and the origin in its packed form, too. Raises ReqtableError."""
    try:
        end = 4 + int.from_bytes(payload[:4], "big")
        origin = Origin(*_read(payload[4:end]))
        origin.peer, origin.local = _address(origin.peer), _address(origin.local)
        progress = Progress(*_read(payload[end:]))
    except (TypeError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise ReqtableError(f"a record of the journal can't be read: {error}") from None
    if isinstance(progress.fields, bytes):
        progress.fields = plain.decode(progress.fields)
    if progress.want is not None:
        progress.want = _unpacked_want(progress.want)
    if progress.reach is not None:
        progress.reach = plain.decode(progress.reach)
    if progress.input is not None:
        progress.input = plain.decode(progress.input)
    return payload[:end], origin, progress


def _address(packed: Any) -> Any:
    return tuple(packed) if type(packed) is list else packed


def _packed_want(want: Want[Any]) -> str | bytes | list[Any]:
    if type(want) is Either:
        return [_packed_want(each) for each in want.wants]
    mark = _MARK_OF.get(id(want))
    return mark if mark is not None else plain.encode(want)


def _unpacked_want(packed: Any) -> Want[Any]:
    if isinstance(packed, list):
        return Either(tuple([_unpacked_want(each) for each in packed]), True)
    return _MARKS[packed] if isinstance(packed, str) else plain.decode(packed)
