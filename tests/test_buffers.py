"""Input gives the same items however the bytes were split. Output loses and repeats no bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reqtable.table.errors import LimitExceeded
from reqtable.table.input import MISSING, NO_INPUT, Inbox, Input
from reqtable.table.output import CHUNK_BYTES, FileSlice, Output

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# The read, its input, the item that it gives, and the input that is left.
READS = {
    "line": (lambda i: i.through(b"\n", 100), b"one\ntwo", b"one\n", b"two"),
    "empty line": (lambda i: i.through(b"\n", 100), b"\n\n", b"\n", b"\n"),
    "two bytes": (lambda i: i.through(b"\r\n", 100), b"a\rb\nc\r\n\r\n", b"a\rb\nc\r\n", b"\r\n"),
    "long": (lambda i: i.through(b"--end--", 100), b"--end-x--end--tail", b"--end-x--end--", b"tail"),
    "overlapping": (lambda i: i.through(b"aab", 100), b"aaabaab", b"aaab", b"aab"),
    "exactly": (lambda i: i.exactly(5), b"12345678", b"12345", b"678"),
    "rest": (lambda i: i.rest(100), b"all of it", b"all of it", b""),
}


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", READS)
def test_reads_the_same_from_any_pieces(name, size):
    take, data, item, left = READS[name]
    given_ = Input()
    got: Any = take(given_)
    for at in range(0, len(data), size):
        before = len(given_)
        given_.feed(data[at : at + size])
        assert len(given_) == before + len(data[at : at + size])
        if got is MISSING:
            got = take(given_)
    given_.ended = True
    if got is MISSING:
        got = take(given_)
    assert type(got) is bytes
    assert (got, len(given_), given_.leftover(), len(given_)) == (item, len(left), left, 0)


def test_chunk_takes_what_is_here():
    given_ = Input()
    assert given_.chunk(4) is MISSING
    given_.feed(b"abcdef")
    given_.feed(b"g")
    assert [given_.chunk(4), given_.chunk(4), given_.chunk(4)] == [b"abcd", b"efg", MISSING]
    given_.ended = True
    assert given_.chunk(4) is MISSING
    assert given_.exactly(0) == b""
    assert given_.rest(1) == b""


def test_whole_piece_is_not_copied():
    given_ = Input()
    piece = b"a whole line\n"
    given_.feed(piece)
    assert given_.through(b"\n", 100) is piece


def test_a_stream_has_no_datagrams():
    with pytest.raises(TypeError, match="datagram servers"):
        Input().datagram()


ASKS = st.one_of(
    st.tuples(st.just("through"), st.sampled_from([b"\n", b"\r\n", b"\r\n\r\n", b"aba"]), st.integers(1, 12)),
    st.tuples(st.just("exactly"), st.integers(0, 9), st.none()),
    st.tuples(st.just("chunk"), st.integers(1, 9), st.none()),
    st.tuples(st.just("rest"), st.integers(1, 30), st.none()),
)


def expected(left: bytes, ended: bool, kind: str, what: Any, limit: int | None) -> Any:
    """Return what a read must give if `left` is all the input; LimitExceeded if it must raise that."""
    if kind == "through":
        found = left.find(what)
        if found >= 0 and found + len(what) <= limit:
            return left[: found + len(what)]
        return LimitExceeded if len(left) >= limit else MISSING
    if kind == "exactly":
        return left[:what] if len(left) >= what else MISSING
    return (LimitExceeded if len(left) > what else left) if ended else MISSING


@SETTINGS
@given(
    data=st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"\r\n", b"aba"]), max_size=60).map(b"".join),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    ahead=st.integers(0, 2),
    asks=st.lists(ASKS, max_size=25),
)
def test_no_split_changes_the_items(data, sizes, ahead, asks):
    pieces, at = [], 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    given_ = Input()
    pieces.reverse()
    at = 0
    for kind, what, limit in asks:
        args = (what,) if limit is None else (what, limit)
        for _ in range(ahead):
            if pieces:
                given_.feed(pieces.pop())
        try:
            while (item := getattr(given_, kind)(*args)) is MISSING and not given_.ended:
                if pieces:
                    given_.feed(pieces.pop())
                else:
                    given_.ended = True
        except LimitExceeded as error:
            assert error.limit == (what if limit is None else limit)
            item = LimitExceeded
        left = data[at:]
        if kind == "chunk":
            assert item is MISSING if not left else item == left[: len(item)] and 1 <= len(item) <= what
        else:
            assert item == expected(left, True, kind, what, limit)
        if type(item) is bytes:
            at += len(item)
    while pieces:
        given_.feed(pieces.pop())
    assert len(given_) == len(data) - at
    assert given_.leftover() == data[at:]


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"--end--"])
@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("skipped", [0, 3])  # bytes read before, from the same chunk
def test_limit_is_the_same_byte_for_any_split(separator, length, skipped):
    item = b"x" * (length - len(separator)) + separator
    data = item + b"tail"
    for first in range(len(data) + 1):
        for size in (1, 2, 5, 100):
            given_ = Input()
            given_.feed(b"-" * skipped + data[:first])
            assert given_.exactly(skipped) == b"-" * skipped
            try:
                got: Any = given_.through(separator, 12)
                for at in range(first, len(data), size):
                    given_.feed(data[at : at + size])
                    got = given_.through(separator, 12) if got is MISSING else got
            except LimitExceeded as error:
                got = error.limit
            assert got == (item if length <= 12 else 12)


def test_limit_is_reached_without_the_separator():
    given_ = Input()
    given_.feed(b"x" * 11)
    assert given_.through(b"\n", 12) is MISSING
    given_.feed(b"x")
    with pytest.raises(LimitExceeded, match="12 bytes"):
        given_.through(b"\n", 12)
    assert len(given_) == 12, "a refused read takes nothing"
    given_ = Input()
    given_.feed(b"x" * 12)
    assert given_.rest(12) is MISSING
    given_.feed(b"x")
    with pytest.raises(LimitExceeded, match="12 bytes"):
        given_.rest(12)


def test_another_separator_is_searched_from_the_start():
    given_ = Input()
    given_.feed(b"GET / HTTP/1.0\r\nHost: here\r\n")
    assert given_.through(b"\r\n\r\n", 100) is MISSING
    assert given_.through(b";", 100) is MISSING
    assert given_.through(b"\r\n", 100) == b"GET / HTTP/1.0\r\n"
    given_.feed(b"\r\n")
    assert given_.through(b"\r\n\r\n", 100) == b"Host: here\r\n\r\n"


class Counting(bytearray):
    """Counts the bytes that a search looks at."""

    searched = 0

    def find(self, what: bytes, start: int = 0) -> int:  # type: ignore[override]
        self.searched += len(self) - start
        return super().find(what, start)


@pytest.mark.parametrize("separator", [b"\n", b"--end--"])
def test_dribbled_line_is_searched_once(separator):
    given_ = Input()
    given_.data = data = Counting(b"skipped" + b"x")
    assert given_.exactly(7) == b"skipped"
    for _ in range(3000):
        assert given_.through(separator, 10_000) is MISSING
        given_.feed(b"x")
    assert given_.data is data, "the test looks at what is searched"
    assert 3000 <= data.searched <= 3000 * (len(separator) + 1)
    given_.feed(separator)
    assert given_.through(separator, 10_000) == b"x" * 3001 + separator


# -- datagrams ---------------------------------------------------------------------------------------------------------


def an_inbox(*datagrams: bytes) -> Inbox:
    inbox = Inbox()
    for data in datagrams:
        inbox.deliver(data, 64)
    return inbox


def test_datagram_takes_each_whole():
    inbox = an_inbox(b"a\nb\n", b"", b"c")
    assert not inbox.is_session
    assert [inbox.datagram() for _ in range(4)] == [b"a\nb\n", b"", b"c", MISSING]
    assert inbox.is_session
    assert not inbox.ended, "the peer may send more"


@pytest.mark.parametrize(
    ("take", "items"),
    [
        (lambda i: i.through(b"\n", 10), [b"one\n", b"two\n", MISSING]),
        (lambda i: i.exactly(6), [b"one\ntw", MISSING]),
        (lambda i: i.chunk(6), [b"one\ntw", b"o\nend", MISSING]),
        (lambda i: i.rest(20), [b"one\ntwo\nend", b""]),
    ],
)
def test_other_reads_see_a_stream_that_ends_with_the_datagram(take, items):
    inbox = Inbox()
    assert take(inbox) is MISSING
    assert not inbox.ended
    inbox.deliver(b"one\ntwo\nend", 64)
    inbox.deliver(b"next\n", 64)
    assert [take(inbox) for _ in items] == items
    assert inbox.ended
    assert not inbox.is_session
    assert inbox.datagram() == b"next\n", "what is left of one does not run into the next"


def test_reads_and_datagrams_take_turns():
    inbox = an_inbox(b"a\nleft", b"b", b"c\nleft", b"d")
    assert len(inbox) == 14
    assert inbox.through(b"\n", 10) == b"a\n"
    assert len(inbox) == 12
    assert inbox.datagram() == b"b"
    assert inbox.through(b"\n", 10) == b"c\n"
    assert inbox.ended
    assert inbox.leftover() == b"left"
    assert inbox.datagram() == b"d"
    assert not inbox.ended
    assert inbox.through(b"\n", 10) is MISSING
    assert len(inbox) == 0


def test_datagrams_beyond_the_bound_are_dropped_and_counted():
    inbox = Inbox()
    for number in range(5):
        inbox.deliver(b"%d" % number, 3)
    assert inbox.dropped == 2
    assert inbox.datagram() == b"0"
    inbox.deliver(b"5", 3)
    assert [inbox.datagram() for _ in range(4)] == [b"1", b"2", b"5", MISSING]
    assert inbox.dropped == 2


def test_datagram_over_a_limit_is_refused():
    with pytest.raises(LimitExceeded):
        an_inbox(b"x" * 11).rest(10)
    with pytest.raises(LimitExceeded):
        an_inbox(b"x" * 10).through(b"\n", 10)


# -- output ------------------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 60, 4096, 200_000, CHUNK_BYTES, CHUNK_BYTES + 1])
PUTS = st.tuples(st.sampled_from(["bytes", "bytes", "bytes", "file"]), SIZES)
SENDS = st.tuples(st.just("send"), st.sampled_from([1, 3, 1000, 100_000, CHUNK_BYTES, 10**9]))
PATTERN = bytes(range(251)) * 4400  # no two stretches of it that are near each other are alike


@settings(SETTINGS, max_examples=150)
@given(steps=st.lists(PUTS | PUTS | SENDS | SENDS | st.just(("clear", 0)), max_size=30))
def test_output_leaves_in_order_and_adds_up(steps):
    output = Output()
    queued: list[list[Any]] = []  # the model: [bytes not sent, is it held in memory]
    file = io.BytesIO(PATTERN)
    serial = 0
    for what, size in [*steps, *[("send", 10**9)] * 100]:
        if what == "clear":
            output.clear()
            queued.clear()
        elif what == "send":
            if not queued:
                assert not output.pieces
                continue
            piece = output.front()
            data = piece.read() if type(piece) is FileSlice else bytes(piece)
            data = data[:size]  # the kernel takes no more
            assert data
            output.consume(len(data))
            while data:
                mine = queued[0][0][: len(data)]
                assert data[: len(mine)] == mine
                data = data[len(mine) :]
                queued[0][0] = queued[0][0][len(mine) :]
                if not queued[0][0]:
                    del queued[0]
        else:
            serial += 1
            content = PATTERN[serial : serial + size]
            if what == "file":
                output.append_file(FileSlice(file, serial, size))
            else:
                output.append(content)
            queued.append([content, what == "bytes"])
        assert output.size == sum(len(data) for data, _ in queued)
        assert output.held == sum(len(data) for data, held in queued if held)
    assert not queued
    assert not output.pieces


def test_small_pieces_leave_as_one():
    output = Output()
    for number in range(16):
        output.append(b"+OK %d\r\n" % number)
    assert output.front() == b"".join(b"+OK %d\r\n" % number for number in range(16))
    output.clear()
    output.append(b"head")
    output.append(b"ers")
    output.append_file(FileSlice(io.BytesIO(b"body"), 1, 3))
    output.append(b"tail")
    assert output.front() == b"headers"
    output.consume(7)
    piece = output.front()
    assert type(piece) is FileSlice
    assert piece.read() == b"ody"
    output.consume(2)
    assert output.front().read() == b"y"
    output.consume(1)
    assert (output.front(), output.size, output.held) == (b"tail", 4, 4)


def test_big_pieces_are_not_joined_or_copied():
    output = Output()
    big = bytes(CHUNK_BYTES)
    output.append(big)
    output.append(b"x")
    assert output.front() is big
    output.consume(1)
    front = output.front()
    assert type(front) is memoryview
    assert front.obj is big
    output.consume(CHUNK_BYTES - 1)
    assert output.front() == b"x"


@pytest.mark.parametrize(
    "read",
    [
        len,
        bool,
        Input.leftover,
        Input.skip_line,
        Input.save,
        lambda unread: unread.through(b"\n", 100),
        lambda unread: unread.exactly(0),
        lambda unread: unread.exactly(1),
        lambda unread: unread.peek(5),
        lambda unread: unread.searched(b"\n"),
        lambda unread: unread.chunk(100),
        lambda unread: unread.rest(100),
        lambda unread: unread.parsed(len, 100),
    ],
)
def test_the_shared_input_is_read_as_one_that_has_had_nothing(read: Callable[[Input], Any]) -> None:
    assert read(NO_INPUT) == read(Input())


def _set(name: str) -> Callable[[Input], None]:
    return lambda unread: setattr(unread, name, getattr(unread, name))


@pytest.mark.parametrize(
    "write",
    [
        *map(_set, Input.__slots__),
        lambda unread: unread.feed(b"another client's"),
        lambda unread: unread.restore({"data": b"", "ended": True}),
    ],
)
def test_the_shared_input_can_not_be_written(write: Callable[[Input], None]) -> None:
    write(Input())
    with pytest.raises(TypeError, match="own_input"):
        write(NO_INPUT)
    assert NO_INPUT.save() == {"data": b"", "ended": False}
