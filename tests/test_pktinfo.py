"""A datagram server on all addresses: it knows which address a peer asked, and answers from there."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import reqtable
from reqtable import AsyncRequestHandler, DatagramRequestHandler, StateRequestHandler, datagram, rest, state
from reqtable.run.endpoints import find_endpoints
from reqtable.run.listening import make_server, open_server
from reqtable.testing import SimNetwork
from tests.support import WAIT_S, serving, wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's loopback, and its options")

ONE, OTHER = "127.0.0.2", "127.0.0.3"


class Counting(StateRequestHandler):
    """Counts the datagrams of a session."""

    count: int = 0

    @state(datagram(), timeout=WAIT_S)
    def hear(self, data: bytes) -> Any:
        self.count += 1
        if data == b"bye":
            return None
        self.send(b"%d %b" % (self.count, data))
        return self.hear


class AsyncCounting(AsyncRequestHandler):
    async def handle(self) -> None:
        count = 0
        while (data := await self.read(datagram())) != b"bye":
            count += 1
            await self.send(b"%d %b" % (count, data))


class Whole(StateRequestHandler):
    """Answers each datagram without a session."""

    @state(rest(limit=100))
    def all(self, data: bytes) -> Any:
        self.send(data[::-1])


class Six(reqtable.UDPServer):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


WILDCARDS = [(reqtable.UDPServer, "0.0.0.0"), (reqtable.UDPServer, ""), (Six, "::")]


@contextlib.contextmanager
def peer_of(server: Any, host: str) -> Iterator[socket.socket]:
    """Yield a socket that receives only answers from `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as made:
        made.settimeout(WAIT_S)
        made.connect((host, server.server_address[1]))
        yield made


def ask(peer: socket.socket, data: bytes) -> bytes:
    peer.send(data)
    return peer.recv(100)


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
@pytest.mark.parametrize("handler", [Counting, AsyncCounting])
@pytest.mark.parametrize(("base", "host"), WILDCARDS)
def test_an_answer_comes_from_the_address_that_was_asked(base: Any, host: str, handler: Any, dispatch: str) -> None:
    with serving(base((host, 0), handler, dispatch=dispatch)) as server:
        for asked in (ONE, OTHER, *(["::1"] if base is Six else [])):
            with peer_of(server, asked) as peer:
                assert [ask(peer, data) for data in (b"a", b"b")] == [b"1 a", b"2 b"]
                shown = f"::ffff:{asked}" if base is Six and asked != "::1" else asked
                assert [entry.local[:2] for entry in server.table] == [(shown, server.server_address[1])]
                peer.send(b"bye")
                wait_until(server, lambda: not len(server.table))  # a child is gone before the server waits for it


@pytest.mark.parametrize(("base", "host"), WILDCARDS)
def test_a_request_that_is_no_session_answers_from_there(base: Any, host: str) -> None:
    with serving(base((host, 0), Whole)) as server, peer_of(server, ONE) as peer:
        assert [ask(peer, data) for data in (b"abc", b"def")] == [b"cba", b"fed"]


def test_one_peer_that_asks_two_addresses_has_two_sessions() -> None:
    with serving(reqtable.UDPServer(("", 0), Counting)) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.settimeout(WAIT_S)
            for host, data, answer in [(ONE, b"a", b"1 a"), (OTHER, b"b", b"1 b"), (ONE, b"c", b"2 c")]:
                asked = (host, server.server_address[1])
                peer.sendto(data, asked)
                assert peer.recvfrom(100) == (answer, asked)
            rows = server.table.snapshot()
            assert [row["local"] for row in rows] == [f"{host}:{server.server_address[1]}" for host in (ONE, OTHER)]
            assert len({row["peer"] for row in rows}) == 1
            peer.sendto(b"bye", (ONE, server.server_address[1]))
            wait_until(server, lambda: len(server.table) == 1 == len(server.engine.intake.sessions))


def test_datagrams_that_wait_for_no_session_are_answered_from_where_they_were_sent() -> None:
    """Several datagrams to two addresses of the server arrive before the first is read."""
    server = reqtable.UDPServer(("", 0), Whole, dispatch="thread")
    with peer_of(server, ONE) as one, peer_of(server, OTHER) as other:
        for number in range(4):
            one.send(b"a%d" % number)
            other.send(b"b%d" % number)
        with serving(server):
            assert sorted(one.recv(100) for _ in range(4)) == [b"%da" % number for number in range(4)]
            assert sorted(other.recv(100) for _ in range(4)) == [b"%db" % number for number in range(4)]


def test_what_came_before_the_server_could_ask_is_answered_from_there() -> None:
    server = reqtable.UDPServer(("", 0), Whole, bind_and_activate=False)
    server.server_bind()
    with peer_of(server, ONE) as peer:
        peer.send(b"early")
        server.server_activate()
        with serving(server):
            assert peer.recv(100) == b"ylrae"


@pytest.mark.parametrize(("base", "host"), WILDCARDS)
def test_a_broadcast_is_answered_from_an_address_of_the_machine(base: Any, host: str) -> None:
    with serving(base((host, 0), Counting)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.settimeout(WAIT_S)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        peer.sendto(b"who", ("127.255.255.255", server.server_address[1]))
        assert peer.recvfrom(100) == (b"1 who", ("127.0.0.1", server.server_address[1]))


@pytest.mark.parametrize("bind", ["udp://0.0.0.0:0", "udp://[::]:0", "fd://"])
def test_a_bind_answers_from_the_address_that_was_asked(bind: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("", 0))
        [place] = find_endpoints([f"fd://{own.fileno()}" if bind == "fd://" else bind])
        server = make_server(place, Counting, None, reqtable.Config())
        open_server(server)
        with serving(server), peer_of(server, ONE) as peer:
            assert ask(peer, b"a") == b"1 a"


def test_a_blocking_handler_has_the_pair_as_ever() -> None:
    seen: list[Any] = []

    class Look(DatagramRequestHandler):
        def handle(self) -> None:
            data, own = self.request
            seen.append((self.request == (data, own), own is self.server.socket, data))
            self.wfile.write(data)

    with serving(reqtable.UDPServer(("", 0), Look)) as server, socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.settimeout(WAIT_S)
        peer.sendto(b"a", ("127.0.0.1", server.server_address[1]))
        assert peer.recv(100) == b"a"
    assert seen == [(True, True, b"a")]


def test_get_request_may_be_overridden() -> None:
    class Own(reqtable.UDPServer):
        def get_request(self) -> Any:
            data, peer = self.socket.recvfrom(100, socket.MSG_DONTWAIT)
            return (data.upper(), self.socket), peer

    with serving(Own(("", 0), Counting)) as server, socket.socket(type=socket.SOCK_DGRAM) as peer:
        peer.settimeout(WAIT_S)
        for data, answer in [(b"a", b"1 A"), (b"b", b"2 B")]:
            peer.sendto(data, ("127.0.0.1", server.server_address[1]))
            assert peer.recv(100) == answer
        [entry] = server.table
        assert entry.local == server.server_address


def test_a_server_on_one_address_asks_the_kernel_nothing_more() -> None:
    with reqtable.UDPServer(("127.0.0.1", 0), Counting) as server, peer_of(server, "127.0.0.1") as peer:
        peer.send(b"a")
        request, _ = server.get_request()
        assert type(request) is tuple
        assert server.socket.getsockopt(socket.IPPROTO_IP, 8) == 0


@pytest.mark.parametrize(("base", "host"), WILDCARDS)
def test_a_simulated_server_on_every_address(base: Any, host: str) -> None:
    network = SimNetwork(faults=reqtable.testing.Faults.none())
    with network.installed():
        server = base((host, 0), Counting)
        with server:
            server.engine.loop.open()
            server.engine.listeners.listen(server)
            with network.socket(server.address_family, socket.SOCK_DGRAM) as peer:
                peer.connect(server.server_address)
                peer.send(b"a")
                server.engine.loop.run_once(0)
                server.engine.loop.run_once(0)
                assert peer.recv(100) == b"1 a"
