"""Datagrams: each begins a request, or each peer has a session."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.echo import AsyncEcho, StateEcho
from reqtable import (
    AsyncRequestHandler,
    DatagramRequestHandler,
    StateRequestHandler,
    System,
    datagram,
    line,
    rest,
    sleep,
    state,
)
from reqtable.loop.platform import SYSTEM
from reqtable.table.input import Inbox
from reqtable.testing import FakeClock, Faults, SimNetwork
from tests.support import WAIT_S, serving, wait_until

UNIX = (socket.AF_UNIX, socket.SOCK_DGRAM)


@contextlib.contextmanager
def peer_of(server: Any, path: Path | None = None) -> Iterator[socket.socket]:
    """Yield a socket that talks to `server` only, on the server's network (simulated or the kernel's)."""
    with server.engine.system.socket(server.address_family, socket.SOCK_DGRAM) as made:
        made.settimeout(WAIT_S)
        if path is not None:
            made.bind(str(path))
        made.connect(server.server_address)
        yield made


class Stepwise:
    """Runs a server pass by pass on a fake clock: UDP on a simulated network, Unix sockets on the kernel's."""

    def __init__(self, clock: FakeClock, handler: Any, address: Any = ("127.0.0.1", 0), **limits: Any) -> None:
        self.clock = clock
        simulated = isinstance(address, tuple)
        system = SimNetwork(faults=Faults.none(), clock=clock).system if simulated else System(clock=clock)
        token = SYSTEM.set(system)
        self.server = (reqtable.UDPServer if simulated else reqtable.UnixDatagramServer)(address, handler)
        self.engine = reqtable.Engine(limits=reqtable.Limits(**limits)).add(self.server)
        SYSTEM.reset(token)
        self.engine.loop.open()
        self.engine.listeners.listen(self.server)

    def passes(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.loop.run_once(0)

    def __enter__(self) -> Stepwise:
        return self

    def __exit__(self, *args: object) -> None:
        self.server.server_close()


class Counting(StateRequestHandler):
    """Counts the datagrams of a session."""

    count: int = 0

    @state(datagram(), timeout=10)
    def hear(self, data: bytes) -> Any:
        self.count += 1
        if data == b"bye":
            return None
        if data == b"slow":
            return self.rested, sleep(5)
        self.send(b"%d %b" % (self.count, data))
        return self.hear

    @state()
    def rested(self, item: None) -> Any:
        self.send(b"rested")
        return self.hear


def test_a_session_is_its_peers_address(clock: FakeClock) -> None:
    with Stepwise(clock, Counting) as world, peer_of(world.server) as one, peer_of(world.server) as two:
        for peer, data, answer in [(one, b"a", b"1 a"), (two, b"b", b"1 b"), (one, b"c", b"2 c"), (one, b"d", b"3 d")]:
            peer.send(data)
            world.passes()
            assert peer.recv(100) == answer
        assert len(world.server.table) == 2
        one.send(b"bye")
        world.passes()
        assert len(world.server.table) == 1 == len(world.engine.intake.sessions)
        one.send(b"again")
        world.passes()
        assert one.recv(100) == b"1 again"


def test_a_deadline_ends_a_session(clock: FakeClock) -> None:
    with Stepwise(clock, Counting) as world, peer_of(world.server) as peer:
        for _ in range(3):
            peer.send(b"x")
            world.passes()
            clock.jump(9)
        world.passes()
        assert len(world.server.table) == 1
        clock.jump(2)
        world.passes()
        assert (len(world.server.table), len(world.engine.intake.sessions)) == (0, 0)


def test_a_session_without_a_timeout_of_its_own_has_the_limits(clock: FakeClock) -> None:
    class Forever(AsyncRequestHandler):
        async def handle(self) -> None:
            while True:
                await self.send(await self.read(datagram()))

    with Stepwise(clock, Forever, session_timeout_s=7) as world, peer_of(world.server) as peer:
        for _ in range(3):
            peer.send(b"x")
            world.passes()
            clock.jump(6)
            world.passes()
            assert len(world.server.table) == 1
        clock.jump(2)
        world.passes()
        assert len(world.server.table) == 0


def test_datagrams_wait_for_a_busy_session_and_those_over_the_bound_are_dropped(clock: FakeClock) -> None:
    with Stepwise(clock, Counting, inbox_max=3) as world, peer_of(world.server) as peer:
        peer.send(b"slow")
        world.passes()
        for number in range(5):
            peer.send(b"%d" % number)
        world.passes()
        [row] = world.server.table.snapshot()
        assert (row["state"], row["buffered_in"]) == ("SLEEPING", 3)
        clock.jump(5)
        world.passes()
        assert [peer.recv(100) for _ in range(4)] == [b"rested", b"2 0", b"3 1", b"4 2"]


@pytest.mark.parametrize("handler", [StateEcho, AsyncEcho])
def test_a_handler_of_lines_answers_a_datagram_of_lines(clock: FakeClock, handler: Any) -> None:
    with Stepwise(clock, handler) as world, peer_of(world.server) as peer:
        peer.send(b"one\ntwo\npart")
        world.passes()
        assert [peer.recv(100) for _ in range(3)] == [b"one\n", b"two\n", b"part"]
        assert (len(world.server.table), len(world.engine.intake.sessions)) == (0, 0)


def test_rest_is_the_datagram(clock: FakeClock) -> None:
    class Whole(StateRequestHandler):
        @state(rest(limit=100))
        def all(self, data: bytes) -> Any:
            self.send(data[::-1])

    with Stepwise(clock, Whole) as world, peer_of(world.server) as peer:
        peer.send(b"abc")
        world.passes()
        assert peer.recv(100) == b"cba"
        peer.send(b"")  # a datagram of no bytes is one, and so is its answer
        world.passes()
        assert peer.recv(100) == b""
        peer.send(b"d")
        world.passes()
        assert peer.recv(100) == b"d"


def test_many_datagrams_are_taken_in_one_pass(clock: FakeClock) -> None:
    class Upper(DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    with Stepwise(clock, Upper) as world, peer_of(world.server) as peer:
        for number in range(16):
            peer.send(b"n%d" % number)
        world.passes()
        assert [peer.recv(100) for _ in range(16)] == [b"N%d" % number for number in range(16)]
        assert world.server.table.last_id == 16


def test_a_unix_peer_without_a_name_gets_no_answer_and_harms_nobody(clock: FakeClock, tmp_path: Path) -> None:
    with Stepwise(clock, Counting, str(tmp_path / "server")) as world:
        with peer_of(world.server) as nameless, peer_of(world.server, tmp_path / "named") as named:
            nameless.send(b"x")
            nameless.send(b"y")
            named.send(b"z")
            world.passes(2)
            assert named.recv(100) == b"1 z"
            assert len(world.server.table) == 1  # the nameless can't be told apart: there is no session to wait in


def test_a_unix_peer_whose_queue_is_full_is_waited_for_without_spinning(clock: FakeClock, tmp_path: Path) -> None:
    class Burst(StateRequestHandler):
        @state(datagram())
        def hear(self, data: bytes) -> Any:
            for number in range(2000):
                self.send(b"%d" % number)

    # The peers are unconnected: datagrams that a connected peer has not read fill the server's own send buffer.
    address = str(tmp_path / "server")
    with Stepwise(clock, Burst, address) as world:
        with socket.socket(*UNIX) as slow, socket.socket(*UNIX) as other:
            slow.bind(str(tmp_path / "slow"))
            other.bind(str(tmp_path / "other"))
            slow.sendto(b"go", address)
            world.passes()
            [row] = world.server.table.snapshot()
            assert row["state"] == "WRITING"
            other.sendto(b"go", address)
            world.passes()
            assert other.recv(100, socket.MSG_DONTWAIT) == b"0"  # the others go on
            assert world.engine.loop._patience(None) > 0
            received = []
            slow.settimeout(0)
            while len(received) < 2000:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        received.append(slow.recv(100))
                clock.jump(0.01)
                world.passes()
            assert received == [b"%d" % number for number in range(2000)]


def test_a_unix_peer_that_has_gone_ends_its_session(clock: FakeClock, tmp_path: Path) -> None:
    with Stepwise(clock, Counting, str(tmp_path / "server")) as world:
        with peer_of(world.server, tmp_path / "gone") as gone:
            gone.send(b"x")
        (tmp_path / "gone").unlink()
        world.passes(2)
        assert len(world.server.table) == 0


def test_waiting_for_a_datagram_of_a_stream_is_a_mistake(caplog: pytest.LogCaptureFixture) -> None:
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Counting)) as server:
        with socket.create_connection(server.server_address) as client:
            assert client.recv(100) == b""
    assert "datagram() is for datagram servers" in caplog.text


@pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
def test_a_blocking_handler_has_an_entry_for_each_datagram(dispatch: str) -> None:
    rows: list[Any] = []

    class Look(DatagramRequestHandler):
        def handle(self) -> None:
            rows.extend(self.server.table.snapshot(state="RUNNING"))
            self.wfile.write(self.packet)

    with serving(reqtable.UDPServer(("127.0.0.1", 0), Look, dispatch=dispatch)) as server:
        with peer_of(server) as peer:
            for data in (b"a", b"b"):
                peer.send(data)
                assert peer.recv(100) == data
        wait_until(server, lambda: len(server.table) == 0)
    assert [(row["id"], row["state"], row["policy"]) for row in rows] == [
        (1, "RUNNING", dispatch),
        (2, "RUNNING", dispatch),
    ]


def test_a_session_may_read_lines_of_its_next_datagram(clock: FakeClock) -> None:
    class Mixed(StateRequestHandler):
        @state(datagram())
        def hear(self, data: bytes) -> Any:
            self.send(b"whole " + data)
            return self.lines

        @state(line())
        def lines(self, text: bytes) -> Any:
            self.send(b"line " + text)
            return self.hear

    with Stepwise(clock, Mixed) as world, peer_of(world.server) as peer:
        for data, answer in [(b"a", b"whole a"), (b"b\nc", b"line b\n"), (b"d", b"whole d")]:
            peer.send(data)
            world.passes()
            assert peer.recv(100) == answer


def test_a_file_that_is_shorter_than_promised_ends_its_request_alone(clock: FakeClock, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")

    class Files(StateRequestHandler):
        @state(rest(limit=10))
        def ask(self, data: bytes) -> Any:
            self.file = (tmp_path / "file").open("rb")
            self.send_file(self.file, 0, 10)

        def on_close(self) -> None:
            self.file.close()

    with Stepwise(clock, Files) as world, peer_of(world.server) as peer:
        peer.send(b"x")
        world.passes()
        assert peer.recv(100) == b"short"
        assert len(world.server.table) == 0


def test_a_full_table_still_serves_the_sessions_in_it(clock: FakeClock) -> None:
    with Stepwise(clock, Counting, entries_max=1) as world, peer_of(world.server) as one, peer_of(world.server) as two:
        for peer in (one, two, one):
            peer.send(b"x")
            world.passes()
        assert [one.recv(100), one.recv(100)] == [b"1 x", b"2 x"]
        assert len(world.server.table) == 1


def test_a_session_may_sleep_longer_than_it_may_be_silent(clock: FakeClock) -> None:
    class Sleepy(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(datagram())
            await self.sleep(100)
            await self.send(b"awake")

    with Stepwise(clock, Sleepy, session_timeout_s=7) as world, peer_of(world.server) as peer:
        peer.send(b"x")
        world.passes()
        clock.jump(99)
        world.passes()
        clock.jump(1)
        world.passes()
        assert peer.recv(100) == b"awake"


def test_a_constructor_that_raises_leaves_nothing(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(StateRequestHandler):
        def __init__(self, entry: Any) -> None:
            super().__init__(entry)
            raise ZeroDivisionError

        @state(datagram())
        def never(self, data: bytes) -> Any:
            return None

    with Stepwise(clock, Broken) as world, peer_of(world.server) as peer:
        peer.send(b"x")
        world.passes()
        assert (len(world.server.table), len(world.engine.intake.sessions)) == (0, 0)
    assert "ZeroDivisionError" in caplog.text


# -- a datagram of no bytes -------------------------------------------------------------------------------------------


class StateMirror(StateRequestHandler):
    """Sends each datagram back; answers a lone `2` with two datagrams."""

    @state(datagram(), timeout=WAIT_S)
    def mirror(self, data: bytes) -> Any:
        self.send(data)
        if data == b"2":
            self.send(b"")
        return None if data == b"bye" else self.mirror


class AsyncMirror(AsyncRequestHandler):
    async def handle(self) -> None:
        data = b""
        while data != b"bye":
            data = await self.read(datagram(), timeout=WAIT_S)
            await self.send(data)
            if data == b"2":
                await self.send(b"")


@pytest.mark.parametrize("family", ["udp", "unixgram"])
@pytest.mark.parametrize(
    ("handler", "dispatch"),
    [
        *((each, policy) for each in (StateMirror, AsyncMirror) for policy in ("inline", "pool", "thread", "fork")),
        (StateMirror, "executor"),
    ],
)
def test_a_datagram_of_no_bytes_is_one_under_every_policy(
    handler: Any, dispatch: str, family: str, tmp_path: Path
) -> None:
    kind = reqtable.UDPServer if family == "udp" else reqtable.UnixDatagramServer
    address = ("127.0.0.1", 0) if family == "udp" else str(tmp_path / "server")
    own = None if family == "udp" else tmp_path / "peer"
    with serving(kind(address, handler, dispatch=dispatch)) as server, peer_of(server, own) as peer:
        for sent in ([b"x"], [b""], [b"2", b""], [b""], [b"bye"]):
            peer.send(sent[0])
            assert [peer.recv(100) for _ in sent] == sent
        wait_until(server, lambda: not server.table)
        # the child counts the datagrams that it gets later
        assert server.stats()["bytes_in"] == len(b"x" if dispatch == "fork" else b"x2bye")


def test_datagrams_of_no_bytes_that_wait_are_counted_as_unread() -> None:
    inbox = Inbox()
    assert not inbox
    inbox.deliver(b"", 64)
    assert inbox
    assert len(inbox) == 0
    assert inbox.datagram() == b""
    assert not inbox
