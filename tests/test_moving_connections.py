"""Requests that move with their outgoing connections, and datagram sessions that move."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import (
    Connection,
    NotMovable,
    State,
    StateRequestHandler,
    Transition,
    chunk,
    connect,
    datagram,
    either,
    line,
    state,
)
from tests.hosts import Host, client_of, hosts, move
from tests.support import open_descriptors
from tests.test_moving import MUCH, all_of, receive


class Relay(StateRequestHandler):
    """Connects to the address that its first line names, and then passes on both ways."""

    upstream: Connection | None = None
    reuse: bool = False

    @state(line())
    def begin(self, text: bytes) -> Transition:
        word, _, address = text.decode().strip().rpartition(" ")
        self.reuse = word == "reuse"
        return self.connected, connect(address, reuse=self.reuse)

    @state()
    def connected(self, upstream: Connection) -> Transition:
        self.upstream = upstream
        self.send(b"connected\n")
        return self.passing, self.either()

    def either(self) -> Any:
        assert self.upstream is not None
        want: Any = self.upstream.datagram() if self.upstream.address.startswith("udp") else self.upstream.chunk()
        return either(chunk(), want)

    @state()
    def passing(self, arrived: Any) -> Transition:
        assert self.upstream is not None
        index, data = arrived
        if index == 1:
            self.send(data)
            return (self.passing, self.either()) if data else None
        if data == b"release\n":
            self.upstream.release()
            return self.begin
        if data == b"close\n":
            self.upstream.close()
            return self.begin
        if data == b"much\n":
            self.upstream.send(MUCH)
            self.upstream.end_output()
        elif data:
            self.upstream.send(data)
        else:
            return None
        return self.passing, self.either()


class Service:
    """The other end of outgoing connections."""

    def __init__(self, kind: str, folder: Path) -> None:
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        self.is_stream = kind != "udp"
        self.socket = socket.socket(family, socket.SOCK_STREAM if self.is_stream else socket.SOCK_DGRAM)
        self.socket.settimeout(5)
        self.socket.bind(str(folder / "service") if kind == "unix" else ("127.0.0.1", 0))
        name = self.socket.getsockname()
        self.address = f"unix://{name}" if kind == "unix" else f"{kind}://{name[0]}:{name[1]}"
        if self.is_stream:
            self.socket.listen()

    def accept(self) -> socket.socket:
        if not self.is_stream:
            return self.socket
        made, _ = self.socket.accept()
        made.settimeout(5)
        return made

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def both() -> Any:
    before = open_descriptors()
    with hosts(Relay) as made:
        yield made
    assert open_descriptors() == before


def begun(host: Host, client: socket.socket, service: Service, word: bytes = b"") -> Any:
    client.sendall(word + b" " + service.address.encode() + b"\n")
    entry = host.take() if not host.table else host.only()
    assert receive(client, host, 10) == b"connected\n"
    return entry


@contextlib.contextmanager
def relayed(host: Host, folder: Path) -> Iterator[tuple[Any, socket.socket, socket.socket]]:
    """Yield a request that has a connection over TCP, its client, and the other end of the connection."""
    with contextlib.closing(Service("tcp", folder)) as service, client_of(host) as client:
        entry = begun(host, client, service)
        with service.accept() as other:
            yield entry, client, other


@pytest.mark.parametrize("kind", ["tcp", "unix", "udp"])
def test_a_connection_moves_with_its_request(both: tuple[Host, Host], kind: str, tmp_path: Path) -> None:
    first, second = both
    service = Service(kind, tmp_path)
    with client_of(first) as client:
        entry = begun(first, client, service)
        [row] = first.table.connections.values()
        client.sendall(b"one")
        first.passes()
        if service.is_stream:
            other = service.accept()
            assert other.recv(100) == b"one"
            other.sendall(b"two")
        else:
            other = service.socket
            data, peer = other.recvfrom(100)
            assert data == b"one"
            other.connect(peer)
            other.send(b"two")
        assert receive(client, first, 3) == b"two"
        other.send(b"on its way")
        figures = (row.id, row.bytes_in, row.bytes_out, row.peer, row.local, row.created_at)
        moved = move(first, second, entry, 2)
        assert receive(client, second, 10) == b"on its way"
        [later] = second.table.connections.values()
        assert moved.reach is not None
        assert moved.reach.connections == [later]
        assert moved.handler.upstream is later.connection
        after = (later.id, later.bytes_in - 10, later.bytes_out, later.peer, later.local, later.created_at)
        assert after == figures
        assert not first.table.connections
        client.sendall(b"three")
        second.passes()
        assert other.recv(100) == b"three"
        if service.is_stream:
            other.close()
            assert all_of(client, second) == b""
    second.passes(10)
    assert not second.table.connections
    service.close()


def test_unsent_output_of_a_connection_moves(both: tuple[Host, Host], tmp_path: Path) -> None:
    first, second = both
    with relayed(first, tmp_path) as (entry, client, other):
        client.sendall(b"much\n")
        first.passes()
        [row] = first.table.connections.values()
        assert row.output.held > 0
        deadline = row.deadline
        assert deadline is not None
        moved = move(first, second, entry, 2)
        [later] = second.table.connections.values()
        assert later.output_ended
        assert later.deadline == deadline or later.bytes_out > row.bytes_out
        assert receive(other, second, len(MUCH)) == MUCH
        assert all_of(other, second) == b""
        assert moved.state is State.WAITING


def test_unread_input_of_a_connection_moves(both: tuple[Host, Host], tmp_path: Path) -> None:
    """The client does not read, so the request stops reading its connection."""
    first, second = both
    with relayed(first, tmp_path) as (entry, client, other):
        other.settimeout(0)
        sent = 0
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                sent += other.send(MUCH[sent % len(MUCH) :])
            first.passes(2)
        other.settimeout(5)
        move(first, second, entry)
        other.shutdown(socket.SHUT_WR)
        found = all_of(client, second)
        assert len(found) == sent
        assert found == (MUCH * (sent // len(MUCH) + 1))[:sent]


def test_a_connection_that_moved_is_kept_for_reuse(both: tuple[Host, Host], tmp_path: Path) -> None:
    first, second = both
    service = Service("tcp", tmp_path)
    with client_of(first) as client:
        entry = begun(first, client, service, b"reuse")
        with service.accept() as other:
            move(first, second, entry)
            client.sendall(b"release\n")
            second.passes()
            begun(second, client, service, b"reuse")
            assert second.table.connection_counts["reused"] == 1
            client.sendall(b"again")
            second.passes()
            assert other.recv(100) == b"again"
    service.close()


def test_a_connection_kept_for_reuse_stays_behind(both: tuple[Host, Host], tmp_path: Path) -> None:
    first, second = both
    service = Service("tcp", tmp_path)
    with client_of(first) as client:
        entry = begun(first, client, service, b"reuse")
        with service.accept():
            client.sendall(b"release\n")
            first.passes()
            with pytest.raises(
                NotMovable, match=r"its field 'upstream': it has a connection to tcp://\S+ that is over$"
            ):
                first.table.save([entry.id])
            entry.handler.upstream = None
            move(first, second, entry)
            assert not second.table.connections
            begun(second, client, service, b"reuse")
            assert second.table.connection_counts["reused"] == 0
            service.accept().close()
    service.close()


def test_a_connection_of_another_request_can_not_move(both: tuple[Host, Host], tmp_path: Path) -> None:
    first, _ = both
    service = Service("tcp", tmp_path)
    with client_of(first) as client, client_of(first) as other:
        entry = begun(first, client, service)
        own = first.take()
        own.handler.upstream = entry.handler.upstream
        with pytest.raises(
            NotMovable,
            match=r"^request 3 of Relay can't be recorded now: its field 'upstream': it has the connection to",
        ):
            first.table.save([own.id])
        assert first.table.save() != []
        other.close()
        own.handler.upstream = None
        service.accept().close()
    service.close()


class Counts(StateRequestHandler):
    total: int = 0

    @state(datagram(), timeout=30)
    def came(self, data: bytes) -> Transition:
        self.total += len(data)
        self.send(b"%d" % self.total)
        return self.came


class AllUDP(reqtable.UDPServer):
    pass


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_session_of_datagrams_moves(host: str) -> None:
    before = open_descriptors()
    with hosts(Counts, kind=reqtable.UDPServer, address=(host, 0)) as (first, second):
        # The second server receives by the socket of the first, as after a hot restart.
        second.server.socket.close()
        second.server.socket = first.server.socket.dup()
        second.server.server_address = first.server.server_address
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(("127.0.0.2" if host == "0.0.0.0" else host, first.server.server_address[1]))
            client.send(b"abc")
            entry = first.take()
            assert client.recv(100) == b"3"
            client.send(b"waits")
            figures = entry.id, entry.local, entry.deadline
            moved = move(first, second, entry, 3)
            assert (moved.id, moved.local, moved.deadline) == figures
            second.server._handle_request_noblock()
            second.passes()
            assert client.recv(100) == b"8"
            assert len(second.table) == 1
            second.clock.jump(60)
            second.passes()
            assert not len(second.table)
    assert open_descriptors() == before


def test_a_session_of_unix_datagrams_moves(tmp_path: Path) -> None:
    before = open_descriptors()
    options: Any = {"address": str(tmp_path / "a"), "second_address": str(tmp_path / "b")}
    with hosts(Counts, kind=reqtable.UnixDatagramServer, **options) as (first, second):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.bind(str(tmp_path / "client"))
            client.connect(str(tmp_path / "a"))
            client.send(b"abc")
            entry = first.take()
            assert client.recv(100) == b"3"
            moved = move(first, second, entry)
            client.connect(str(tmp_path / "b"))
            client.send(b"de")
            second.server._handle_request_noblock()
            second.passes()
            assert client.recv(100) == b"5"
            assert second.only() is moved
    assert open_descriptors() == before
