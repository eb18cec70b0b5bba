"""Requests that move with their files: one that is sent, one that is written, one that is read. And HTTP's."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reqtable import State, StateRequestHandler, Transition, chunk, exactly, flushed, line, state
from reqtable.http import WebSocketHandler, wsgi_handler
from tests.hosts import client_of, hosts, move
from tests.http_client import files_of
from tests.support import open_descriptors
from tests.test_moving import MUCH, all_of, receive
from tests.websockets_by_hand import frame, handshake


@pytest.fixture(autouse=True)
def all_descriptors_are_closed() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


class Sends(StateRequestHandler):
    """Sends the file that a line names, then its second half."""

    file: Any = None

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.file = open(text.strip(), "rb")  # noqa: SIM115
        self.send(b"begin ")
        self.send_file(self.file)
        self.send_file(self.file, len(MUCH) // 2)
        self.send(b" end")
        return self.sent, flushed()

    @state()
    def sent(self, _: None) -> Transition:
        self.file.close()
        return None


@pytest.mark.parametrize("seen", [0, 6, 7, 3_000_000])
def test_a_file_that_is_half_sent_moves(tmp_path: Path, seen: int) -> None:
    (tmp_path / "f").write_bytes(MUCH)
    with hosts(Sends) as (first, second), client_of(first) as client:
        client.sendall(bytes(tmp_path / "f") + b"\n")
        entry = first.take()
        assert entry.state is State.WRITING
        found = receive(client, first, seen) if seen else b""
        moved = move(first, second, entry)
        found += all_of(client, second)
        assert found == b"begin " + MUCH + MUCH[len(MUCH) // 2 :] + b" end"
        assert moved.bytes_out == len(found)


class Uploads(StateRequestHandler):
    """Writes what comes to a file. Every answer is how much there is."""

    file: Any = None
    kind: str = "wb"

    @state(chunk())
    def some(self, data: bytes) -> Transition:
        if self.file is None:
            self.file = self.made()
        self.file.write(data)
        self.send(b"%d\n" % self.file.tell())
        return self.some

    def made(self) -> Any:
        if self.kind == "temporary":
            return tempfile.TemporaryFile()
        return open(self.server.path, self.kind, 0 if self.server.is_raw else -1)

    def on_eof(self, partial: bytes) -> Transition:
        if self.kind != "wb":
            self.file.seek(0)
            self.send(self.file.read())
        self.file.close()
        return None


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("kind", ["wb", "wb+", "ab+", "temporary"])
def test_a_file_that_is_written_moves(tmp_path: Path, kind: str, is_raw: bool) -> None:
    class Writes(Uploads):
        pass

    Writes.kind = kind
    with hosts(Writes) as (first, second), client_of(first) as client:
        for host in (first, second):
            host.server.path, host.server.is_raw = tmp_path / "upload", is_raw
        client.sendall(b"one, ")
        entry = first.take()
        assert receive(client, first, 2) == b"5\n"
        before = entry.handler.file
        moved = move(first, second, entry)
        assert type(moved.handler.file) is type(before)
        assert before.closed
        client.sendall(b"two, ")
        assert receive(client, second, 3) == b"10\n"
        moved = move(second, first, moved)
        client.sendall(b"three")
        assert receive(client, first, 3) == b"15\n"
        client.shutdown(socket.SHUT_WR)
        assert all_of(client, first) == (b"" if kind == "wb" else b"one, two, three")
    if kind != "temporary":
        assert (tmp_path / "upload").read_bytes() == b"one, two, three"


class Reads(StateRequestHandler):
    """Answers with as many bytes of a file as a line asks for, through the file's buffer."""

    file: Any = None

    @state(line())
    def command(self, text: bytes) -> Transition:
        if self.file is None:
            self.file = open(self.server.path, "rb")  # noqa: SIM115
        self.send(self.file.read(int(text)))
        return self.command

    def on_close(self) -> None:
        if self.file is not None:
            self.file.close()


def test_a_file_that_is_read_moves_with_its_position(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(MUCH)
    with hosts(Reads) as (first, second), client_of(first) as client:
        first.server.path = second.server.path = tmp_path / "f"
        client.sendall(b"10\n")
        entry = first.take()
        assert receive(client, first, 10) == MUCH[:10]
        name, position = entry.handler.file.name, entry.handler.file.tell()
        moved = move(first, second, entry)
        assert (moved.handler.file.name, moved.handler.file.tell()) == (str(name), position)
        assert type(moved.handler.file) is io.BufferedReader
        client.sendall(b"20\n")
        assert receive(client, second, 20) == MUCH[10:30]


# -- HTTP -------------------------------------------------------------------------------------------------------------


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (b"", MUCH),
        (b"Range: bytes=1000-9000000\r\n", MUCH[1000:9_000_001]),
    ],
)
def test_an_answer_with_a_file_that_is_half_sent_moves(tmp_path: Path, fields: bytes, expected: bytes) -> None:
    (tmp_path / "big.bin").write_bytes(MUCH)
    with hosts(files_of(tmp_path)) as (first, second), client_of(first) as client:
        client.sendall(b"GET /big.bin HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n")
        entry = first.take()
        assert entry.handler.state_name == "sending"
        found = receive(client, first, 1_000_000)
        moved = move(first, second, entry)
        whole = len(found.partition(b"\r\n\r\n")[0]) + 4 + len(expected)
        found += receive(client, second, whole - len(found))
        assert body_of(found) == expected
        assert moved.handler._file is None
        client.sendall(b"GET /big.bin HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert body_of(all_of(client, second)) == MUCH


def test_a_file_that_has_changed_while_it_moved_cuts_the_answer(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(MUCH)
    with hosts(files_of(tmp_path)) as (first, second), client_of(first) as client:
        client.sendall(b"GET /big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        entry = first.take()
        move(first, second, entry)
        os.utime(tmp_path / "big.bin", (1, 1))
        assert len(body_of(all_of(client, second))) < len(MUCH)


def digest(environ: Any, start_response: Any) -> list[bytes]:
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", "40")])
    return [hashlib.sha1(body).hexdigest().encode()]


def test_a_long_body_moves_with_its_file() -> None:
    site = wsgi_handler(digest)
    with hosts(site, high_water_bytes=10**8) as (first, second), client_of(first) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + MUCH[:100_000])
        entry = first.take()
        first.until(lambda: entry.handler.request.received == 100_000)
        assert entry.handler._spool is not None
        moved = move(first, second, entry)
        client.sendall(MUCH[100_000:200_000])
        found = receive(client, second, 1)
        assert body_of(found) == hashlib.sha1(MUCH[:200_000]).hexdigest().encode()
        assert moved.handler._spool is None


class Shouts(WebSocketHandler):
    count: int = 0

    def on_message(self, message: str | bytes) -> Transition:
        self.count += 1
        self.send_text(f"{self.count} {message!s}")
        return self.message


def test_a_websocket_moves_within_a_message() -> None:
    with hosts(Shouts) as (first, second), client_of(first) as client:
        client.sendall(handshake())
        entry = first.take()
        assert receive(client, first, 1).startswith(b"HTTP/1.1 101")
        whole = frame(1, b"hello")
        client.sendall(whole + whole[:3])
        assert receive(client, first, 9) == b"\x81\x071 hello"
        moved = move(first, second, entry)
        client.sendall(whole[3:])
        assert receive(client, second, 9) == b"\x81\x072 hello"
        assert moved.handler.websocket is not None


class Sized(StateRequestHandler):
    @state(exactly(3))
    def three(self, data: bytes) -> Transition:
        return self.three


def test_what_two_hosts_have_open_is_theirs_alone() -> None:
    """The fixture counts descriptors. A request that is only saved costs none."""
    with hosts(Sized) as (first, _), client_of(first) as client:
        client.sendall(b"ab")
        entry = first.take()
        before = open_descriptors()
        assert len(first.table.save()) == 1
        assert open_descriptors() == before
        client.sendall(b"c")
        first.passes()
        assert entry.bytes_in == 3


def test_two_fields_with_one_file_have_one_file_afterwards(tmp_path: Path) -> None:
    class Twice(Reads):
        other: Any = None

    (tmp_path / "f").write_bytes(b"abc")
    with hosts(Twice) as (first, second), client_of(first) as client:
        entry = first.take()
        entry.handler.file = entry.handler.other = (tmp_path / "f").open("rb")
        moved = move(first, second, entry)
        assert moved.handler.file is moved.handler.other
        client.sendall(b"2\n")
        assert receive(client, second, 2) == b"ab"
