"""Deadlines for reading, newcomers when the table is full, and the counters for both."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import socket
import socketserver
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, Limits, exactly, line, state
from reqtable.dispatch.pickled_steps import reference_to, resolve
from reqtable.loop.platform import System
from reqtable.table.addresses import network_of
from reqtable.testing import Client as Script
from reqtable.testing import FakeClock, Faults, SimNetwork, exercise, simulate
from tests.support import Client, served, serving, wait_until

SERVER = ("127.0.0.1", 0)


class Lines(reqtable.StateRequestHandler):
    refusal = b"busy\n"

    @state(line(limit=1_000_000))
    def one(self, text: bytes) -> Any:
        if text == b"quit\n":
            return None
        if text == b"body\n":
            return self.body, exactly(100_000)
        if text == b"fail\n":
            raise KeyError("a bug")
        self.send(text)
        return self.one

    @state()
    def body(self, data: bytes) -> Any:
        self.send(b"%d\n" % len(data))
        return self.one

    @state(timeout=300)
    def patient(self, data: bytes) -> Any:
        return self.one


class Words(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        with contextlib.suppress(TimeoutError):
            while text := await self.read(line()):
                if text == b"fail\n":
                    raise KeyError("a bug")
                await self.send(text)


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [Lines, Words])
def test_what_trickles_in_has_a_bounded_time_from_its_first_byte(handler: Any) -> None:
    loris = exercise(handler, limits=Limits(read_timeout_s=30)).jump(1000)  # silence is not slowness
    for _ in range(5):
        loris.send(b"x").jump(5)
    assert not loris.is_over
    loris.send(b"x").jump(5.1)
    assert loris.is_over


def test_a_line_that_comes_in_time_makes_the_next_one_wait_anew() -> None:
    talker = exercise(Lines, limits=Limits(read_timeout_s=30))
    for _ in range(10):
        talker.send(b"a").jump(20).send(b"b\n").expect(b"ab\n").jump(20)
    talker.send(b"done\nbegun").expect(b"done\n").jump(29)
    assert not talker.is_over
    talker.jump(1.1)
    assert talker.is_over


def test_what_comes_fast_enough_may_take_its_time() -> None:
    limits = Limits(read_timeout_s=10, read_bytes_per_s_min=100)
    upload = exercise(Lines, limits=limits).send(b"body\n")
    for _ in range(180):
        upload.send(bytes(550)).jump(5)
    upload.send(bytes(1000)).expect(b"100000\n").end().expect_end()
    slow = exercise(Lines, limits=limits).send(b"body\n").send(bytes(5000))
    slow.jump(9).send(bytes(900)).jump(2)
    assert not slow.is_over, "it was fast at first"
    slow.send(bytes(10)).jump(10)
    assert slow.is_over


def test_a_timeout_that_is_named_is_the_only_one() -> None:
    class Patient(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            with contextlib.suppress(TimeoutError):
                await self.read(exactly(3), timeout=300)

    one = exercise(Patient, limits=Limits(read_timeout_s=10, idle_timeout_s=5)).jump(200).send(b"a").jump(99)
    assert not one.is_over
    one.jump(1.1)
    assert one.is_over


@pytest.mark.parametrize("handler", [Lines, Words])
def test_a_silent_peer_has_a_bounded_time_where_there_is_a_bound(handler: Any) -> None:
    talker = exercise(handler, limits=Limits(idle_timeout_s=60))
    for _ in range(3):
        talker.jump(59).send(b"a\n").expect(b"a\n")
    talker.jump(60.1)
    assert talker.is_over


# -- no room ----------------------------------------------------------------------------------------------------------


class Gate:
    """Runs a server to which the tests offer connections one by one."""

    def __init__(self, clock: FakeClock, **limits: Any) -> None:
        self.network = SimNetwork(faults=Faults.none(), clock=clock)
        with self.network.installed():
            config = reqtable.Config(limits=Limits(**limits))
            self.server = reqtable.TCPServer(SERVER, Lines, config=config)
        self.clock = clock
        self.engine = self.server.engine
        self.engine.loop.open()

    def offer(self, host: str = "198.51.100.7", *rest: int) -> socket.socket:
        ours, theirs = self.network.pair()
        theirs.setblocking(False)
        self.server.process_request(ours, (host, 5000 + self.engine.table.last_id, *rest))
        return theirs

    def run(self, seconds: float = 0.0) -> None:
        self.clock.jump(seconds)
        self.engine.loop.run_once(0)


@pytest.fixture
def gate(clock: FakeClock, request: pytest.FixtureRequest) -> Iterator[Gate]:
    made = Gate(clock, **request.param)
    yield made
    made.server.server_close()


def gated(**limits: Any) -> Any:
    return pytest.mark.parametrize("gate", [limits], indirect=True)


def end(peer: socket.socket) -> bytes:
    """Return everything that the peer received up to the end of file. Raises BlockingIOError if the end is missing."""
    told = b""
    while more := peer.recv(100):
        told += more
    return told


@gated(entries_max=2, when_full="reject")
def test_a_full_table_refuses_with_the_handlers_word(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    peers = [gate.offer() for _ in range(5)]
    assert [end(peer) for peer in peers[2:]] == [b"busy\n"] * 3
    assert len(gate.engine.table) == 2
    peers[0].close()
    gate.run()
    gate.run()
    last = gate.offer()
    with pytest.raises(BlockingIOError):
        last.recv(1)
    stats = gate.server.stats()
    assert (stats["accepted"], stats["refused"], stats["entries"]) == (3, {"entries_max": 3}, 2)
    (record,) = caplog.records
    assert record.getMessage().startswith("198.51.100.7:5002 was refused: entries_max is 2 ")
    gate.run(11)
    for _ in range(4):
        gate.offer()
    assert "(refused since the last such line: 3 for entries_max)" in caplog.records[1].getMessage()
    assert len(caplog.records) == 2


@gated(entries_max=3, when_full="evict")
def test_a_full_table_lets_the_longest_idle_go(gate: Gate) -> None:
    peers = []
    for _ in range(3):
        peers.append(gate.offer())
        gate.run(1)
    peers[0].send(b"active\n")
    gate.run(1)
    assert peers[0].recv(100) == b"active\n"
    gate.offer()
    gate.run()
    assert end(peers[1]) == b""
    gate.offer()
    gate.run()
    assert end(peers[2]) == b""
    with pytest.raises(BlockingIOError):
        peers[0].recv(1)
    stats = gate.server.stats()
    assert (stats["finished"]["limit"], stats["refused"]) == (2, {"evicted": 2})


@gated(entries_per_peer_max=2)
def test_one_peer_can_not_take_all_the_room(gate: Gate) -> None:
    first = [gate.offer("198.51.100.7") for _ in range(3)]
    assert end(first[2]) == b"busy\n"
    others = [gate.offer("198.51.100.8"), gate.offer("::ffff:198.51.100.8", 0, 0)]
    assert end(gate.offer("198.51.100.8")) == b"busy\n"
    gate.offer("2001:db8::1", 0, 0)
    gate.offer("2001:db8::ffff:1", 0, 0)
    assert end(gate.offer("2001:db8:0:0:1::1", 0, 0)) == b"busy\n", "a /64 is one"
    gate.offer("2001:db8:0:1::1", 0, 0)
    for peer in others:
        peer.close()
    gate.run()
    gate.run()
    gate.offer("198.51.100.8")
    assert gate.server.stats()["refused"] == {"entries_per_peer_max": 3}


@gated(entries_per_peer_max=1, when_full="evict")
def test_a_peer_that_has_its_share_may_lose_its_idlest(gate: Gate) -> None:
    old = gate.offer("198.51.100.7")
    other = gate.offer("198.51.100.8")
    gate.run(1)
    new = gate.offer("198.51.100.7")
    gate.run()
    assert end(old) == b""
    for peer in (other, new):
        with pytest.raises(BlockingIOError):
            peer.recv(1)


@gated(buffered_bytes_max=100_000)
def test_who_holds_most_goes_when_all_hold_too_much(gate: Gate) -> None:
    peers = [gate.offer() for _ in range(4)]
    for number, peer in enumerate(peers):
        peer.send(b"body\n" + bytes(20_000 + 5000 * number))
    for _ in range(3):
        gate.run()
    assert gate.engine.table.buffered == 20_000 + 25_000 + 30_000
    assert end(peers[3]) == b""
    stats = gate.server.stats()
    assert (stats["finished"]["limit"], stats["buffered_bytes"]) == (1, 75_000)
    peers[0].send(bytes(80_000))
    for _ in range(5):
        gate.run()
    assert gate.engine.table.buffered <= 100_000


class Files(reqtable.StateRequestHandler):
    @state(line())
    def one(self, text: bytes) -> Any:
        self.send(bytes(500_000) if text == b"big\n" else text)
        return self.one


def test_who_is_sent_little_does_not_wait_for_all_who_are_sent_much() -> None:
    """All requests share the bytes of a pass, and take turns from pass to pass."""
    config = reqtable.Config(limits=Limits(pass_bytes=100_000, send_bytes=50_000))
    with reqtable.TCPServer(SERVER, Files, config=config) as server, contextlib.ExitStack() as stack:
        server.engine.loop.open()
        peers = []
        for text in [b"big\n"] * 50 + [b"small\n"]:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs).sendall(text)
            theirs.setblocking(False)
            server.process_request(ours, ("198.51.100.7", len(peers)))
            peers.append(theirs)
        *many, small = peers
        got = [0] * len(many)

        def take() -> int:
            taken = 0
            for number, peer in enumerate(many):
                with contextlib.suppress(BlockingIOError):
                    while more := len(peer.recv(1_000_000)):
                        got[number] += more
                        taken += more
            return taken

        server.engine.loop.run_once(0)
        assert 100_000 <= take() <= 150_000
        assert small.recv(100) == b"small\n"
        for _ in range(30):
            server.engine.loop.run_once(0)
            assert take() <= 150_000
        assert min(got) > 0, "nobody is left out"
        for _ in range(600):
            server.engine.loop.run_once(0)
            take()
        assert set(got) == {500_000}


def test_the_rate_of_new_requests_is_bounded() -> None:
    """The server accepts a second's worth at once, then one at a time. The others wait in the kernel's queue."""
    config = reqtable.Config(limits=Limits(accepts_per_s_max=5))
    times: list[float] = []

    class Timing(reqtable.TCPServer):
        request_queue_size = 100

        def verify_request(self, request: Any, client_address: Any) -> bool:
            times.append(self.table.now)
            return True

    clients = [Script().send(b"a\n").expect(b"a\n").end().expect_end() for _ in range(20)]
    report = simulate(lambda: Timing(SERVER, Lines, config=config), clients, seed=3, faults=Faults.none())
    assert report.requests == 20
    assert times[4] - times[0] < 0.1
    assert [later - earlier for earlier, later in itertools.pairwise(times[5:])] == pytest.approx([0.2] * 14)


def test_who_come_one_at_a_time_at_that_rate_do_not_wait(clock: FakeClock) -> None:
    """Each connection is accepted at once: an accept(2) that finds no connection doesn't count."""
    with reqtable.TCPServer(SERVER, Lines) as server, contextlib.ExitStack() as stack:
        reqtable.Engine(limits=Limits(accepts_per_s_max=5), system=System(clock=clock)).add(server)
        server.engine.listeners.listen(server)
        for number in range(20):
            stack.enter_context(socket.create_connection(server.server_address))
            clock.jump(0.2)
            server.engine.loop.run_once(0)
            assert server.table.last_id == number + 1


@pytest.mark.parametrize(
    ("address", "network"),
    [
        (("192.0.2.1", 80), "192.0.2.1"),
        (("2001:db8:1:2:3:4:5:6", 80, 0, 0), "2001:db8:1:2::"),
        (("fe80::1%eth0", 80, 0, 2), "fe80::"),
        (("::ffff:192.0.2.1", 80, 0, 0), "192.0.2.1"),
        (("odd:name", 1), "odd:name"),
        ("/run/peer.sock", None),
        (b"\0abstract", None),
        (None, None),
    ],
)
def test_what_counts_as_one_peer(address: Any, network: str | None) -> None:
    assert network_of(address) == network


# -- under every policy -----------------------------------------------------------------------------------------------


class Blocking(reqtable.StreamRequestHandler):
    refusal = b"busy\n"

    def handle(self) -> None:
        for text in self.rfile:
            if text == b"fail\n":
                raise KeyError("a bug")
            self.wfile.write(text)


class Caller(Client):
    def close(self) -> None:
        self.hang_up()  # the children have copies of the socket


EVERYWHERE = [(Lines, policy) for policy in ("inline", "thread", "pool", "fork", "executor")]
EVERYWHERE += [(Words, policy) for policy in ("thread", "pool", "fork")]
EVERYWHERE += [(Blocking, policy) for policy in ("greenlet", "thread", "pool", "fork")]
HOLDS_EVERYWHERE = pytest.mark.parametrize(("handler", "dispatch"), EVERYWHERE)


@contextlib.contextmanager
def limited(handler: Any, dispatch: str, **limits: Any) -> Iterator[Any]:
    config = reqtable.Config(dispatch=dispatch, limits=Limits(**limits))
    with serving(reqtable.TCPServer(SERVER, handler, config=config)) as server:
        yield server


@HOLDS_EVERYWHERE
@pytest.mark.parametrize("reason", ["entries_max", "entries_per_peer_max"])
def test_there_is_no_more_room_than_there_is(handler: Any, dispatch: str, reason: str) -> None:
    with limited(handler, dispatch, when_full="reject", **{reason: 2}) as server:
        address = server.server_address
        with Caller(address) as one, Caller(address) as two:
            assert (one.ask(b"1\n"), two.ask(b"2\n")) == (b"1\n", b"2\n")
            with Caller(address) as refused:
                assert refused.rest() == getattr(handler, "refusal", b"")
            assert two.ask(b"still\n") == b"still\n"
            one.close()
            wait_until(server, lambda: len(server.table) == 1)
            with Caller(address) as third:
                assert third.ask(b"3\n") == b"3\n"
        wait_until(server, lambda: not server.table)
        assert (server.stats()["accepted"], server.stats()["refused"]) == (3, {reason: 1})


@HOLDS_EVERYWHERE
def test_the_longest_idle_goes_where_anyone_can_tell_who_that_is(handler: Any, dispatch: str) -> None:
    with limited(handler, dispatch, when_full="evict", entries_max=2) as server:
        address = server.server_address
        known = dispatch not in ("thread", "fork") and (handler, dispatch) != (Blocking, "pool")
        with Caller(address) as one, Caller(address) as two:
            assert (one.ask(b"1\n"), two.ask(b"2\n")) == (b"1\n", b"2\n")
            with Caller(address) as third:
                if known:
                    assert (third.ask(b"3\n"), one.rest()) == (b"3\n", b"")
                else:
                    assert third.rest() == getattr(handler, "refusal", b"")
                    assert one.ask(b"still\n") == b"still\n"
            assert two.ask(b"still\n") == b"still\n"
        wait_until(server, lambda: not server.table)
        assert server.stats()["refused"] == ({"evicted": 1} if known else {"entries_max": 1})


@HOLDS_EVERYWHERE
def test_a_whole_request_has_a_bounded_time(handler: Any, dispatch: str) -> None:
    with limited(handler, dispatch, request_timeout_s=0.5) as server:
        if dispatch == "executor":  # the process is started and has imported the handler: that takes its time
            server._policies.chosen._workers.submit(resolve, reference_to(handler)).result()
        with Caller(server.server_address) as silent, Caller(server.server_address) as talker:
            answered = 0
            with contextlib.suppress(ConnectionError):
                while talker.ask(b"more\n") == b"more\n":
                    answered += 1
            assert answered > 1
            assert silent.rest() == b""
        wait_until(server, lambda: not server.table)
        finished = server.stats()["finished"]
    assert finished["timeout"] == 2


@HOLDS_EVERYWHERE
def test_a_bug_of_a_handler_is_counted_as_one(handler: Any, dispatch: str) -> None:
    with limited(handler, dispatch) as server, Caller(server.server_address) as client:
        assert client.send(b"fail\n").rest() == b""
        client.close()  # nobody has to linger
        wait_until(server, lambda: not server.table)
        assert server.stats()["finished"]["error"] == 1


@pytest.mark.parametrize("handler", [Lines, Words])
@pytest.mark.parametrize("dispatch", ["inline", "thread", "pool"])
def test_a_timeout_is_counted_as_one_however_politely_it_is_taken(handler: Any, dispatch: str) -> None:
    with limited(handler, dispatch, read_timeout_s=0.05) as server, Caller(server.server_address) as client:
        assert client.send(b"not all").rest() == b""
        client.close()  # nobody has to linger
        wait_until(server, lambda: not server.table)
        assert server.stats()["finished"]["timeout"] == 1


# -- limits that contradict each other --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("high_water_bytes", "output_bytes_max"),
        ("output_bytes_max", "buffered_bytes_max"),
        ("input_bytes_max", "buffered_bytes_max"),
        ("entries_per_peer_max", "entries_max"),
    ],
)
def test_what_contradicts_is_refused_where_both_were_set(narrow: str, wide: str, tmp_path: Path) -> None:
    Limits(**{narrow: 1000, wide: 1000})
    refused = f"{narrow} \\(1001\\) must not be above {wide} \\(1000\\): lower it, or raise {wide}$"
    with pytest.raises(ValueError, match=f"^{refused}"):
        Limits(**{narrow: 1001, wide: 1000})
    file = tmp_path / "reqtable.toml"
    file.write_text(f"[limits]\n\n{narrow} = 1001\n{wide} = 1000\n")
    with pytest.raises(reqtable.ConfigurationError, match=rf"reqtable.toml:3: {refused}"):
        reqtable.Config.load(file)


@pytest.mark.parametrize(
    ("given", "gives_way"),
    [
        (
            {"buffered_bytes_max": 10_000},
            dict.fromkeys(("output_bytes_max", "input_bytes_max", "high_water_bytes"), 10_000),
        ),
        ({"output_bytes_max": 1000}, {"high_water_bytes": 1000}),
        ({"high_water_bytes": 2**27}, {"output_bytes_max": 2**27}),
        ({"high_water_bytes": 2**31}, {"output_bytes_max": 2**31, "buffered_bytes_max": 2**31}),
        ({"input_bytes_max": 2**31}, {"buffered_bytes_max": 2**31}),
        ({"input_bytes_max": 2**31, "buffered_bytes_max": None}, {}),
        ({"buffered_bytes_max": 2**20}, {"input_bytes_max": 2**20, "output_bytes_max": 2**20}),
        ({"entries_per_peer_max": 200_000}, {"entries_max": 200_000}),
        ({"entries_max": 10}, {"entries_per_peer_max": None}),
    ],
)
def test_a_default_gives_way_to_what_was_set(given: Any, gives_way: Any) -> None:
    """Setting one limit says nothing about the other limit."""
    assert asdict(Limits(**given)) == asdict(Limits()) | given | gives_way


# -- what is counted --------------------------------------------------------------------------------------------------


def test_every_ending_is_counted_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable.access")
    config = reqtable.Config(limits=Limits(read_timeout_s=0.02))
    with serving(reqtable.TCPServer(SERVER, Lines, config=config)) as server:
        address = server.server_address
        with Client(address) as client:
            assert client.send(b"a\nquit\n").rest() == b"a\n"
        with Client(address) as client:
            assert client.send(b"not all").rest() == b""
        with Client(address) as client:
            assert client.send(b"x" * 1_000_001).rest() == b""
        with Client(address) as client:
            assert client.send(b"fail\n").rest() == b""
        with Client(address) as client:
            wait_until(server, lambda: len(server.table) == 1)
            client.reset()
        wait_until(server, lambda: not server.table)
        with Client(address) as client:
            wait_until(server, lambda: len(server.table) == 1)
            server.table.cancel(next(iter(server.table)).id)
            assert client.rest() == b""
        wait_until(server, lambda: not server.table)
        stats = server.stats()
    endings = {"done": 1, "timeout": 1, "limit": 1, "error": 1, "reset": 1, "upstream": 0, "cancelled": 1}
    endings |= {"drained": 0, "moved": 0}
    assert stats["finished"] == endings
    assert stats["accepted"] == 6
    assert stats["policies"] == {"inline": {name: stats[name] for name in stats["policies"]["inline"]}}
    assert stats["bytes_in"] == 7 + 7 + 1_000_001 + 5
    assert stats["bytes_out"] == 2
    assert stats["loop"]["passes"] > 6
    assert 0 < stats["loop"]["pass_s_mean"] <= stats["loop"]["pass_s_max"] <= stats["loop"]["busy_s"]
    assert json.loads(json.dumps(stats)) == stats, "plain data"
    lines = [record.getMessage() for record in caplog.records if record.name == "reqtable.access"]
    assert [text.split()[2] for text in lines] == ["done", "timeout", "limit", "error", "reset", "cancelled"]
    assert lines[0].startswith("127.0.0.1:")
    assert " Lines done in 0.0" in lines[0]
    assert lines[0].endswith(" s, 7 in, 2 out, 3 steps")
    request = caplog.records[0].request  # type: ignore[attr-defined]
    assert {name: request[name] for name in ("handler", "ending", "bytes_in", "policy")} == {
        "handler": "Lines",
        "ending": "done",
        "bytes_in": 7,
        "policy": "inline",
    }


def test_policies_are_counted_each() -> None:
    with serving(reqtable.TCPServer(SERVER, Lines, config=reqtable.Config(dispatch="pool"))) as server:
        with Client(server.server_address) as client:
            assert client.send(b"a\nquit\n").rest() == b"a\n"
        server.engine.post(server.reconfigure, reqtable.Config(dispatch="thread"))
        wait_until(server, lambda: True)
        with Client(server.server_address) as client:
            assert client.send(b"quit\n").rest() == b""
        wait_until(server, lambda: not server.table)
        stats = server.stats()
    assert {name: each["accepted"] for name, each in stats["policies"].items()} == {"pool": 1, "thread": 1}


class Line(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


class TheirsUnderOurs(reqtable.TableMixIn, socketserver.TCPServer):  # type: ignore[misc]
    pass


@pytest.mark.parametrize("kind", [reqtable.TCPServer, TheirsUnderOurs])
def test_what_was_counted_is_there_after_the_server_has_closed(kind: Any) -> None:
    """The counters include requests that closing ends. They go on if the server serves again with a new socket."""
    server = kind(SERVER, Line, dispatch="greenlet")
    with Client(server.server_address) as open_one, serving(server):
        with Client(server.server_address) as client:
            assert client.ask(b"a\n") == b"a\n"
        wait_until(server, lambda: len(server.table) == 1)
        open_one.send(b"not all")
    stats = server.stats()
    assert (stats["accepted"], stats["entries"], stats["loop"]["passes"] > 0) == (2, 0, True)
    assert (stats["finished"]["done"], stats["finished"]["cancelled"]) == (1, 1)
    server.socket = socket.create_server(SERVER)
    server.server_address = server.socket.getsockname()
    with serving(server), Client(server.server_address) as client:
        assert client.ask(b"b\n") == b"b\n"
        assert client.rest() == b""
        wait_until(server, lambda: not server.table)
    assert server.stats()["policies"]["greenlet"]["finished"]["done"] == 2


def test_a_bound_on_idle_time_that_is_set_later_ends_those_that_are_idle_already() -> None:
    """An operator who sets the limit means the connections that are there."""

    class Echo(reqtable.StateRequestHandler):
        @state(line())
        def command(self, item: bytes) -> Any:
            self.send(item)
            return self.command

    with served(Echo) as server, Client(server.server_address) as client:
        assert client.ask(b"x\n") == b"x\n"
        server.engine.post(server.reconfigure, Config(limits=Limits(idle_timeout_s=0.05)))
        assert client.rest() == b""
        wait_until(server, lambda: server.stats()["finished"]["timeout"] == 1)
