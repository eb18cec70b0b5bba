"""Each want: which input satisfies it, which is not enough, which is too much. Wants are values, made once."""

from __future__ import annotations

import copy
import functools
import pickle
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from reqtable.table import engine_wants, wants
from reqtable.table.engine_wants import (
    ELSEWHERE,
    ENDED,
    HANDSHAKE,
    PROXY_HEADER,
    READABLE,
    STEP,
    TURN,
    VACANCY,
    WRITABLE,
    Sleeping,
)
from reqtable.table.errors import HandlerError, LimitExceeded
from reqtable.table.input import MISSING, Inbox, Input
from reqtable.table.limits import Limits
from reqtable.table.output import Output
from reqtable.table.states import TRANSITIONS, Event, State
from reqtable.table.want import Want
from reqtable.table.wants import (
    NOTHING,
    Failure,
    call,
    chunk,
    datagram,
    exactly,
    flushed,
    hand_off,
    line,
    nothing,
    parsed,
    rest,
    skip_line,
    sleep,
    until,
)


def an_entry(given: Input | None = None, **limits: int) -> Any:
    """Return a stand-in for an entry, with all that a want uses."""
    table = SimpleNamespace(limits=Limits(**limits), now=1000.0)
    found = Input() if given is None else given
    return SimpleNamespace(table=table, input=found, output=Output(), result=MISSING)


def fed(want: Want[Any], data: bytes, size: int, **limits: int) -> Any:
    """Feed `data` to `want` in pieces of `size`, then the end. Returns the want's item and the input that is left."""
    entry = an_entry(**limits)
    for at in range(0, len(data), size):
        if (item := want.take(entry)) is not MISSING:
            return item, data[at - len(entry.input) :]
        before = len(entry.input)
        assert before == at, "nothing is taken until the item is there"
        entry.input.feed(data[at : at + size])
    item = want.take(entry)
    if item is MISSING:
        entry.input.ended = True
        item = want.take(entry)
    return item, entry.input.leftover()


@pytest.mark.parametrize(
    ("want", "data", "item", "left"),
    [
        (line(), b"one\ntwo\n", b"one\n", b"two\n"),
        (line(4), b"one\ntwo\n", b"one\n", b"two\n"),
        (line(4), b"one", MISSING, b"one"),
        (until(b"\r\n\r\n"), b"a: b\r\n\r\nbody", b"a: b\r\n\r\n", b"body"),
        (until(b"\r\n\r\n", 8), b"a: b\r\n\r\nbody", b"a: b\r\n\r\n", b"body"),
        (until(b";"), b"a\n", MISSING, b"a\n"),
        (exactly(0), b"abc", b"", b"abc"),
        (exactly(3), b"abcd", b"abc", b"d"),
        (exactly(5), b"abcd", MISSING, b"abcd"),
        (rest(4), b"abcd", b"abcd", b""),
        (rest(4), b"", b"", b""),
        (nothing(), b"abc", None, b"abc"),
        (ENDED, b"abc", MISSING, b"abc"),
    ],
)
def test_reads_take_their_item_whatever_the_split(want, data, item, left):
    for size in (1, 2, 3, 100):
        assert fed(want, data, size) == (item, left)


def test_skip_line_throws_away_what_comes_up_to_the_newline_or_the_end():
    entry = an_entry()
    for data in (b"too", b" long a line"):
        entry.input.feed(data)
        assert (skip_line().take(entry), len(entry.input)) == (MISSING, 0)
    entry.input.feed(b"\nnext\nlast")
    assert skip_line().take(entry) is None
    assert line().take(entry) == b"next\n"
    entry.input.ended = True
    assert (skip_line().take(entry), len(entry.input)) == (None, 0)


def test_skip_line_leaves_the_next_datagram():
    entry = an_entry(Inbox())
    for data in (b"one", b"two\n"):
        entry.input.deliver(data, 64)
    assert skip_line().take(entry) is None
    assert datagram().take(entry) == b"two\n"


def test_chunk_takes_what_has_arrived():
    entry = an_entry()
    assert chunk().take(entry) is MISSING
    entry.input.feed(b"abcde")
    assert [chunk(3).take(entry), chunk(3).take(entry), chunk(3).take(entry)] == [b"abc", b"de", MISSING]


@pytest.mark.parametrize(
    ("want", "data"),
    [(line(4), b"abcd\n"), (line(4), b"abcd"), (until(b"\r\n", 5), b"abcd\r\n"), (rest(4), b"abcde")],
)
def test_over_its_limit_a_read_is_refused(want, data):
    for size in (1, 2, 100):
        with pytest.raises(LimitExceeded) as caught:
            fed(want, data, size)
        assert caught.value.limit == want.limit


def test_exactly_is_bounded_by_the_engine():
    assert fed(exactly(64), b"x" * 64, 10, input_bytes_max=64) == (b"x" * 64, b"")
    with pytest.raises(LimitExceeded, match=r"exactly\(n=65\)") as caught:
        exactly(65).take(an_entry(input_bytes_max=64))
    assert caught.value.limit == 64, "before a byte of it has come"


def test_datagram_takes_one_whole():
    entry = an_entry(Inbox())
    assert datagram().take(entry) is MISSING
    for data in (b"one\nmore", b"", b"two\n"):
        entry.input.deliver(data, 64)
    assert [datagram().take(entry) for _ in range(2)] == [b"one\nmore", b""]
    assert line().take(entry) == b"two\n"
    with pytest.raises(TypeError, match="datagram servers"):
        datagram().take(an_entry())


def test_sleep_ends_when_it_is_due():
    entry = an_entry()
    assert sleep(5).take(entry) is MISSING, "nobody has begun it"
    begun = Sleeping(5, 1005.0)
    entry.table.now = 1004.9
    assert begun.take(entry) is MISSING
    entry.table.now = 1005.0
    assert begun.take(entry) is None
    assert repr(begun) == repr(sleep(5))


def test_flushed_waits_for_all_output():
    entry = an_entry()
    assert flushed().take(entry) is None
    entry.output.append(b"ab")
    assert flushed().take(entry) is MISSING
    entry.output.consume(1)
    assert flushed().take(entry) is MISSING
    entry.output.consume(1)
    assert flushed().take(entry) is None


@pytest.mark.parametrize("want", [call(len, b""), WRITABLE], ids=repr)
def test_posted_items_are_given_once(want):
    entry = an_entry()
    assert want.take(entry) is MISSING
    for item in (7, None, b"", KeyError("an error that is a result")):
        entry.result = item
        assert want.take(entry) is item
        assert want.take(entry) is MISSING
    error = ZeroDivisionError("in the call")
    entry.result = Failure(error)
    with pytest.raises(ZeroDivisionError) as caught:
        want.take(entry)
    assert caught.value is error
    assert want.take(entry) is MISSING


def slow(number: int) -> int:
    return number


WANTS = {
    "line(limit=512)": line(512),
    "line(limit=65536)": line(),
    "until(separator=b'\\r\\n', limit=65536)": until(b"\r\n"),
    "exactly(n=5)": exactly(5),
    "chunk(limit=65536)": chunk(),
    "rest(limit=9)": rest(limit=9),
    "datagram()": datagram(),
    "sleep(seconds=0.5)": sleep(0.5),
    "flushed()": flushed(),
    "nothing()": nothing(),
    "ended()": ENDED,
    "readable()": READABLE,
    "writable()": WRITABLE,
    "call(slow)": call(slow, 1),
    "parsed(parse=slow, limit=65536)": parsed(slow),
    "call(TestCase.method)": call(type("TestCase", (), {"method": lambda: None}).method),
}
WANTS["call(TestCase.method)"].fn.__qualname__ = "TestCase.method"


@pytest.mark.parametrize("text", WANTS)
def test_wants_are_small_immutable_values(text):
    want = WANTS[text]
    assert repr(want) == text
    assert isinstance(want, Want)
    assert not hasattr(want, "__dict__")
    for name in ("limit", "n", "fn", "anything"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(want, name, 1)
    assert repr(want) == text
    if not text.startswith("call"):
        assert hash(want) == hash(copy.copy(want))
        assert copy.deepcopy(want) == pickle.loads(pickle.dumps(want)) == want


@pytest.mark.parametrize(
    "make",
    [
        lambda: line(512),
        lambda: until(b"\r\n", 512),
        lambda: exactly(5),
        lambda: chunk(512),
        lambda: rest(512),
        lambda: sleep(5),
        datagram,
        flushed,
        nothing,
    ],
)
def test_equal_wants_are_one(make):
    assert make() is make()


def test_different_wants_differ():
    each = [line(1), line(2), chunk(1), rest(1), exactly(1), until(b"\n", 1), until(b"\n", 2), until(b";", 1), sleep(1)]
    assert len(set(each)) == len(each)
    assert line() is line(65_536)
    assert call(slow, 1) != call(slow, 1), "each call is run for itself"
    assert repr(call(functools.partial(slow, 1))).startswith("call(functools.partial(<function slow")


def test_call_keeps_what_it_was_given():
    want = call(slow, 1, 2, on="thread", key=3)
    assert (want.fn, want.args, want.kwargs, want.on) == (slow, (1, 2), {"key": 3}, "thread")
    assert call(slow).on is None


BAD = [
    *[(make, (bad,), "limit") for make in (line, chunk, rest) for bad in (0, -1, 1.0, True, None, "1")],
    *[(until, (b"\n", bad), "limit") for bad in (0, -1, 64.0, True, None)],
    *[(until, (bad,), "separator") for bad in (b"", "\n", None, 10)],
    (until, (bytearray(b"\n"),), None),  # Python's own TypeError will do
    *[(exactly, (bad,), "exactly") for bad in (-1, 1.0, None, "5", b"5")],
    *[(sleep, (bad,), "sleep") for bad in (-1, -0.001, nan)],
    *[(sleep, (bad,), None) for bad in (None, "1")],
    *[(call, (bad,), "call") for bad in (None, 5, "print")],
]


@pytest.mark.parametrize("make", [line, chunk, rest, until, exactly, sleep, call], ids=lambda make: make.__name__)
def test_wrong_arguments_are_refused_by_name(make):
    made = [line(1), chunk(1), rest(1), until(b"\n", 1), until(b"\n", 64), exactly(1), exactly(5), sleep(1)]
    assert made, "that a good one has been made does not let an equal bad one pass"
    for each, args, name in BAD:
        if each is make:
            with pytest.raises((ValueError, TypeError), match=name):
                print(each.__name__, args, each(*args))


def test_sleep_may_be_nothing_or_for_ever():
    assert sleep(0).seconds == 0
    assert sleep(inf).seconds == inf


def test_each_want_names_the_state_it_waits_in():
    after = {
        State.READING: [
            line(),
            skip_line(),
            until(b"\n"),
            exactly(1),
            chunk(),
            rest(1),
            datagram(),
            parsed(int),
            READABLE,
            nothing(),
        ],
        State.WRITING: [flushed(), WRITABLE, ENDED],
        State.SLEEPING: [sleep(1), Sleeping(1, 5.0)],
        State.READY: [TURN],
        State.OFFLOADED: [call(slow), STEP, VACANCY],
        State.DELEGATED: [hand_off("fork"), ELSEWHERE],
    }
    for state, each in after.items():
        assert {TRANSITIONS[State.RUNNING][want.awaits] for want in each} == {state}
    partial = [want for each in after.values() for want in each if want.takes_partial]
    assert partial == [line(), chunk(), rest(1)]
    named = {**vars(wants), **vars(engine_wants)}
    public = [name for name, each in named.items() if isinstance(each, type) and issubclass(each, Want)]
    before_any_step = [PROXY_HEADER, HANDSHAKE]
    bases = 4
    tested = bases + len(before_any_step) + sum(map(len, after.values()))
    assert len(public) == tested, "a want is not tested"


def test_a_want_is_awaited_for_its_item():
    async def handle() -> list[Any]:
        return [await line(), await NOTHING]

    coroutine = handle()
    assert coroutine.send(None) is line()
    assert coroutine.send(b"x\n") is NOTHING
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == [b"x\n", None]


def test_a_protocol_can_add_a_want():
    @wants.want_type
    class Netstring(Want[bytes]):
        most: int

        def take(self, entry: Any) -> Any:
            return entry.input.exactly(self.most)

    assert repr(Netstring(4)) == "netstring(most=4)"
    assert fed(Netstring(4), b"abcdef", 1) == (b"abcd", b"ef")
    assert Netstring(4).awaits is Event.AWAITS_INPUT
    with pytest.raises(NotImplementedError):
        Want().take(an_entry())


WANTED = [
    "call(len, b'')",
    "chunk()",
    "connect('tcp://127.0.0.1:7')",
    "datagram()",
    "disconnected()",
    "either(line())",
    "end_output()",
    "exactly(3)",
    "flushed()",
    "hand_off('thread')",
    "line()",
    "nothing()",
    "parsed(len)",
    "rest(3)",
    "skip_line()",
    "sleep(3)",
    "start_tls(cert='server.pem')",
    "told()",
    "until(b';')",
]


@pytest.mark.parametrize("want", WANTED)
def test_a_handler_that_makes_a_want_and_drops_it_is_refused(want, tmp_path):
    module = tmp_path / f"drops_{WANTED.index(want)}.py"
    module.write_text(
        f"from reqtable import *\n\nclass Drops(AsyncRequestHandler):\n    async def handle(self):\n        {want}\n"
    )
    with pytest.raises(HandlerError, match=want.partition("(")[0] + r"\("):
        exec(compile(module.read_text(), str(module), "exec"), {"__name__": module.stem})
