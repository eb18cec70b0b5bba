"""Wants: what a resumable handler waits for. Small immutable objects, made once and reused.

A want is asked one thing, `take(entry)`: the item if it is there, `MISSING` if it is not. Taking never blocks, and
loses nothing of what it waits for. `awaits` names the event, and so the state, of a request that waits for it.
A want that reads says how much it may buffer: going over is `LimitExceeded`, never unbounded memory.

Subclassing `Want` and giving it a `take` is how a protocol adds a want of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, Protocol, TypeVar, dataclass_transform

from reqtable.table.buffers import MISSING, Input, Missing, Output
from reqtable.table.errors import LimitExceeded
from reqtable.table.limits import Limits
from reqtable.table.places import Place, caller
from reqtable.table.states import Event

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

LIMIT_BYTES = 65_536


class Surroundings(Protocol):
    """What a want may look at of the table that its request is in."""

    limits: Limits
    now: float  # the time of this pass, in seconds
    driver: str | None  # the policy whose thread or child has this table to itself, for one request


class Waiting(Protocol):
    """What a want may look at, and take from, of the request that waits for it."""

    input: Input
    output: Output
    result: Any  # what was posted: the result of a call, say; MISSING where nothing was
    wakes_at: float | None  # when its sleep ends

    @property
    def table(self) -> Surroundings: ...


class Want(Generic[T_co]):
    """What a request waits for. Awaiting one in an `AsyncRequestHandler` gives its item."""

    __slots__ = ()

    awaits: ClassVar[Event] = Event.AWAITS_INPUT
    takes_partial: ClassVar[bool] = False  # at end of file, `AsyncRequestHandler.read` gives what is left
    needs_bytes: ClassVar[bool] = False  # it has not come where a stream has nothing unread: no need to ask
    is_timed: ClassVar[bool] = True  # the timeout that the handler named runs while it waits for this

    def take(self, entry: Waiting) -> T_co | Missing:
        """The item, removed from `entry`; `MISSING` if it has not come. Raises LimitExceeded."""
        raise NotImplementedError

    def __await__(self) -> Generator[Want[T_co], Any, T_co]:
        item: T_co = yield self
        return item

    def __repr__(self) -> str:
        # the factories are named as the classes, in lower case; a protocol's own want need not be a dataclass
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__.lower()}({values})"


@dataclass_transform(frozen_default=True)
def want_type(cls: type[T]) -> type[T]:
    """Make `cls` an immutable value, keeping `Want`'s repr."""
    return dataclass(frozen=True, slots=True, repr=False)(cls)


@want_type
class Line(Want[bytes]):
    limit: int
    needs_bytes: ClassVar[bool] = True
    takes_partial: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.through(b"\n", self.limit)


@want_type
class Until(Want[bytes]):
    separator: bytes
    limit: int
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.through(self.separator, self.limit)


@want_type
class Exactly(Want[bytes]):
    n: int

    def take(self, entry: Waiting) -> bytes | Missing:
        # n is often the peer's own word for how much it will send
        if self.n > entry.table.limits.input_bytes_max:
            raise LimitExceeded(repr(self), entry.table.limits.input_bytes_max)
        return entry.input.exactly(self.n)


@want_type
class Chunk(Want[bytes]):
    limit: int
    needs_bytes: ClassVar[bool] = True
    takes_partial: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.chunk(self.limit)


@want_type
class Rest(Want[bytes]):
    limit: int
    takes_partial: ClassVar[bool] = True

    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.rest(self.limit)


@want_type
class SkipLine(Want[None]):
    needs_bytes: ClassVar[bool] = True

    def take(self, entry: Waiting) -> Missing | None:
        return entry.input.skip_line()

    def __repr__(self) -> str:
        return "skip_line()"


@want_type
class Datagram(Want[bytes]):
    def take(self, entry: Waiting) -> bytes | Missing:
        return entry.input.datagram()


@want_type
class Sleep(Want[None]):
    seconds: float
    awaits: ClassVar[Event] = Event.AWAITS_TIMER

    def take(self, entry: Waiting) -> Missing | None:
        if entry.wakes_at is None or entry.wakes_at > entry.table.now:
            return MISSING
        entry.wakes_at = None
        return None


@want_type
class Flushed(Want[None]):
    awaits: ClassVar[Event] = Event.OUTPUT_BLOCKED

    def take(self, entry: Waiting) -> Missing | None:
        return None if entry.output.first is None else MISSING


@want_type
class Nothing(Want[None]):
    def take(self, entry: Waiting) -> Missing | None:
        return None


class Posted(Want[T_co]):
    """A want whose item is posted to the entry from outside."""

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
    place: Place  # where the user's code asks for it
    awaits: ClassVar[Event] = Event.AWAITS_RESULT

    def take(self, entry: Waiting) -> T_co | Missing:
        try:
            return Posted.take(self, entry)
        except Exception as error:
            note = f"raised by {self!r}, which {self.place} asked for"
            if note not in getattr(error, "__notes__", ()):  # one that is raised again and again gathers none
                error.add_note(note)
            raise

    def __repr__(self) -> str:
        return f"call({getattr(self.fn, '__qualname__', self.fn)!s})"


@want_type
class HandOff(Posted[None]):
    """The rest of the request runs under `policy`; satisfied at once where it does so already."""

    policy: str
    awaits: ClassVar[Event] = Event.HANDED_OFF
    is_timed: ClassVar[bool] = False

    def take(self, entry: Waiting) -> Missing | None:
        return None if entry.table.driver == self.policy else Posted.take(self, entry)

    def __repr__(self) -> str:
        return f"hand_off({self.policy!r})"


@dataclass(frozen=True, slots=True)
class Failure:
    """What is posted when a call raised instead of returning."""

    error: BaseException


def check_timeout(timeout: Any) -> None:
    """Raise TypeError or ValueError for a timeout that is no number of seconds above 0."""
    try:
        if timeout > 0:
            return
    except TypeError:
        raise TypeError(f"timeout must be a number of seconds, not {timeout!r}") from None
    raise ValueError(f"timeout must be seconds above 0, not {timeout!r}")


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number of bytes, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more bytes, not {value!r}")
    return value


def line(limit: int = LIMIT_BYTES) -> Want[bytes]:
    """Bytes up to and including `b"\\n"`, at most `limit` of them."""
    return _line(limit)


def until(separator: bytes, limit: int = LIMIT_BYTES) -> Want[bytes]:
    """Bytes up to and including `separator`, at most `limit` of them."""
    return _until(separator, limit)


def skip_line() -> Want[None]:
    """None, once the input is thrown away up to and including the next `b"\\n"`, or up to its end.

    A line that exceeded the limit of `line()` is still unread. This want takes it away, however long it is.
    """
    return _SKIP_LINE


def exactly(n: int) -> Want[bytes]:
    """Exactly `n` bytes; `exactly(0)` is `b""`, at once. At most the engine's `input_bytes_max`."""
    return _exactly(n)


def chunk(limit: int = LIMIT_BYTES) -> Want[bytes]:
    """Whatever has arrived: at least 1 byte, at most `limit`."""
    return _chunk(limit)


def rest(limit: int) -> Want[bytes]:
    """Everything up to the peer's end of file, at most `limit` bytes."""
    return _rest(limit)


def datagram() -> Want[bytes]:
    """The next datagram of this peer. The entry becomes the session of that peer's address (datagram servers only)."""
    return _DATAGRAM


def sleep(seconds: float) -> Want[None]:
    """None, `seconds` later."""
    return _sleep(seconds)


def flushed() -> Want[None]:
    """None, once all output so far is with the kernel."""
    return _FLUSHED


def nothing() -> Want[None]:
    """None, at once."""
    return NOTHING


def call(fn: Callable[..., T], *args: Any, on: str | None = None, **kwargs: Any) -> Want[T]:
    """`fn(*args, **kwargs)`, run elsewhere while the loop goes on; what it raises is raised in the handler.

    `on` names where: `"thread"`, `"process"` (what crosses over must pickle), `"fork"` (only the result must), or an
    executor of the configuration. None: where the configuration says, a thread unless it does.
    """
    if not callable(fn):
        raise TypeError(f"call() takes a function and its arguments, as in call(f, x), not {fn!r}")
    if on is not None and not isinstance(on, str):
        raise TypeError(f"on must be the name of an executor, such as 'process', not {on!r}")
    return Call(fn, args, kwargs, on, caller())


def hand_off(policy: str) -> Want[None]:
    """None, and the rest of this request runs under `policy`: `"thread"`, `"pool"` or `"fork"`."""
    return _hand_off(policy)


@lru_cache(maxsize=512, typed=True)
def _line(limit: int) -> Want[bytes]:
    return Line(_whole("limit", limit, 1))


@lru_cache(maxsize=512, typed=True)
def _until(separator: bytes, limit: int) -> Want[bytes]:
    if not isinstance(separator, bytes):
        raise TypeError(f"separator must be bytes, such as b';', not {separator!r}")
    if not separator:
        raise ValueError("separator must be 1 or more bytes, not b''")
    return Until(separator, _whole("limit", limit, 1))


@lru_cache(maxsize=4096, typed=True)
def _exactly(n: int) -> Want[bytes]:
    return Exactly(_whole("n of exactly(n)", n, 0))


@lru_cache(maxsize=512, typed=True)
def _chunk(limit: int) -> Want[bytes]:
    return Chunk(_whole("limit", limit, 1))


@lru_cache(maxsize=512, typed=True)
def _rest(limit: int) -> Want[bytes]:
    return Rest(_whole("limit", limit, 1))


@lru_cache(maxsize=512, typed=True)
def _sleep(seconds: float) -> Want[None]:
    if not isinstance(seconds, int | float):
        raise TypeError(f"sleep() takes a number of seconds, not {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"sleep() takes seconds, 0 or more, not {seconds!r}")
    return Sleep(seconds)


@lru_cache(maxsize=64, typed=True)
def _hand_off(policy: str) -> Want[None]:
    if not isinstance(policy, str):
        raise TypeError(f"hand_off() takes the name of a policy, not {policy!r}")
    return HandOff(policy)


_SKIP_LINE = SkipLine()
_DATAGRAM = Datagram()
_FLUSHED = Flushed()
NOTHING = Nothing()
