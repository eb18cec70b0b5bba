"""`StateRequestHandler`: transitions, hooks, declared fields, and the machine as a table."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import reqtable
from examples.notes import Notes
from reqtable import StateRequestHandler, call, exactly, line, nothing, sleep, state
from reqtable.testing import FakeClock
from tests.support import Client, served
from tests.test_loop import World


class Hooked(StateRequestHandler):
    """Answers in every hook, and goes on."""

    @state(line(limit=10), timeout=5)
    def command(self, text: bytes) -> Any:
        if text == b"raise\n":
            raise ValueError("as asked")
        if text == b"call\n":
            return self.called, call(int, "not a number")
        self.send(b"got " + text)
        return self.command

    @state()
    def called(self, item: object) -> Any:
        raise AssertionError

    def on_timeout(self) -> Any:
        self.send(b"timeout\n")
        return self.command

    def on_eof(self, partial: bytes) -> Any:
        self.send(b"eof after " + partial + b"\n")
        return self.command

    def on_limit(self, error: reqtable.LimitExceeded) -> Any:
        self.send(b"limit %d\n" % error.limit)
        return self.skip

    @state(exactly(11))
    def skip(self, rubbish: bytes) -> Any:
        return self.command

    def on_error(self, error: Exception) -> Any:
        self.send(type(error).__name__.encode() + b"\n")
        return self.command


def test_each_hook_may_go_on(clock: FakeClock) -> None:
    world = World(clock, Hooked)
    peer, entry = world.connect()
    for given, answer in [
        (b"a\n", b"got a\n"),
        (b"raise\n", b"ValueError\n"),
        (b"x" * 11, b"limit 10\n"),
        (b"b\n", b"got b\n"),
    ]:
        peer.send(given)
        world.passes()
        assert peer.recv(100) == answer
    world.jump(5)
    assert peer.recv(100) == b"timeout\n"
    peer.send(b"part")
    peer.shutdown(1)
    world.passes(2)
    assert peer.recv(100) == b"eof after part\n"
    assert peer.recv(100) == b""  # there is no second end of file to tell it of
    assert entry.state is reqtable.State.CLOSED
    world.close()


def test_what_a_call_raises_reaches_on_error() -> None:
    with served(Hooked) as server, Client(server.server_address) as client:
        assert client.ask(b"call\n") == b"ValueError\n"
        assert client.ask(b"on\n") == b"got on\n"


class Looked(StateRequestHandler):
    """Has the table listed in its first step, which has no state yet."""

    seen: ClassVar[list[weakref.ref[Any]]] = []
    sources: ClassVar[list[str | None]] = []

    def start(self) -> Any:
        self.seen.append(weakref.ref(self))
        self.sources.extend(row["source"] for row in self.entry.table.snapshot())


def test_a_listing_of_a_first_step_keeps_no_handler(clock: FakeClock) -> None:
    world = World(clock, Looked)
    world.connect()
    world.passes(3)
    assert [source.rpartition(":")[0] for source in Looked.sources if source] == [__file__]
    world.close()
    del world
    gc.collect()
    assert [each() for each in Looked.seen] == [None]


def test_notes_of_the_design() -> None:
    with served(Notes) as server, Client(server.server_address) as client:
        client.send(b"put 11\none two two")
        assert client.ask(b"count\n") == b"3\n"
        assert client.ask(b"rank\n") == b"rank 9\n"
        for wrong in (b"put abc\n", b"put -1\n", b"put\n", b"what?\n", b"\n"):
            assert client.ask(wrong) == b"put N, count, rank or bye?\n"
        assert client.send(b"bye\n").rest() == b""


def test_a_late_result_of_a_call_is_dropped(clock: FakeClock) -> None:
    import threading

    begun, go, gone = threading.Event(), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        go.wait(20)
        gone.set()
        return "late"

    class Impatient(StateRequestHandler):
        @state(call(slow), timeout=1)
        def called(self, item: str) -> Any:
            raise AssertionError(item)

        def on_timeout(self) -> Any:
            self.send(b"too slow\n")
            return self.waits

        @state(line())
        def waits(self, text: bytes) -> Any:
            self.send(text)

    world = World(clock, Impatient, real_threads=True)
    peer, entry = world.connect()
    assert entry.state is reqtable.State.OFFLOADED
    assert begun.wait(20)
    world.jump(1)
    assert peer.recv(100) == b"too slow\n"
    go.set()
    gone.wait(20)
    world.passes(3)
    assert entry.state is reqtable.State.READING
    peer.send(b"still here\n")
    world.passes()
    assert peer.recv(100) == b"still here\n"
    world.close()


def test_a_call_that_can_not_be_run_is_an_error_of_the_request(clock: FakeClock) -> None:
    class Wrong(Hooked):
        @state(call(int, on="nowhere"))
        def begin(self, item: int) -> Any:
            raise AssertionError

        def start(self) -> Any:
            return self.begin

    world = World(clock, Wrong)
    peer, _ = world.connect()
    world.passes(2)
    assert peer.recv(100) == b"ConfigurationError\n"
    world.close()


class Fields(StateRequestHandler):
    count: int = 0
    names: list[str] = []
    table: dict[str, int] = {"a": 1}
    unset: str
    shared: ClassVar[int] = 5
    _private: int = 0

    @state(line())
    def add(self, text: bytes) -> Any:
        self.count += 1
        self.names.append(text.decode().strip())
        self.table["a"] += 1
        self.send(repr(self.fields()).encode() + b"\n")
        return self.add


class MoreFields(Fields):
    more: tuple[int, ...] = (1, 2)


def test_declared_fields_are_each_requests_own() -> None:
    with served(Fields) as server, Client(server.server_address) as one, Client(server.server_address) as two:
        one.ask(b"x\n")
        assert one.ask(b"y\n") == b"{'count': 2, 'names': ['x', 'y'], 'table': {'a': 3}}\n"
        assert two.ask(b"z\n") == b"{'count': 1, 'names': ['z'], 'table': {'a': 2}}\n"
    assert (Fields.names, Fields.table) == ([], {"a": 1})
    assert Fields.field_names() == ["count", "names", "table", "unset"]
    assert MoreFields.field_names() == ["count", "names", "table", "unset", "more"]


def test_the_machine_is_a_table() -> None:
    command, body, ranked = Notes.states()
    assert command == (
        "command",
        "line(limit=512)",
        30,
        None,
        ("body", "command", "ranked", None),
        True,
        "Read a command.",
    )
    assert body == ("body", "by the transition", 60, None, ("command",), False, "Take the note.")
    assert ranked.successors == ("command",)


def test_successors_are_found_through_helpers_and_overrides() -> None:
    class Base(StateRequestHandler):
        @state(line())
        def first(self, text: bytes) -> Any:
            return self.choose(text)

        @state(line())
        def second(self, text: bytes) -> Any:
            return self.first if text else None

        def choose(self, text: bytes) -> Any:
            return self.second, exactly(len(text))

    class Derived(Base):
        @state(sleep(1), timeout=2, dispatch="pool")
        def second(self, text: Any) -> Any:
            return self.third

        @state()
        def third(self, item: None) -> Any: ...

    assert [(s.name, s.successors) for s in Base.states()] == [("first", ("second",)), ("second", ("first", None))]
    assert [(s.name, s.want, s.timeout, s.dispatch, s.successors, s.initial) for s in Derived.states()] == [
        ("first", "line(limit=65536)", None, None, ("second",), True),
        ("second", "sleep(seconds=1)", 2, "pool", ("third",), False),
        ("third", "nothing()", None, None, (None,), False),
    ]


def test_a_state_may_be_called_by_another() -> None:
    class Direct(StateRequestHandler):
        @state(line())
        def first(self, text: bytes) -> Any:
            return self.second(text.upper())

        @state(line())
        def second(self, text: bytes) -> Any:
            self.send(text)
            return self.second

    with served(Direct) as server, Client(server.server_address) as client:
        assert client.ask(b"up\n") == b"UP\n"
        assert client.ask(b"up\n") == b"up\n"


@pytest.mark.parametrize(
    ("want", "timeout", "error"), [(5, None, TypeError), (line, None, TypeError), (line(), 0, ValueError)]
)
def test_a_declaration_that_is_wrong_is_refused_where_it_stands(want: Any, timeout: Any, error: type) -> None:
    with pytest.raises(error):
        state(want, timeout=timeout)


@pytest.mark.parametrize("data", ["text", 5, None])
def test_send_takes_bytes(clock: FakeClock, data: Any) -> None:
    world = World(clock, Notes)
    _, entry = world.connect()
    with pytest.raises(TypeError, match="takes bytes"):
        entry.handler.send(data)
    world.close()


def test_a_mutable_buffer_is_sent_as_it_was(clock: FakeClock) -> None:
    class Reuse(StateRequestHandler):
        @state(nothing())
        def reuse(self, item: None) -> Any:
            buffer = bytearray(b"first")
            self.send(buffer)
            buffer[:] = b"again"
            self.send(memoryview(buffer))

    world = World(clock, Reuse)
    peer, _ = world.connect()
    assert peer.recv(100) == b"firstagain"
    world.close()


@dataclass
class Point:
    x: int = 0


def test_on_close_is_called_once_however_it_ends(clock: FakeClock) -> None:
    closed: list[str] = []

    class Closing(Hooked):
        where: Point = Point()

        def on_close(self) -> str:
            closed.append(f"{self.entry.id} {self.where.x}")
            self.send(b"nobody hears this")
            return "and nobody takes this"

    world = World(clock, Closing)
    first, _ = world.connect()
    _, second = world.connect()
    _, third = world.connect()
    first.close()
    world.passes()
    world.engine.table.cancel(second.id)
    world.passes()
    third.handler.where.x = 7
    world.close()
    assert closed == ["1 0", "2 0", "3 7"]


@pytest.mark.parametrize("name", ["start", "send", "on_eof", "states"])
def test_a_state_cannot_have_a_name_that_every_handler_has(name: str) -> None:
    def method(self: Any, item: Any) -> None:
        return None

    method.__name__ = name
    with pytest.raises(reqtable.HandlerError, match=rf"Bad\.{name}: .*: rename the state"):
        type("Bad", (StateRequestHandler,), {name: state()(method)})
