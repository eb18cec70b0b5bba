"""Wants: what a resumable handler waits for. Wants are small immutable objects, made once and reused.

`want.take(entry)` returns the item if it has arrived, and `MISSING` if it has not. It never blocks. If it returns
`MISSING`, no part of the item is lost.

`want.awaits` names the event that suspends a request waiting for the want, and so the state that it waits in.

A want that reads has a limit. If the input exceeds it, `take` raises `LimitExceeded`, so memory stays bounded.

To add a want for a protocol, subclass `Want` and write its `take`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from reqtable.table.arguments import whole_bytes
from reqtable.table.errors import LimitExceeded
from reqtable.table.input import MISSING, Missing, Parse, parse_at
from reqtable.table.places import Place, caller
from reqtable.table.states import Event
from reqtable.table.want import Waiting, Want, WantOf, want_type

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

LIMIT_BYTES = 65_536


@want_type
class Line(WantOf[bytes]):
    limit: int
    needs_bytes: ClassVar[bool] = True
    takes_partial: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.through(b"\n", self.limit)

    def first(self, data: bytes) -> tuple[bytes, int] | Missing | None:
        end = data.find(b"\n") + 1
        if not 0 < end <= self.limit:
            return MISSING if not end and len(data) < self.limit else None
        return (data, end) if end == len(data) else (data[:end], end)


@want_type
class Until(WantOf[bytes]):
    separator: bytes
    limit: int
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.through(self.separator, self.limit)

    def first(self, data: bytes) -> tuple[bytes, int] | Missing | None:
        found = data.find(self.separator)
        if found < 0:
            return None  # `take` notes how far it has searched
        end = found + len(self.separator)
        return (data[:end], end) if end <= self.limit else None


@want_type
class Exactly(WantOf[bytes]):
    n: int

    def take(self, entry: Waiting) -> bytes | Missing:
        # n often comes from the peer: the length that it announced
        if self.n > entry.table.limits.input_bytes_max:
            raise LimitExceeded(repr(self), entry.table.limits.input_bytes_max)
        return entry.input.exactly(self.n)

    def first(self, data: bytes) -> tuple[bytes, int] | Missing | None:
        return (data[: self.n], self.n) if 0 < self.n <= len(data) else None


@want_type
class Chunk(WantOf[bytes]):
    limit: int
    needs_bytes: ClassVar[bool] = True
    takes_partial: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.chunk(self.limit)

    def first(self, data: bytes) -> tuple[bytes, int] | Missing | None:
        return (data, len(data)) if len(data) <= self.limit else None


@want_type
class Rest(WantOf[bytes]):
    limit: int
    takes_partial: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.rest(self.limit)


@want_type
class Parsed(WantOf[Any]):
    parse: Parse[Any]
    limit: int
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Any:
        return entry.input.parsed(self.parse, self.limit)

    def first(self, data: bytes) -> Any:
        try:
            found = parse_at(self.parse, data, 0, self.limit)
        except Exception:
            return None  # `take` raises it again, for the handler
        if type(found) is tuple:
            return found
        return MISSING if found is None and len(data) < self.limit else None  # a number is for `take` to note


@want_type
class SkipLine(WantOf[None]):
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Missing | None:
        return entry.input.skip_line()

    def __repr__(self) -> str:
        return "skip_line()"


@want_type
class Datagram(WantOf[bytes]):
    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.datagram()


@want_type
class Sleep(WantOf[None]):
    seconds: float
    awaits: ClassVar[Event] = Event.AWAITS_TIMER

    def take(self, entry: Waiting) -> Missing | None:
        return MISSING  # the loop has the request wait for a Sleeping


@want_type
class Flushed(WantOf[None]):
    awaits: ClassVar[Event] = Event.OUTPUT_BLOCKED

    def take(self, entry: Waiting) -> Missing | None:
        return None if entry.output.first is None else MISSING


@want_type
class Nothing(WantOf[None]):
    def take(self, entry: Waiting) -> Missing | None:
        return None


class Posted(WantOf[T_co]):
    """Waits for an item that is posted to the entry from outside."""

    __slots__ = ()

    def take(self, entry: Waiting) -> T_co | Missing:
        item: T_co | Missing | Failure = entry.result
        if item is MISSING:
            return MISSING
        entry.result = MISSING
        if isinstance(item, Failure):
            raise item.error
        return item


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Call(Posted[T_co]):
    fn: Callable[..., T_co]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    on: str | None
    place: Place  # the user's line that asked for the call
    awaits: ClassVar[Event] = Event.AWAITS_RESULT

    def take(self, entry: Waiting) -> T_co | Missing:
        try:
            return Posted.take(self, entry)
        except Exception as error:
            note = f"raised by {self!r}, which {self.place} asked for"
            if note not in getattr(error, "__notes__", ()):  # the same error object may be raised more than once
                error.add_note(note)
            raise

    def __repr__(self) -> str:
        return f"call({getattr(self.fn, '__qualname__', self.fn)!s})"


@want_type
class HandOff(Posted[None]):
    """Has the rest of the request run under `policy`. Satisfied at once if the request runs under `policy` already."""

    policy: str
    awaits: ClassVar[Event] = Event.HANDED_OFF
    is_timed: ClassVar[bool] = False

    def take(self, entry: Waiting) -> Missing | None:
        return None if entry.table.driving_policy == self.policy else Posted.take(self, entry)

    def __repr__(self) -> str:
        return f"hand_off({self.policy!r})"


@dataclass(frozen=True, slots=True)
class Failure:
    """Carries the error of a call that raised, in place of its result."""

    error: BaseException


def line(limit: int = LIMIT_BYTES) -> WantOf[bytes]:
    """Wait for the bytes up to and including `b"\\n"`, at most `limit` of them. The item is these bytes.

    A longer line gives the handler LimitExceeded. Raises TypeError or ValueError for a limit that is not a whole number
    of 1 or more.
    """
    return _line(limit)


def until(separator: bytes, limit: int = LIMIT_BYTES) -> WantOf[bytes]:
    """Wait for the bytes up to and including `separator`, at most `limit` of them. The item is these bytes.

    If more bytes come before the separator, the handler gets LimitExceeded. Raises TypeError or ValueError for a
    separator that is not 1 or more bytes, or for a limit that is not a whole number of 1 or more.
    """
    return _until(separator, limit)


def skip_line() -> WantOf[None]:
    """Throw away the input up to and including the next `b"\\n"`, or up to its end. The item is None.

    A line that exceeded the limit of `line()` is still unread. This want skips it, however long it is.
    """
    return _SKIP_LINE


def parsed(parse: Parse[T], limit: int = LIMIT_BYTES) -> Want[T]:
    """Wait for a whole message, at most `limit` bytes of input, as `parse` finds it.

    `parse(data)` gets the unread input. It returns the pair of the message and its length in bytes. If the message is
    incomplete, `parse` returns None, or the least number of bytes that it needs: it is not called again before so many
    have come. An exception that `parse` raises goes to the handler. The handler gets LimitExceeded if a message is
    longer than `limit`. Raises TypeError or ValueError for a wrong argument.
    """
    if not callable(parse):
        raise TypeError(f"parsed() takes a function of the input, not {parse!r}")
    return Parsed(parse, whole_bytes("limit", limit, 1))


def exactly(n: int) -> WantOf[bytes]:
    """Wait for exactly `n` bytes. The item is these bytes. `exactly(0)` gives `b""` at once.

    The handler gets LimitExceeded if `n` is above the engine's `input_bytes_max`. Raises TypeError or ValueError if `n`
    is not a whole number of 0 or more.
    """
    return _exactly(n)


def chunk(limit: int = LIMIT_BYTES) -> WantOf[bytes]:
    """Wait for input of any length: at least 1 byte, at most `limit`. The item is these bytes; more bytes stay unread.

    Raises TypeError or ValueError for a limit that is not a whole number of 1 or more.
    """
    return _chunk(limit)


def rest(limit: int) -> WantOf[bytes]:
    """Wait for everything up to the peer's end of file, at most `limit` bytes. The item is these bytes.

    If more bytes come, the handler gets LimitExceeded. Raises TypeError or ValueError for a limit that is not a whole
    number of 1 or more.
    """
    return _rest(limit)


def datagram() -> WantOf[bytes]:
    """Wait for the peer's next datagram. The item is its bytes. The request becomes the session of that peer.

    This want is for datagram servers: the handler of a stream gets TypeError.
    """
    return _DATAGRAM


def sleep(seconds: float) -> WantOf[None]:
    """Wait for `seconds`, 0 or more. The item is None. Raises TypeError or ValueError for anything else."""
    return _sleep(seconds)


def flushed() -> WantOf[None]:
    """Wait until the kernel has taken all output so far. The item is None."""
    return _FLUSHED


def nothing() -> WantOf[None]:
    """Wait for nothing. The item is None, at once."""
    return NOTHING


def call(fn: Callable[..., T], *args: Any, on: str | None = None, **kwargs: Any) -> Want[T]:
    """Run `fn(*args, **kwargs)` elsewhere while the loop continues. The item is its result.

    An exception of `fn` is raised in the handler.

    `on` says where `fn` runs: `"thread"`, `"process"` (function, arguments and result must pickle), `"fork"` (only the
    result must pickle), or the name of a configured executor. None: the configuration's `call_on`, by default a thread.
    Raises TypeError if `fn` is not callable, or `on` is no name.
    """
    if not callable(fn):
        raise TypeError(f"call() takes a function and its arguments, as in call(f, x), not {fn!r}")
    if on is not None and not isinstance(on, str):
        raise TypeError(f"on must be the name of an executor, such as 'process', not {on!r}")
    return Call(fn, args, kwargs, on, caller())


def hand_off(policy: str) -> WantOf[None]:
    """Have the rest of this request run under `policy`: `"thread"`, `"pool"` or `"fork"`. The item is None.

    The handler gets ConfigurationError for another policy. Raises TypeError if `policy` is no string.
    """
    return _hand_off(policy)


@lru_cache(maxsize=512, typed=True)
def _line(limit: int) -> WantOf[bytes]:
    return Line(whole_bytes("limit", limit, 1))


@lru_cache(maxsize=512, typed=True)
def _until(separator: bytes, limit: int) -> WantOf[bytes]:
    if not isinstance(separator, bytes):
        raise TypeError(f"separator must be bytes, such as b';', not {separator!r}")
    if not separator:
        raise ValueError("separator must be 1 or more bytes, not b''")
    return Until(separator, whole_bytes("limit", limit, 1))


@lru_cache(maxsize=4096, typed=True)
def _exactly(n: int) -> WantOf[bytes]:
    return Exactly(whole_bytes("n of exactly(n)", n, 0))


@lru_cache(maxsize=512, typed=True)
def _chunk(limit: int) -> WantOf[bytes]:
    return Chunk(whole_bytes("limit", limit, 1))


@lru_cache(maxsize=512, typed=True)
def _rest(limit: int) -> WantOf[bytes]:
    return Rest(whole_bytes("limit", limit, 1))


@lru_cache(maxsize=512, typed=True)
def _sleep(seconds: float) -> WantOf[None]:
    if not isinstance(seconds, int | float):
        raise TypeError(f"sleep() takes a number of seconds, not {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"sleep() takes seconds, 0 or more, not {seconds!r}")
    return Sleep(seconds)


@lru_cache(maxsize=64, typed=True)
def _hand_off(policy: str) -> WantOf[None]:
    if not isinstance(policy, str):
        raise TypeError(f"hand_off() takes the name of a policy, not {policy!r}")
    return HandOff(policy)


_SKIP_LINE = SkipLine()
_DATAGRAM = Datagram()
_FLUSHED = Flushed()
NOTHING = Nothing()
