"""The input of one request: what has arrived, and the handler has not read. Pure: bytes in, bytes out.

The engine receives only while a want is unsatisfied, so an input holds less than that want's limit plus one `recv`.
`Inbox` does the same for datagrams: each datagram is an input with an end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, Final, TypeVar

from reqtable.table.errors import LimitExceeded, shown

T = TypeVar("T")

Parse = Callable[[bytes], tuple[T, int] | int | None]  # see `wants.parsed`

_WINDOW_BYTES = 4096  # `parse` gets so much at first


class _Missing(Enum):
    MISSING = "missing"


MISSING: Final = _Missing.MISSING
"""What `take` and `first` return if the item has not arrived."""

Missing = _Missing
"""The type of `MISSING`, for annotations."""


def parse_at(parse: Parse[Any], data: bytes | bytearray, start: int, limit: int) -> tuple[Any, int] | int | None:
    """Return the message that `parse` finds at the index `start` of `data`, and its length; or its answer without one.

    If much is there, `parse` gets only the first part at first: else each of many short messages would cost a copy of
    all of them. Raises ValueError for an impossible length.
    """
    size = len(data) - start
    if size > limit:
        size = limit
    seen = size if size <= 2 * _WINDOW_BYTES else _WINDOW_BYTES
    while True:
        found = parse(bytes(data[start : start + seen]))  # bytes() of bytes copies nothing
        if type(found) is tuple:
            if len(found) == 2 and type(found[1]) is int and 0 < found[1] <= seen:
                return found
            raise ValueError(f"parse found {shown(found)} in {seen} bytes: return the message and its length")
        if seen == size or (type(found) is int and found > size):
            return found
        seen = size


class Input:
    """Holds the unread input of a stream request.

    A single chunk is kept as the `bytes` that arrived, so a line that arrives whole is passed on without a copy. A
    second chunk turns it into a `bytearray`, which grows in place.
    """

    __slots__ = ("_sought", "_start", "data", "ended")

    is_stream: ClassVar[bool] = True  # `data` has all that is unread

    def __init__(self) -> None:
        self.data: bytes | bytearray = b""  # empty if nothing is unread
        self._start = 0  # the index of the first unread byte
        # The separator sought last, and the first index where it may still begin: the next search starts there.
        # Or the `parse` of `parsed`, and where the data must at least end for the next try.
        self._sought: tuple[bytes | Parse[Any], int] | None = None
        self.ended = False  # the peer's end of file has come: no more input will arrive

    def __len__(self) -> int:
        return len(self.data) - self._start

    def feed(self, data: bytes) -> None:
        """Add `data`, which has arrived."""
        if not self.data:
            self.data = data
            self._start = 0
            self._sought = None
            return
        if type(self.data) is bytes:
            self.data = bytearray(memoryview(self.data)[self._start :])
        else:
            del self.data[: self._start]  # type: ignore[union-attr]  # it is the bytearray of an earlier feed
        if self._sought is not None:
            self._sought = self._sought[0], self._sought[1] - self._start
        self._start = 0
        self.data += data

    def through(self, separator: bytes, limit: int) -> bytes | Missing:
        """Take the bytes up to and including `separator`. Raises LimitExceeded if these are more than `limit`."""
        data, start, sought = self.data, self._start, self._sought
        found = data.find(separator, start if sought is None or sought[0] != separator else sought[1])
        if found < 0:
            # limit bytes without a separator can't become an item of at most limit bytes
            if len(data) - start >= limit:
                raise LimitExceeded(f"input up to {separator!r}", limit)
            self._sought = separator, max(start, len(data) - len(separator) + 1)
            return MISSING
        end = found + len(separator)
        if end - start > limit:
            raise LimitExceeded(f"input up to {separator!r}", limit)
        if type(data) is bytes:  # fast path of _take_to, which most lines take
            self._sought = None
            if end < len(data):
                self._start = end
                return data[start:end]
            if not start:
                self.data = b""
                return data
        return self._take_to(end)

    def exactly(self, count: int) -> bytes | Missing:
        """Take exactly `count` bytes. Returns MISSING until so many have come."""
        data = self.data
        start = self._start
        end = start + count
        if end < len(data) and type(data) is bytes:  # fast path of _take_to
            self._start = end
            self._sought = None
            return data[start:end]
        return self._take_to(end) if end <= len(data) else MISSING

    def peek(self, count: int, skip: int = 0) -> bytes:
        """Return at most `count` unread bytes, after the first `skip`. They stay unread."""
        start = self._start + skip
        return bytes(self.data[start : start + count])

    def searched(self, separator: bytes) -> int:
        """Return the number of unread bytes in which `through` has already looked for `separator`, in vain."""
        sought = self._sought
        return sought[1] - self._start if sought is not None and sought[0] == separator else 0

    def chunk(self, limit: int) -> bytes | Missing:
        """Take what has arrived: at least one byte, at most `limit`."""
        size = len(self.data) - self._start
        if not size:
            return MISSING
        return self._take_to(self._start + min(size, limit))

    def rest(self, limit: int) -> bytes | Missing:
        """Take everything, once the input has ended. Raises LimitExceeded for more than `limit` bytes."""
        if len(self.data) - self._start > limit:
            raise LimitExceeded("the rest of the input", limit)
        return self._take_to(len(self.data)) if self.ended else MISSING

    def parsed(self, parse: Parse[Any], limit: int) -> Any:
        """Take the message that `parse` finds at the beginning of the unread input, as `parsed()` describes.

        Raises LimitExceeded if `limit` bytes have no whole message, and any error of `parse`.
        """
        data, start, sought = self.data, self._start, self._sought
        if sought is not None and sought[0] is parse and len(data) < min(sought[1], start + limit):
            return MISSING  # it has said that it needs more
        found = parse_at(parse, data, start, limit)
        if type(found) is tuple:  # fast path of _take_to
            message, count = found
            if start + count < len(data):
                self._start = start + count
            else:
                self.data = b""
                self._start = 0
            self._sought = None
            return message
        if len(data) - start >= limit:
            raise LimitExceeded("a message", limit)
        if found is not None:
            self._sought = parse, start + found  # type: ignore[operator]  # an int: so much is needed
        return MISSING

    def skip_line(self) -> Missing | None:
        """Throw away input up to and including a newline. Returns None once a newline or the end has come."""
        found = self.data.find(b"\n", self._start)
        self._take_to(found + 1 if found >= 0 else len(self.data))
        return None if found >= 0 or self.ended else MISSING

    def datagram(self) -> bytes | Missing:
        """Raise TypeError: a stream has no datagrams."""
        raise TypeError("datagram() is for datagram servers; a stream is read by line(), exactly(), chunk(), …")

    def leftover(self) -> bytes:
        """Take all unread input, whether it has ended or not."""
        return self._take_to(len(self.data))

    def _take_to(self, end: int) -> bytes:
        data = self.data
        if end == len(data):
            item = data if self._start == 0 else data[self._start :]
            self.data = b""
            self._start = 0
        else:
            item = data[self._start : end]
            self._start = end
        self._sought = None
        return item if type(item) is bytes else bytes(item)

    def save(self) -> dict[str, Any]:
        """Return the unread input as plain data."""
        return {"data": bytes(self.data[self._start :]), "ended": self.ended}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Hold what `save` returned. Only for an input from which nothing has been read."""
        self.data, self.ended = _typed(saved["data"], bytes), _typed(saved["ended"], bool)


class _NoInput(Input):
    """Is empty, and stays so: writing it raises. Reading it gives MISSING or b""."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("all requests share the empty input: write own_input()")

    def through(self, separator: bytes, limit: int) -> bytes | Missing:
        return MISSING

    def parsed(self, parse: Parse[Any], limit: int) -> Any:
        return MISSING

    def _take_to(self, end: int) -> bytes:
        return b""


NO_INPUT: Final = Input()  # the input of each request that has had none to keep: most have whole items alone
NO_INPUT.__class__ = _NoInput  # from now on it can't be written


def _typed(value: Any, kind: type) -> Any:
    """Return `value`, which has come with a record. Raises TypeError if it is no `kind`."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} is not the {kind.__name__} that an input has")
    return value


class Inbox(Input):
    """Holds the unread datagrams of a datagram request.

    `datagram()` takes a whole datagram. Every other want reads the oldest datagram as a stream that ends with it, so a
    handler written for lines also answers a datagram of lines.
    """

    __slots__ = ("_datagrams", "_opened", "dropped", "has_peer", "is_session", "was_read")

    is_stream: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._datagrams: deque[bytes] = deque()
        self._opened = False
        self.was_read = False  # the handler has tried to read; before that we can't tell whether this is a session
        self.is_session = False  # a datagram() was was_read for: later datagrams of the peer belong here
        self.has_peer = True  # the peer has an address, so its later datagrams can be recognised
        self.dropped = 0

    def __len__(self) -> int:
        return super().__len__() + sum(map(len, self._datagrams))

    def __bool__(self) -> bool:
        """Return whether anything is unread. A datagram of no bytes counts."""
        return bool(self._datagrams) or super().__len__() > 0

    def deliver(self, data: bytes, most: int) -> None:
        """Add a datagram, or drop it if `most` datagrams are waiting already."""
        if len(self._datagrams) >= most:
            self.dropped += 1
        else:
            self._datagrams.append(data)

    def through(self, separator: bytes, limit: int) -> bytes | Missing:
        self._open()
        return super().through(separator, limit)

    def exactly(self, count: int) -> bytes | Missing:
        self._open()
        return super().exactly(count)

    def peek(self, count: int, skip: int = 0) -> bytes:
        self._open()
        return super().peek(count, skip)

    def chunk(self, limit: int) -> bytes | Missing:
        self._open()
        return super().chunk(limit)

    def rest(self, limit: int) -> bytes | Missing:
        self._open()
        return super().rest(limit)

    def parsed(self, parse: Parse[Any], limit: int) -> Any:
        self._open()
        return super().parsed(parse, limit)

    def skip_line(self) -> Missing | None:
        self._open()
        return super().skip_line()

    def datagram(self) -> bytes | Missing:
        self.was_read = True
        self._opened = False
        if not self.is_session:
            # A peer without an address can't send a second datagram to this request, so the input ends with the first.
            self.is_session = self.has_peer
        self.ended = not self.has_peer and not self._datagrams
        if self.data:
            self.leftover()  # the unread rest of one datagram must not run into the next
        return self._datagrams.popleft() if self._datagrams else MISSING

    def save(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_opened", "was_read", "is_session", "has_peer")}
        return super().save() | own | {"datagrams": list(self._datagrams)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._datagrams = deque([_typed(each, bytes) for each in saved["datagrams"]])
        for name in ("_opened", "was_read", "is_session", "has_peer"):
            setattr(self, name, _typed(saved[name], bool))

    def unopened(self) -> list[bytes]:
        """Take the datagrams from which nothing has been read."""
        left = list(self._datagrams)
        self._datagrams.clear()
        return left

    def _open(self) -> None:
        self.was_read = True
        if not self._opened and self._datagrams:
            self.feed(self._datagrams.popleft())
            self.ended = self._opened = True
