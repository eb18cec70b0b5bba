"""The example SOCKS proxy, with curl as its client, and with clients that ask for what can't be had."""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from examples.echo import StateEcho
from examples.socks5 import REPLIES, Socks5, reply
from reqtable import System
from reqtable.loop.platform import SYSTEM
from reqtable.testing import exercise
from tests.support import Client, served, serving, wait_until
from tests.test_examples import program, run

GREETING = b"\5\1\0"
LOOPBACK = b"\1" + socket.inet_aton("127.0.0.1")


def port_of(server: Any) -> bytes:
    return struct.pack("!H", server.server_address[1])


@contextlib.contextmanager
def web(folder: Path, host: str) -> Iterator[Any]:
    """Serve the files of `folder` over HTTP on `host`."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(reqtable.TableTCPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    with serving(Server((host, 0), Files)) as server:
        yield server


@contextlib.contextmanager
def names(known: dict[str, str]) -> Iterator[None]:
    """Have servers that are made during the block look names up in `known`."""

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return socket.getaddrinfo(known[host], *arguments, **options)

    before = SYSTEM.set(System(getaddrinfo=getaddrinfo))
    try:
        yield
    finally:
        SYSTEM.reset(before)


@pytest.mark.parametrize(
    ("option", "host", "name"),
    [
        ("--socks5-hostname", "127.0.0.1", "site.example"),
        ("--socks5-hostname", "::1", "site.example"),
        ("--socks5-hostname", "127.0.0.1", "127.0.0.1"),
        ("--socks5", "127.0.0.1", "127.0.0.1"),
        ("--socks5", "::1", "[::1]"),
    ],
)
def test_curl_fetches_a_file_through_it(tmp_path: Path, option: str, host: str, name: str) -> None:
    (tmp_path / "file").write_bytes(data := bytes(range(256)) * 4000)
    with web(tmp_path, host) as site, names({"site.example": host}), served(Socks5) as server:
        url = f"http://{name}:{site.server_address[1]}/file"
        proxy = f"127.0.0.1:{server.server_address[1]}"
        assert run(program("curl"), "-sS", "--max-time", "15", option, proxy, url, url) == data * 2
        wait_until(server, lambda: not (len(server.table) or server.table.connections))


@pytest.mark.parametrize("pieces", ["whole", "byte by byte"])
def test_the_reply_names_the_address_of_the_connection(pieces: str) -> None:
    peers = []

    class Tells(StateEcho):
        def start(self) -> Any:
            peers.append(self.client_address)
            return super().start()

    with served(Tells) as echo, served(Socks5) as server, Client(server.server_address) as client:
        request = GREETING + b"\5\1\0" + LOOPBACK + port_of(echo)
        for start in range(len(request)) if pieces == "byte by byte" else [0]:
            client.send(request[start : start + 1] if pieces == "byte by byte" else request)
        answer = client.receive(12)
        wait_until(echo, lambda: len(peers) == 1)
        assert answer == b"\5\0" + reply(0, peers[0])
        client.send(b"early\n")
        assert client.line() == b"early\n"


def test_what_comes_with_the_request_is_forwarded_and_so_is_each_end_of_file() -> None:
    with served(StateEcho) as echo, served(Socks5) as server, Client(server.server_address) as client:
        client.send(GREETING + b"\5\1\0" + LOOPBACK + port_of(echo) + b"one\ntwo").end()
        assert client.receive(12)[:4] == b"\5\0\5\0"
        assert client.rest() == b"one\ntwo"


# -- what it refuses --------------------------------------------------------------------------------------------------


def ask(request: bytes) -> bytes:
    """Return the answer to a request that fails, without the greeting's."""
    with served(Socks5) as server:
        with Client(server.server_address) as client:
            answer = client.send(GREETING + request).rest()
        wait_until(server, lambda: not (len(server.table) or server.table.connections))
    assert answer[:2] == b"\5\0"
    return answer[2:]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\5\2\0" + LOOPBACK + b"\0\x50", 7),  # BIND
        (b"\5\3\0" + LOOPBACK + b"\0\x50", 7),  # UDP ASSOCIATE
        (b"\5\1\0\2", 8),  # a kind of address that does not exist
        (b"\5\1\0\3\4\0bad\0\x50", 4),  # not the name of a host
        (b"\5\1\0\3\0\0\x50", 4),  # an empty name
        (b"\5\1\0" + LOOPBACK + b"\0\0", 4),  # no such port
        (b"\5\1\0\3\7missing\0\x50", 4),  # no such name
        (b"\5\1\0\1\xe0\0\0\1\0\x50", 3),  # multicast: the kernel has no route for a connection
    ],
)
def test_a_request_that_can_not_be_served(request_: bytes, code: int) -> None:
    with names({}):
        assert ask(request_) == reply(code)


def test_a_service_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = struct.pack("!H", unheard.getsockname()[1])
        assert ask(b"\5\1\0" + LOOPBACK + port) == reply(5)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING], "the client has been told"


def test_a_service_that_does_not_answer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        config = reqtable.Config(limits=reqtable.Limits(connect_timeout_s=0.05))
        with serving(reqtable.TCPServer(("127.0.0.1", 0), Socks5, config=config)) as server:
            with Client(server.server_address) as client:
                port = struct.pack("!H", full.getsockname()[1])
                client.send(GREETING + b"\5\1\0" + LOOPBACK + port)
                assert client.rest() == b"\5\0" + reply(4)
    assert set(REPLIES.values()) == {3, 4, 5}


def test_a_proxy_with_too_many_connections_fails_the_next() -> None:
    config = reqtable.Config(limits=reqtable.Limits(connections_max=1))
    with served(StateEcho) as echo, serving(reqtable.TCPServer(("127.0.0.1", 0), Socks5, config=config)) as server:
        request = GREETING + b"\5\1\0" + LOOPBACK + port_of(echo)
        with Client(server.server_address) as one, Client(server.server_address) as two:
            assert one.send(request).receive(4) == b"\5\0\5\0"
            assert two.send(request).rest() == b"\5\0" + reply(1)


def test_a_client_without_a_method_in_common() -> None:
    exercise(Socks5).send(b"\5\2\1\2").expect(b"\5\xff").expect_end()
    exercise(Socks5).send(b"\5\0").expect(b"\5\xff").expect_end()


@pytest.mark.parametrize("sent", [b"\4\1", b"GET / HTTP/1.1\r\n\r\n", GREETING + b"\4\1\0\1"])
def test_a_client_of_another_protocol(sent: bytes) -> None:
    request = exercise(Socks5).send(sent)
    request.expect(b"\5\0" if sent.startswith(GREETING) else b"").expect_end()


@pytest.mark.parametrize("sent", [b"", b"\5", b"\5\1", GREETING, GREETING + b"\5\1\0\3", GREETING + b"\5\1\0\3\4abcd"])
def test_a_client_that_stops_in_mid_request(sent: bytes) -> None:
    request = exercise(Socks5)
    if sent:
        request.send(sent)
    request.jump(11).expect(b"\5\0" if sent.startswith(GREETING) else b"").expect_end()
