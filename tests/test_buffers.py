"""Input gives the same items however the bytes were split; output loses and repeats none."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reqtable.core.buffers import CHUNK_BYTES, MISSING, FileSlice, Inbox, Input, Output
from reqtable.core.errors import LimitExceeded

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# What is asked, the input that has it, the item, what is left.
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
        assert got is MISSING or name != "rest"
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
    """What a read of `left`, all that will ever come, must give; LimitExceeded for that error."""
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
@pytest.mark.parametrize("skipped", [0, 3])  # bytes read before from the same chunk
def test_limit_is_reached_at_the_same_byte_for_any_split(separator, skipped):
    limit = 12
    for length, passes in ((limit, True), (limit + 1, False)):
        item = b"x" * (length - len(separator)) + separator
        for size in range(1, length + 6):
            given_ = Input()
            data = b"-" * skipped + item + b"tail"
            got: Any = MISSING
            fed = 0
            try:
                for at in range(0, len(data), size):
                    given_.feed(data[at : at + size])
                    fed += len(data[at : at + size])
                    if skipped and at == 0:
                        while len(given_) < skipped:
                            at, size = at + size, size  # noqa: PLW2901
                            break
                    if got is MISSING:
                        got = given_.through(separator, limit)
            except LimitExceeded as error:
                got = error
            if passes:
                assert got == item
            else:
                assert isinstance(got, LimitExceeded)
                assert got.limit == limit
