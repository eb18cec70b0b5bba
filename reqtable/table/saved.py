"""The types of what a record has, and their check: the bytes of a record may be anything.

The fields of a handler are not checked. Their types are the program's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from math import isfinite
from types import NoneType
from typing import Any, TypedDict

from reqtable.table.errors import ReqtableError
from reqtable.table.output import EndOfOutput, FileSlice
from reqtable.table.want import Want


class SavedFile(TypedDict):
    """Says how a file of a request is opened again. See `reqtable.table.moved_files`."""

    name: str | bytes | None
    mode: str
    is_raw: bool
    position: int | None


class SavedRow(TypedDict):
    """Holds an outgoing connection."""

    id: int
    target: list[Any]
    is_reusable: bool
    peer: Any
    local: Any
    unread: dict[str, Any]
    unsent: list[Any]
    end_told: bool
    output_ended: bool
    bytes_in: int
    bytes_out: int
    age_s: float
    write_s: float | None


class SavedReach(TypedDict):
    """Holds what a request has beside its client, without the connections."""

    turn: int
    end_told: bool
    peer_ended: bool
    output_ended: bool
    sent: int
    mistakes: int
    until_s: float | None
    write_until_s: float | None
    told: list[Any]


_ANYTHING = (object,)
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, NoneType),
    "str": (str,),
    "str | None": (str, NoneType),
    "str | bytes | None": (str, bytes, NoneType),
    "bytes": (bytes,),
    "bool": (bool,),
    "float": (float, int),
    "float | None": (float, int, NoneType),
    "list[Any]": (list,),
    "list[Any] | None": (list, NoneType),
    "dict[str, Any]": (dict,),
    "dict[str, Any] | None": (dict, NoneType),
    "tuple[Any, ...]": (tuple,),
    "tuple[dict[str, Any], ...]": (tuple,),
    "Want[Any] | None": (Want, NoneType),
    "Any": _ANYTHING,
}


def checked(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return a `kind`, a dataclass, with these values. Raises ReqtableError if one has another type."""
    for name, kinds in _kinds_of(kind):
        value = values[name]
        if type(value) not in kinds or type(value) is float:
            _check(kind.__name__, name, value, kinds)
    return kind(**values)


def check_mapping(what: str, values: Any, kind: Any) -> None:
    """Raise ReqtableError if `values` is not a dict with exactly the keys and types of `kind`, a TypedDict."""
    if type(values) is not dict or values.keys() != kind.__annotations__.keys():
        raise ReqtableError(f"not a record: the data of its {what} has other keys")
    for name, kinds in _kinds_of(kind):
        _check(what, name, values[name], kinds)


def check_pieces(pieces: Iterable[Any]) -> None:
    """Raise ReqtableError if anything but pieces of output is among `pieces`."""
    for each in pieces:
        if type(each) not in (bytes, FileSlice, EndOfOutput):
            raise ReqtableError(f"not a record: a {type(each).__name__} is among the unsent output")


@lru_cache(maxsize=16)
def _kinds_of(kind: Any) -> tuple[tuple[str, tuple[type, ...]], ...]:
    """Return the types of the fields of a dataclass, or of the keys of a TypedDict."""
    if hasattr(kind, "__dataclass_fields__"):
        return tuple((each.name, _KINDS[str(each.type)]) for each in fields(kind))
    return tuple((name, _KINDS[hint.__forward_arg__]) for name, hint in kind.__annotations__.items())


def _check(what: str, name: str, value: Any, kinds: tuple[type, ...]) -> None:
    is_odd = type(value) is bool and bool not in kinds and kinds is not _ANYTHING  # a bool is an int, too
    if is_odd or not isinstance(value, kinds) or (type(value) is float and not isfinite(value)):
        raise ReqtableError(f"not a record: {name} of its {what.lower()} is a {type(value).__name__}")
