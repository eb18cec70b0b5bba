"""Requests that move from one table to another, by real sockets: each goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest

import reqtable
from reqtable import (
    Limits,
    State,
    StateRequestHandler,
    Transition,
    either,
    end_output,
    flushed,
    line,
    sleep,
    state,
    told,
)
from reqtable.server.invariants import InvariantBroken
from reqtable.table.deadlines import Deadlines
from reqtable.table.states import Ending
from reqtable.table.table import Entry
from tests.hosts import Host, client_of, hosts, move
from tests.support import open_descriptors

MUCH = bytes(range(256)) * 40_000  # more than a socket takes at once


class Adds(StateRequestHandler):
    """Answers each line with how many bytes have come in all."""

    total: int = 0

    @state(line(100), timeout=30)
    def command(self, text: bytes) -> Transition:
        self.total += len(text)
        if text == b"end\n":
            self.send(MUCH)
            return None
        if text == b"much\n":
            self.send(MUCH)
            return self.command
        if text == b"flush\n":
            self.send(MUCH)
            return self.flushed, flushed()
        if text == b"sleep\n":
            return self.awake, sleep(10)
        if text == b"either\n":
            return self.either, either(line(100), told(), sleep(10))
        if text == b"wait\n":
            return self.either, either(line(100), told())
        if text == b"half\n":
            self.send(b"last words")
            return self.ended, end_output()
        self.send(b"%d\n" % self.total)
        return self.command

    @state()
    def flushed(self, _: None) -> Transition:
        self.send(b"flushed\n")
        return self.command

    @state()
    def awake(self, _: None) -> Transition:
        self.send(b"awake %d\n" % self.total)
        return self.command

    @state(timeout=20)
    def either(self, arrived: Any) -> Transition:
        self.send(b"%d %r\n" % (arrived.index, arrived.item))
        return self.command

    def on_timeout(self) -> Transition:
        self.send(b"too late\n")
        return None

    @state()
    def ended(self, _: None) -> Transition:
        return self.quiet

    @state(line(100))
    def quiet(self, text: bytes) -> Transition:
        self.total += len(text)
        return self.quiet


def receive(client: socket.socket, host: Host, count: int) -> bytes:
    """Receive `count` bytes while the host runs."""
    client.settimeout(0.0)
    found = bytearray()

    def come() -> bool:
        try:
            data = client.recv(1_000_000)
        except BlockingIOError:
            return False
        found.extend(data)
        return not data or len(found) >= count

    host.until(lambda: come())
    return bytes(found)


def all_of(client: socket.socket, host: Host) -> bytes:
    return receive(client, host, 10**9)


def figures(entry: Entry) -> dict[str, Any]:
    """Return what a move leaves as it is. The deadline is a time on the clock of both tables."""
    names = ("id", "bytes_in", "bytes_out", "steps", "peer", "local", "deadline", "timeout", "began_at", "created_at")
    return {name: getattr(entry, name) for name in names} | {"input": entry.input.save(), "held": entry.held}


@pytest.fixture(params=["tcp", "unix"])
def both(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    options: dict[str, Any] = {}
    if request.param == "unix":
        options = {
            "kind": reqtable.UnixStreamServer,
            "address": str(tmp_path / "a"),
            "second_address": str(tmp_path / "b"),
        }
    before = open_descriptors()
    with hosts(Adds, high_water_bytes=10**8, **options) as made:
        yield made
    assert open_descriptors() == before


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_half_a_line_moves(both: tuple[Host, Host], seconds: float) -> None:
    first, second = both
    with client_of(first) as client:
        client.sendall(b"abc\nquart")
        entry = first.take()
        assert client.recv(100) == b"4\n"
        before = figures(entry)
        first.clock.jump(1)
        moved = move(first, second, entry, seconds)
        assert (moved.state, figures(moved), moved.moves) == (State.READING, before, 1)
        client.sendall(b"er\n")
        assert receive(client, second, 3) == b"12\n"
        second.clock.jump(30)
        assert all_of(client, second) == b"too late\n"


def test_unsent_output_moves(both: tuple[Host, Host]) -> None:
    first, second = both
    for word in (b"much\n", b"flush\n", b"end\n"):
        with client_of(first) as client:
            client.sendall(word)
            entry = first.take()
            assert entry.state is State.WRITING
            before = figures(entry)
            moved = move(first, second, entry, 2.0)
            assert moved.state is State.WRITING
            assert moved.deadline == before["deadline"] or moved.bytes_out > before["bytes_out"]
            found = receive(client, second, len(MUCH))
            if word == b"flush\n":
                found += receive(client, second, 8) if len(found) < len(MUCH) + 8 else b""
                assert found == MUCH + b"flushed\n"
            else:
                assert found[: len(MUCH)] == MUCH
            if word == b"end\n":
                assert all_of(client, second) == b""
            else:
                client.sendall(b"abcd\n")
                assert receive(client, second, 3) == b"%d\n" % (len(word) + 5)


class Patient(Adds):
    """Waits for each line for an hour."""

    @state(line(100), timeout=3600)
    def command(self, text: bytes) -> Transition:
        self.send(MUCH)
        return self.command


def test_the_time_for_output_is_not_that_for_the_next_input() -> None:
    """A past bug: a request that was frozen while it sent had its time to send as its time to wait for input."""
    with hosts(Patient) as (first, second), client_of(first) as client:
        client.sendall(b"much\n")
        entry = first.take()
        assert entry.state is State.WRITING
        client.setblocking(False)
        read = 0
        while read < len(MUCH) - entry.output.size:
            read += len(client.recv(2**20))
        record, sockets = first.freeze(entry)
        moved = second.table.get(second.table.restore([record], sockets)[0])
        first.let_go(entry)
        assert moved is not None
        while moved.state is not State.READING:
            with contextlib.suppress(BlockingIOError):
                read += len(client.recv(2**20))
            second.passes(1)
        assert moved.deadline == second.clock.now + 3600


def test_a_sleep_moves(both: tuple[Host, Host]) -> None:
    first, second = both
    with client_of(first) as client:
        client.sendall(b"sleep\n")
        entry = first.take()
        assert entry.state is State.SLEEPING
        first.clock.jump(4)
        before = figures(entry)
        moved = move(first, second, entry, 3)
        assert (moved.state, figures(moved)) == (State.SLEEPING, before)
        second.clock.jump(2.9)
        second.passes()
        assert moved.state is State.SLEEPING
        second.clock.jump(0.2)
        assert receive(client, second, 8) == b"awake 6\n"


@pytest.mark.parametrize("what", ["line", "told", "sleep", "timeout"])
def test_a_wait_for_several_things_moves(both: tuple[Host, Host], what: str) -> None:
    first, second = both
    with client_of(first) as client:
        client.sendall(b"wait\n" if what == "timeout" else b"either\n")
        entry = first.take()
        assert entry.state is State.WAITING
        before = figures(entry)
        moved = move(first, second, entry, 3)
        assert (moved.state, figures(moved)) == (State.WAITING, before)
        if what == "line":
            client.sendall(b"a line\n")
            assert receive(client, second, 5) == b"0 b'a line\\n'\n"
        elif what == "told":
            moved.handler.tell({"a": 1})
            assert receive(client, second, 5) == b"1 {'a': 1}\n"
        elif what == "sleep":
            second.clock.jump(6.9)
            second.passes()
            assert moved.state is State.WAITING
            second.clock.jump(0.2)
            assert receive(client, second, 5) == b"2 None\n"
        else:
            second.clock.jump(16.9)
            second.passes()
            assert moved.state is State.WAITING
            second.clock.jump(0.2)
            assert all_of(client, second) == b"too late\n"


def test_items_that_were_told_move(both: tuple[Host, Host]) -> None:
    first, second = both
    with client_of(first) as client:
        entry = first.take()
        entry.handler.tell("early")
        entry.handler.tell("late")
        moved = move(first, second, entry)
        client.sendall(b"either\n")
        assert receive(client, second, 5) == b"1 'early'\n"
        client.sendall(b"either\n")
        assert receive(client, second, 5) == b"1 'late'\n"
        assert moved.state is State.READING


def test_a_turn_moves(both: tuple[Host, Host]) -> None:
    first, second = both
    first.table.set_limits(reqtable.Limits(steps_per_pass=1))
    with client_of(first) as client:
        client.sendall(b"a\nb\nc\n")
        first.server._handle_request_noblock()
        entry = first.only()
        first.until(lambda: entry.state is State.READY and entry.handler.total)
        before = figures(entry)
        record, sockets = first.freeze(entry)
        first.passes()
        assert figures(entry) == before, "nothing steps a frozen request"
        second.table.restore([record], sockets)
        first.let_go(entry)
        assert receive(client, second, 6) == b"2\n4\n6\n"
        assert second.only().state is State.READING


def test_an_ended_output_moves(both: tuple[Host, Host]) -> None:
    first, second = both
    with client_of(first) as client:
        client.sendall(b"half\n")
        entry = first.take()
        assert all_of(client, first) == b"last words"
        moved = move(first, second, entry)
        assert moved.reach is not None
        assert moved.reach.output_ended
        client.sendall(b"more\n")
        second.passes()
        assert moved.handler.total == 10


# -- deadlines --------------------------------------------------------------------------------------------------------


class Reads(StateRequestHandler):
    """Has no timeout of its own."""

    @state(line(100_000))
    def command(self, text: bytes) -> Transition:
        self.send(b"%d\n" % len(text))
        return self.command


@pytest.mark.parametrize(("idle_s", "expected"), [(None, None), (100.0, 1080), (20.0, 1050)])
def test_the_limits_of_the_second_table_hold(idle_s: float | None, expected: int | None) -> None:
    """In the first one, 50 s are left until the deadline."""
    with hosts(Reads, idle_timeout_s=80) as (first, second), client_of(first):
        second.table.set_limits(Limits(idle_timeout_s=idle_s))
        entry = first.take()
        assert entry.deadline == 1080
        first.clock.jump(30)
        first.passes()
        moved = move(first, second, entry)
        assert moved.deadline == expected
        second.clock.jump(500)
        second.passes()
        assert moved.state is (State.READING if idle_s is None else State.LINGERING)


def test_a_client_that_was_fast_enough_before_the_move_gets_more_time() -> None:
    """It has 10 s for each 1,000 bytes."""
    with hosts(Reads, read_timeout_s=10.0, read_bytes_per_s_min=100) as (first, second), client_of(first) as client:
        client.sendall(b"x")
        entry = first.take()
        client.sendall(bytes(2000))
        first.clock.jump(9)
        first.passes()
        before = entry.deadline
        moved = move(first, second, entry)
        assert moved.deadline == before
        second.clock.jump(2)
        second.passes()
        client.sendall(b"\n")
        assert receive(client, second, 5) == b"2002\n"


# -- while a request is frozen ----------------------------------------------------------------------------------------


def frozen(host: Host, client: socket.socket, word: bytes) -> Entry:
    client.sendall(word)
    entry = host.take()
    host.engine.mover.freezer.freeze([entry])
    host.passes()
    assert entry.state is State.MOVING
    return entry


def thaw(host: Host, entry: Entry) -> None:
    host.engine.mover.freezer.thaw(entry)
    host.passes()


def test_nothing_happens_to_a_frozen_request(both: tuple[Host, Host]) -> None:
    first, _ = both
    with client_of(first) as client:
        entry = frozen(first, client, b"a\nhal")
        before = figures(entry)
        client.sendall(b"ved\n")
        first.clock.jump(100)
        first.passes()
        assert figures(entry) == before
        assert client.recv(100) == b"2\n"
        thaw(first, entry)
        assert receive(client, first, 2) == b"9\n", "its input is taken before its deadline, which has passed"


def test_a_deadline_that_passes_meanwhile_ends_the_wait_after_the_thaw(both: tuple[Host, Host]) -> None:
    first, _ = both
    with client_of(first) as client:
        entry = frozen(first, client, b"hal")
        first.clock.jump(100)
        first.passes()
        thaw(first, entry)
        assert all_of(client, first) == b"too late\n"


@pytest.mark.parametrize("word", [b"quiet", b"wait\n", b"sleep\n", b"much\n"])
def test_what_is_sent_to_a_frozen_request_is_sent_after_the_thaw(both: tuple[Host, Host], word: bytes) -> None:
    first, _ = both
    with client_of(first) as client:
        entry = frozen(first, client, word)
        entry.handler.send(b"from another request")
        first.passes()
        assert entry.held == len(entry.input) + entry.output.held
        thaw(first, entry)
        expected = (MUCH if word == b"much\n" else b"") + b"from another request"
        assert receive(client, first, len(expected)) == expected


def test_what_is_told_to_a_frozen_request_is_taken_after_the_thaw(both: tuple[Host, Host]) -> None:
    first, _ = both
    with client_of(first) as client:
        entry = frozen(first, client, b"wait\n")
        assert entry.handler.tell(5)
        first.passes()
        assert entry.state is State.MOVING
        thaw(first, entry)
        assert receive(client, first, 4) == b"1 5\n"


@pytest.mark.parametrize("word", [b"quiet", b"wait\n", b"sleep\n", b"much\n"])
def test_a_frozen_request_that_is_cancelled_ends_with_the_thaw(both: tuple[Host, Host], word: bytes) -> None:
    first, _ = both
    with client_of(first) as client:
        entry = frozen(first, client, word)
        assert first.table.cancel(entry.id)
        first.passes()
        assert entry.state is State.MOVING
        thaw(first, entry)
        assert not len(first.table)
        assert entry.ending is Ending.CANCELLED
        assert len(all_of(client, first)) < len(MUCH)


def test_a_client_that_resets_meanwhile_is_noticed_after_the_thaw(both: tuple[Host, Host]) -> None:
    first, _ = both
    with client_of(first) as client:
        entry = frozen(first, client, b"much\n")
    first.passes()
    assert entry.state is State.MOVING
    thaw(first, entry)
    first.until(lambda: not len(first.table))


def test_a_request_that_is_let_go_is_counted_as_moved_and_its_handler_is_not_told(both: tuple[Host, Host]) -> None:
    first, second = both
    closed: list[int] = []

    class Tells(Adds):
        def on_close(self) -> None:
            closed.append(self.entry.moves)

    first.server.RequestHandlerClass = second.server.RequestHandlerClass = Tells
    with client_of(first) as client:
        move(first, second, first.take())
        assert first.server.stats()["finished"]["moved"] == 1
        assert closed == []
        assert second.server.stats()["accepted"] == 1
        [row] = second.table.snapshot()
        assert row["moves"] == 1
        client.shutdown(socket.SHUT_WR)
        second.until(lambda: not len(second.table))
    assert closed == [1]
    assert not second.table.moves
    assert second.server.stats()["finished"] | {"done": 0} == dict.fromkeys(second.server.stats()["finished"], 0)


def test_a_mutation_of_the_freezer_is_found(both: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks after each pass see a frozen request whose deadline stays in the heap."""
    first, _ = both
    with client_of(first) as client:
        client.sendall(b"hal")
        entry = first.take()
        monkeypatch.setattr(Deadlines, "forget", lambda *_: None)
        first.engine.mover.freezer.freeze([entry])
        with pytest.raises(InvariantBroken, match="is being moved, but has a deadline in the heap"):
            first.passes()
        monkeypatch.undo()
        first.engine.steps.deadlines.forget(entry)
        thaw(first, entry)
