"""The head of an answer: its status line and its header fields, checked so that no value can end the head early."""

from __future__ import annotations

import re
import reprlib
import time
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from reqtable.http.head import TOKEN
from reqtable.http.known import Known
from reqtable.table.errors import HandlerError

FieldsLike = Mapping[str, str] | Iterable[tuple[str, str]]

_NAME = re.compile(TOKEN)
# Anything but control characters; a tab is allowed (RFC 9110, 5.5).
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_PHRASES = {int(each): each.phrase for each in HTTPStatus}
NO_BODY = {204, 205, 304}  # an answer with one of these, or with 1xx, has no body (RFC 9110, 6.4.1 and 15.3.6)
_SERVERS = {"connection", "content-length", "date", "server", "transfer-encoding"}


def pairs_of(fields: FieldsLike) -> list[tuple[str, str]]:
    """Return header fields as pairs. Raises HandlerError if one can't be sent, naming it."""
    return pairs_and_lines(fields)[0]


def pairs_and_lines(fields: FieldsLike) -> tuple[list[tuple[str, str]], list[tuple[str, str | None]]]:
    """Return header fields as pairs, and as lines. Raises HandlerError if one can't be sent, naming it.

    Beside each line is the name of the field in lower case, if the server may send that field, too; else None.
    """
    try:
        pairs = fields
        if type(pairs) is not list:
            pairs = list(fields.items() if isinstance(fields, Mapping) else fields)
        try:
            return pairs, [_LINES[each] for each in pairs]
        except TypeError:  # not hashable: a pair that is a list, or a value that is no text
            return pairs, [_line(each) for each in pairs]
    except (TypeError, ValueError):  # not iterable, or not by pairs
        raise HandlerError(f"header fields are a mapping, or pairs of texts, not {reprlib.repr(fields)}") from None


def has_type(pairs: list[tuple[str, str]]) -> bool:
    """Return whether there is a Content-Type among the fields."""
    return any(name.lower() == "content-type" for name, _ in pairs)


def check_status(status: int) -> None:
    """Raise HandlerError if `status` is not one that an answer can have."""
    if not isinstance(status, int) or not 100 <= status <= 999:
        raise HandlerError(f"the status of an answer is a number from 100 to 999, not {status!r}")


def bytes_of(body: bytes | bytearray | memoryview, function: str, mend: str) -> bytes:
    """Return what `function` was given as bytes. Raises HandlerError, with the mend, if it is of another type."""
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    raise HandlerError(f"{function} can't send {reprlib.repr(body)}: {mend}")


def line_of(name: str, value: str) -> str:
    """Return a header field as its line. Raises HandlerError if it can't be sent."""
    return _LINES[name, value][0]


def status_line(status: int, reason: str | None = None) -> str:
    """Return the status line of an answer. Raises HandlerError if it can't be sent."""
    return _status_line(status, reason)


def head_of(status: int, fields: Iterable[tuple[str, str]], reason: str | None = None) -> bytes:
    """Return the head of an answer, with its empty line. Raises HandlerError if a field can't be sent."""
    lines = [_status_line(status, reason), *[line for line, _ in pairs_and_lines(list(fields))[1]], "\r\n"]
    return "".join(lines).encode("latin-1")


def date() -> str:
    """Return the time as a Date field has it (RFC 9110, 5.6.7)."""
    return _DATES[int(time.time())]


def phrase_of(status: int) -> str:
    """Return the words for a status: "Not Found" for 404."""
    return _PHRASES.get(status, "Unknown")


def _line(field: tuple[str, str]) -> tuple[str, str | None]:
    name, value = field
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise HandlerError(f"a header field can't be named {name!r}: use letters, digits and hyphens")
    if not isinstance(value, str):
        mend = f"{value!r}.decode()" if isinstance(value, bytes) else f"str({value!r})"
        raise HandlerError(f"the header field {name} can't be {value!r}: give text, as by {mend}")
    if _VALUE.fullmatch(value) is None:
        raise HandlerError(f"the header field {name} can't be {value!r}: give text without ends of lines, in latin-1")
    lower = name.lower()
    return f"{name}: {value}\r\n", lower if lower in _SERVERS else None


_LINES: Known[tuple[str, str], tuple[str, str | None]] = Known(_line, 512)


@lru_cache(maxsize=256)
def _status_line(status: int, reason: str | None) -> str:
    check_status(status)
    words = phrase_of(status) if reason is None else reason
    if not isinstance(words, str) or _VALUE.fullmatch(words) is None:
        raise HandlerError(f"the reason of an answer can't be {words!r}: give text without ends of lines")
    return f"HTTP/1.1 {int(status)} {words}\r\n"


_DATES: Known[int, str] = Known(lambda second: formatdate(second, usegmt=True), 2)
