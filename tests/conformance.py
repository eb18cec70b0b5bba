"""The conformance suite: what the same dialogue must give under every policy that takes its handler.

A policy from outside can be held to it: `check(policy, style, transport, dialogue)`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reqtable
from reqtable.config import TLSOptions
from tests.certificates import TLSStream, write_certificate
from tests.support import WAIT_S, serving, wait_until
from tests.talk import (
    BIG,
    PIECES,
    AsyncGrams,
    AsyncTalk,
    BlockingGrams,
    BlockingTalk,
    HastyAsyncTalk,
    HastyBlockingTalk,
    HastyStateTalk,
    StateGrams,
    StateTalk,
)

STYLES = ["state", "async", "blocking"]
TRANSPORTS = ["tcp", "unix", "tls", "udp", "unixgram"]
STREAMS = {"tcp", "unix", "tls"}
POLICIES = ["inline", "greenlet", "thread", "pool", "fork", "executor"]
STREAM_DIALOGUES = ["echo", "slow reader", "dribbled", "half-close", "error", "timeout", "cancel"]
DATAGRAM_DIALOGUES = ["echo", "slow reader", "dribbled", "error", "timeout", "cancel"]


HANDLERS: dict[tuple[str, str], Any] = {
    ("state", "stream"): StateTalk,
    ("state", "hasty"): HastyStateTalk,
    ("state", "datagram"): StateGrams,
    ("async", "stream"): AsyncTalk,
    ("async", "hasty"): HastyAsyncTalk,
    ("async", "datagram"): AsyncGrams,
    ("blocking", "stream"): BlockingTalk,
    ("blocking", "hasty"): HastyBlockingTalk,
    ("blocking", "datagram"): BlockingGrams,
}


# -- the client's side ------------------------------------------------------------------------------------------------


class Stream:
    """A connection to the server."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.socket = self._connect()

    def _connect(self) -> Any:
        connected = socket.socket(self.server.address_family, socket.SOCK_STREAM)
        connected.settimeout(WAIT_S)
        connected.connect(self.server.server_address)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a byte that is dribbled leaves at once
        return connected

    def take(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count and (more := self.socket.recv(min(count - len(data), 262_144))):
            data += more
        return bytes(data)

    def rest(self) -> bytes:
        data = bytearray()
        while more := self.socket.recv(65_536):
            data += more
        return bytes(data)

    def close(self) -> None:
        # A forked child has a copy of this socket, the client being in the server's process: closing would not end it.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class SecuredStream(Stream):
    """The same over TLS. The server's end must be a close_notify."""

    def _connect(self) -> Any:
        return TLSStream(self.server.server_address)


class Grams:
    """A datagram socket with a name of its own."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.socket = socket.socket(server.address_family, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT_S)
        self._folder = tempfile.TemporaryDirectory()
        unix = server.address_family == socket.AF_UNIX
        self.socket.bind(str(Path(self._folder.name) / "peer") if unix else ("127.0.0.1", 0))

    def send(self, data: bytes) -> None:
        self.socket.sendto(data, self.server.server_address)

    def take(self) -> bytes:
        return self.socket.recv(65_536)

    def close(self) -> None:
        self.socket.close()
        self._folder.cleanup()


def stream_dialogue(name: str, client: Stream) -> bytes:
    """Hold the dialogue; what the client got."""
    connection = client.socket
    if name == "echo":
        connection.sendall(b"one\ntwo\n")
        got = client.take(8)
        connection.sendall(b"three\n")
        return got + client.take(6)
    if name == "slow reader":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)
        connection.sendall(b"big\nafter\n")
        got = b"".join(client.take(4096) for _ in range(20))  # small bites first
        return got + client.take(len(BIG) + 6 - len(got))
    if name == "dribbled":
        for byte in b"byte by byte\n":
            connection.sendall(bytes([byte]))
        got = client.take(13)
        for byte in b"again\n":
            connection.sendall(bytes([byte]))
        return got + client.take(6)
    if name == "half-close":
        connection.sendall(b"one\ntwo\npart of a li")
        connection.shutdown(socket.SHUT_WR)
        return client.rest()
    if name == "error":
        connection.sendall(b"one\nboom\nignored\n")
        return client.rest()
    if name == "timeout":
        connection.sendall(b"one\nnot all of a li")
        return client.rest()
    assert name == "cancel"
    connection.sendall(b"one\n")
    got = client.take(4)
    [row] = client.server.table.snapshot()
    assert client.server.table.cancel(row["id"])
    try:
        return got + client.rest()
    except (ConnectionResetError, ssl.SSLEOFError):
        return got


def datagram_dialogue(name: str, client: Grams) -> list[bytes]:
    """Hold the dialogue; the datagrams that the client got."""
    if name == "echo":
        client.send(b"one")
        got = [client.take()]
        client.send(b"two")
        return [*got, client.take()]
    if name == "slow reader":
        client.send(b"big")
        return [client.take() for _ in range(PIECES)]
    if name == "dribbled":
        for byte in b"byte by byte":
            client.send(b"part %c" % byte)
        client.send(b"!")
        return [client.take()]
    if name == "error":
        client.send(b"boom")
        return [client.take()]
    if name == "timeout":
        client.send(b"wait")
        return [client.take(), client.take()]
    assert name == "cancel"
    client.send(b"part lost")
    wait_until(client.server, lambda: len(client.server.table) == 1)
    [row] = client.server.table.snapshot()
    assert client.server.table.cancel(row["id"])
    wait_until(client.server, lambda: len(client.server.table) == 0)
    client.send(b"after")
    return [client.take()]


STREAM_EXPECTED = {
    "echo": b"one\ntwo\nthree\n",
    "slow reader": BIG + b"after\n",
    "dribbled": b"byte by byte\nagain\n",
    "half-close": b"one\ntwo\nbye after 2: part of a li\n",
    "error": b"one\nso far\n",
    "timeout": b"one\ntoo slow after 1\n",
    "cancel": b"one\n",
}
DATAGRAM_EXPECTED = {
    "echo": [b"ONE", b"TWO"],
    "slow reader": [b"%d " % number * 100 for number in range(PIECES)],
    "dribbled": [b"BYTE BY BYTE!"],
    "error": [b"so far"],
    "timeout": [b"waiting", b"too slow"],
    "cancel": [b"AFTER"],
}


# -- one cell ---------------------------------------------------------------------------------------------------------


def applies(style: str, transport: str, dialogue: str) -> bool:
    """Blocking datagram handlers have no sessions: nothing to dribble to, to wait for, or to cancel."""
    if transport in STREAMS:
        return dialogue in STREAM_DIALOGUES
    return dialogue in DATAGRAM_DIALOGUES and (style != "blocking" or dialogue in ("echo", "slow reader", "error"))


def server_of(handler: Any, transport: str, folder: Path, dispatch: str | None, **options: Any) -> Any:
    """A server of that transport, bound."""
    base: Callable[..., Any] = {
        "tcp": reqtable.TCPServer,
        "tls": reqtable.TCPServer,
        "udp": reqtable.UDPServer,
        "unix": reqtable.UnixStreamServer,
        "unixgram": reqtable.UnixDatagramServer,
    }[transport]
    if transport == "tls":
        options["config"] = reqtable.Config(tls=TLSOptions(cert=write_certificate(folder)))
    address: Any = ("127.0.0.1", 0) if transport in ("tcp", "tls", "udp") else str(folder / "server")
    return base(address, handler, dispatch=dispatch, **options)


def check(policy: str, style: str, transport: str, dialogue: str, folder: Path) -> None:
    """Hold one dialogue in one cell, and one more after it: whatever became of the first, the server goes on."""
    stream = transport in STREAMS
    connect: Any = {"tls": SecuredStream}.get(transport, Stream) if stream else Grams
    kind = "datagram" if not stream else "hasty" if dialogue == "timeout" else "stream"
    with serving(server_of(HANDLERS[style, kind], transport, folder, policy)) as server:
        client = connect(server)
        try:
            if stream:
                assert stream_dialogue(dialogue, client) == STREAM_EXPECTED[dialogue]
            else:
                assert datagram_dialogue(dialogue, client) == DATAGRAM_EXPECTED[dialogue]
        finally:
            client.close()
        wait_until(server, lambda: len(server.table) == 0)
        another = connect(server)
        try:
            if stream:
                another.socket.sendall(b"still there\n")
                assert another.take(12) == b"still there\n"
            else:
                another.send(b"still there")
                assert another.take() == b"STILL THERE"
        finally:
            another.close()
        wait_until(server, lambda: len(server.table) == 0)
