"""Records whose bytes may be anything, and values of every kind: what can't be read is refused with ReqtableError."""

from __future__ import annotations

import socket
import sys
import tracemalloc
from collections import Counter, OrderedDict, namedtuple
from dataclasses import dataclass, field
from enum import Enum, Flag, IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reqtable
from reqtable import NotMovable, ReqtableError, StateRequestHandler, Transition, line, state
from reqtable.table import plain
from reqtable.table.saving import head_of, read, save
from tests.fuzz_records import fuzz
from tests.hosts import client_of, hosts
from tests.support import open_descriptors, slow_but
from tests.test_record import NOW, Notes, a_suspended_row


class Color(Enum):
    RED = "red"
    BLUE = (1, 2)


class Level(IntEnum):
    LOW = 1


class Rights(Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: Any
    y: Any = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    name: Any


@dataclass
class Loose:
    first: Any
    second: Any = 5
    third: list[Any] = field(default_factory=list)


class Packed(msgspec.Struct):
    one: Any
    two: Any = None


class Nested:
    @dataclass
    class Inner:
        value: Any


@dataclass
class Runs:
    """Has a constructor that a reader must not call."""

    value: int

    def __post_init__(self) -> None:
        assert self.value != 13, "the constructor ran"


class Checked(msgspec.Struct):
    value: int

    def __post_init__(self) -> None:
        assert self.value != 13, "the constructor ran"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None))
    | st.binary()
    | st.sampled_from([*Color, *Level])
)
KEYS = st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text()) | st.sampled_from([*Color, "!"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.sets(KEYS),
        st.frozensets(KEYS),
        st.binary().map(bytearray),
        st.builds(Point, inner, inner),
        st.builds(Frozen, inner),
        st.builds(Loose, inner, inner),
        st.builds(Packed, inner),
        st.builds(Nested.Inner, inner),
    ),
    max_leaves=30,
)


def kinds_of(value: Any) -> Any:
    """Return the types within a value, in the order of the value."""
    if isinstance(value, dict):
        return dict, [(kinds_of(key), kinds_of(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [kinds_of(each) for each in value]
    if isinstance(value, set | frozenset):
        return type(value), Counter(map(type, value))
    if isinstance(value, Loose | Nested.Inner):
        return type(value), [kinds_of(each) for each in vars(value).values()]
    return type(value)


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_plain_data_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    again = plain.decode(plain.encode(value))
    assert again == value
    assert kinds_of(again) == kinds_of(value)


def test_what_equality_does_not_tell_comes_back_too() -> None:
    nan = plain.decode(plain.encode(float("nan")))
    assert nan != nan
    assert str(plain.decode(plain.encode(-0.0))) == "-0.0"
    assert plain.decode(plain.encode({True: 1})).popitem()[0] is True
    assert plain.decode(plain.encode(Color.BLUE)) is Color.BLUE
    assert list(plain.decode(plain.encode({"b": 1, "a": 2}))) == ["b", "a"], "a dict keeps its order"
    assert plain.decode(plain.encode(10**5000)) == 10**5000, "more digits than Python turns into text"


@given(st.binary(max_size=300))
@settings(max_examples=1000, deadline=None)
def test_garbage_is_refused_in_one_way(data: bytes) -> None:
    for read_it in (plain.decode, head_of):
        try:
            read_it(data)
        except ReqtableError:
            continue
        assert read_it is plain.decode, "garbage can be plain data, but no record"


A_RECORD = save(a_suspended_row(), "boot").record


@given(st.data())
@settings(max_examples=1000, deadline=None)
def test_a_record_with_other_bytes_is_read_or_refused(data: st.DataObject) -> None:
    spoiled = bytearray(A_RECORD)
    for _ in range(data.draw(st.integers(1, 5))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(spoiled)))
    for each in (spoiled, spoiled[:cut]):
        try:
            record = read(head_of(bytes(each)), Notes, NOW)
        except ReqtableError:
            continue
        assert isinstance(record.fields, dict)


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 100_000 + b"\xc0",
        b"\x81\xa1!" * 50_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode({"!": "bytearray", "v": 2**62}),
        msgspec.msgpack.encode({"!": "int", "v": "9" * 100}),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(5, b"abc")),
        b"\xd6\xff\x00\x00\x00\x00",  # a time
    ],
    ids=range(9),
)
def test_bytes_that_promise_much_take_little(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ReqtableError):
            plain.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {(1, 2): value}
    return value


def test_the_depth_that_can_be_written_can_be_read() -> None:
    deepest = nested(plain.DEPTH_MAX)
    assert plain.decode(plain.encode(deepest)) == deepest
    with pytest.raises(NotMovable, match="nested more than 64 deep, or contain themselves"):
        plain.encode(nested(plain.DEPTH_MAX + 2))


def objects(name: str, **values: Any) -> bytes:
    """Return the bytes of an object of that class."""
    return msgspec.msgpack.encode({"!": "object", "c": name, "v": values})


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen",
        "os:system",
        "builtins:dict",
        "builtins:object",
        "tests.test_record_attack:Color",
        "tests.test_record_attack:Checked",
        "tests.test_record_attack:Nested",
        "tests.test_record_attack:test_garbage_is_refused_in_one_way",
        "tests.test_record_attack:Frozen.__init__",
        "pathlib:Path",
        "",
        ":",
        "this:s",
        "antigravity:fly",
    ],
)
def test_objects_of_no_plain_class_are_refused_and_nothing_is_imported(name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(ReqtableError, match=f"^{name} is not there as a class of plain data$"):
        plain.decode(objects(name, args="true"))
    assert plain.decode(objects(name, args="true"), lenient=True) == {"args": "true"}
    assert set(sys.modules) == before


def test_no_constructor_runs() -> None:
    assert plain.decode(objects("tests.test_record_attack:Runs", value=13)).value == 13
    with pytest.raises(NotMovable, match=r"^a tests\S+Checked has a __post_init__, which a copy must not run$"):
        plain.encode(Checked(1))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (OrderedDict(), "a collections.OrderedDict is no plain data"),
        (Counter(), "a collections.Counter is no plain data"),
        (Path(), "is no plain data"),
        (type("Name", (str,), {})("x"), "is no plain data"),
        (range(3), "a builtins.range is no plain data"),
        (Rights.READ | Rights.WRITE, "is no single member of Rights"),
        (namedtuple("Local", "a")(1), "Local can't be found by its name: define it at the top of a module"),
        (dataclass(type("Also", (dict,), {"__annotations__": {"a": int}}))(1), "has more than its fields"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_is_no_plain_data_says_so(value: Any, reason: str) -> None:
    with pytest.raises(NotMovable) as raised:
        plain.encode([value])
    assert reason in str(raised.value)


def test_an_object_with_more_or_less_than_its_fields_is_not_cut_down() -> None:
    more = Loose(1)
    more.cache = 2  # type: ignore[attr-defined]
    with pytest.raises(NotMovable, match=r"^a \S+Loose has the attribute 'cache', which is no field$"):
        plain.encode(more)
    less = Loose(1)
    del less.first
    with pytest.raises(NotMovable, match=r"^a \S+Loose has no value for its field 'first'$"):
        plain.encode(less)


@pytest.mark.parametrize(
    "want",
    [
        ["Call", {"fn": 1, "args": [], "kwargs": {}, "on": None, "place": None}],
        ["Elsewhere", {}],
        ["Turn", {}],
        ["reqtable.table.connecting:Connect", {}],
        ["reqtable.loop.waiting:BegunCall", {}],
        ["subprocess:Popen", {"args": "true"}],
        ["Line", {"limit": 5, "more": 1}],
        ["Line", {}],
        ["Parsed", {"parse": "os:system", "limit": 5}],
        ["Parsed", {"parse": "tests.support:open_descriptors", "limit": 5}],
        ["Parsed", {"parse": "builtins:eval", "limit": 5}],
        ["Parsed", {"parse": "tests.test_record:Notes", "limit": 5}],
        ["Parsed", {"parse": "reqtable.handlers.state:lru_cache", "limit": 5}],
        ["Either", {"wants": [1]}],
        ["Either", {"wants": 1}],
        ["OfConnection", {"want": None, "row": 0}],
        ["Sleeping", {"seconds": 1, "left": "x"}],
        [5, {}],
        5,
    ],
    ids=repr,
)
def test_a_record_that_waits_for_what_is_no_data_is_refused(want: Any) -> None:
    before = set(sys.modules)
    with pytest.raises(ReqtableError):
        read(with_want(want), Notes, NOW)
    assert set(sys.modules) == before


def with_want(want: Any) -> Any:
    """Return the head of a record whose body has that want."""
    head = msgspec.msgpack.decode(A_RECORD)
    body = msgspec.msgpack.decode(head[-1])
    [place] = [number for number, each in enumerate(body) if isinstance(each, dict) and each.get("!") == "want"]
    body[place] = {"!": "want", "v": want}
    head[-1] = msgspec.msgpack.encode(body)
    return head_of(msgspec.msgpack.encode(head))


def test_every_value_of_a_record_is_of_its_type() -> None:
    """Each value in turn is replaced by values of other types. Nothing but ReqtableError may come of it."""
    others: list[Any] = [
        None,
        True,
        5,
        -1,
        2.5,
        float("nan"),
        "x",
        b"x",
        [],
        [1],
        {},
        {"a": 1},
        {"!": "tuple", "v": [1]},
    ]
    head = msgspec.msgpack.decode(A_RECORD)
    refused = 0
    for place in range(len(head) - 1):
        for other in others:
            spoiled = [*head]
            spoiled[place] = other
            refused += not can_be_read(msgspec.msgpack.encode(spoiled))
    body = msgspec.msgpack.decode(head[-1])
    for place in range(len(body)):
        for other in others:
            spoiled = [*body]
            spoiled[place] = other
            refused += not can_be_read(msgspec.msgpack.encode([*head[:-1], msgspec.msgpack.encode(spoiled)]))
    assert refused > 200


def can_be_read(data: bytes) -> bool:
    try:
        read(head_of(data), Notes, NOW)
    except ReqtableError:
        return False
    return True


# -- restore ----------------------------------------------------------------------------------------------------------


class Echo(StateRequestHandler):
    seen: int = 0

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.seen += 1
        self.send(text)
        return self.command


class Fails(Echo):
    def __init__(self, entry: Any) -> None:
        if fails:
            raise RuntimeError("on purpose")
        super().__init__(entry)


fails: list[int] = []


def test_a_refused_restore_leaves_the_table_and_the_sockets_as_they_were() -> None:
    before = open_descriptors()
    with hosts(Echo, after=Fails) as (first, second), client_of(first) as client:
        client.sendall(b"a\nhal")
        entry = first.take()
        assert client.recv(10) == b"a\n"
        [record] = first.table.save()
        head = msgspec.msgpack.decode(record)
        others = [*head]
        others[6] = 2  # its version
        own = entry.transport.request.dup()
        also = entry.transport.request.dup()
        within = open_descriptors()
        for records, sockets, why in (
            ([record], [], "these records need 1 sockets and files, but 0 are given"),
            ([record], [own, also], "these records need 1 sockets and files, but 2 are given"),
            ([b"x"], [own], "not a record of format 1"),
            ([record, record[:-1]], [own, also], "not plain data: DecodeError"),
            (
                [record, msgspec.msgpack.encode(others)],
                [own, also],
                "Fails has state_version 1, but request 1 is of ver",
            ),
            ([record, record], [own, object()], "request 1 can't go on with its socket: AttributeError"),
        ):
            with pytest.raises(ReqtableError) as raised:
                second.table.restore(records, sockets)
            assert str(raised.value).startswith(why)
            second.passes()
            assert not len(second.table)
            assert open_descriptors() == within
        fails.append(1)
        try:
            with pytest.raises(ReqtableError, match=r"^request 1 can't go on: RuntimeError\('on purpose'\)$"):
                second.table.restore([record], [own])
        finally:
            fails.clear()
        second.passes()
        assert not len(second.table)
        assert open_descriptors() == within
        also.close()
        first.freeze(entry)[1][0].close()
        assert second.table.restore([record], [own]) == [1]
        first.let_go(entry)
        client.sendall(b"f\n")
        second.passes()
        assert client.recv(10) == b"half\n"
    assert open_descriptors() == before


def test_a_request_whose_id_is_taken_gets_the_next_one() -> None:
    with hosts(Echo) as (first, second), client_of(first), client_of(second):
        entry = first.take()
        taken = second.take()
        record, sockets = first.freeze(entry)
        assert second.table.restore([record], sockets) == [2]
        assert second.table.get(1) is taken
        first.let_go(entry)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dispatch": "thread"}, "request 1 can't go on under policy 'thread', which takes whole requests"),
        ({"dispatch": "fork"}, "request 1 can't go on under policy 'fork', which takes whole requests"),
        ({"kind": reqtable.UDPServer}, r"request 1 came on a stream, but \S+ has others"),
    ],
)
def test_a_server_that_can_not_go_on_with_a_request_refuses_it(options: Any, why: str) -> None:
    with hosts(Echo) as (first, _), hosts(Echo, **options) as (other, _), client_of(first) as client:
        entry = first.take()
        [record] = first.table.save()
        with pytest.raises(ReqtableError, match=f"^{why}$"), entry.transport.request.dup() as own:
            other.table.restore([record], [own])
        assert isinstance(client, socket.socket)


def test_a_step_can_not_restore() -> None:
    class Restores(Echo):
        @state(line())
        def command(self, text: bytes) -> Transition:
            try:
                self.entry.table.restore([], [])
            except ReqtableError as error:
                self.send(str(error).encode())
            return self.command

    with hosts(Restores) as (first, _), client_of(first) as client:
        client.sendall(b"x\n")
        first.take()
        assert client.recv(100) == b"a step can't call restore(): have the loop call it, by engine.post()"


# -- by seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", slow_but([1000], 100))
def test_spoiled_records_do_no_harm(seeds: int) -> None:
    assert fuzz(range(seeds)) == []
