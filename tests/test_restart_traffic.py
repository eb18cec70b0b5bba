"""What is half done when a program is restarted goes on: messages, files, connections to others, waits."""

from __future__ import annotations

import socket
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import websockets_by_hand as ws
from tests.restarted import LEDGER, Program, answer_of, next_version
from tests.support import WAIT_S, Client

MUCH = 6 * 2**20  # more than the buffers of both sides
SOURCE = (
    LEDGER
    + """
import logging
from typing import Any
import reqtable
from reqtable import Connection, connect
from reqtable.http import HTTPRequestHandler, WebSocketHandler, ws_message


class Web(HTTPRequestHandler):
    def do_GET(self):
        return self.answer(200, f"{VERSION} {self.request.path}")

    def do_POST(self):
        return self.answer(200, f"{VERSION} {len(self.request.body)} {sum(self.request.body)}")


class Echo(WebSocketHandler):
    count: int = 0

    @state(ws_message(limit=2**24))
    def heard(self, message):
        self.count += 1
        self.send_text(f"{VERSION} {self.count} {message}")
        return self.heard


class File(StateRequestHandler):
    file: Any = None

    @state(line())
    def asked(self, name):
        self.file = open(name.strip(), "rb")
        self.send_file(self.file)
        return self.sent, flushed()

    @state()
    def sent(self, _):
        self.file.close()
        self.file = None
        self.send(f"{VERSION} sent\\\\n".encode())
        return self.asked


class Relay(StateRequestHandler):
    upstream: Connection

    @state(line())
    def asked(self, port):
        return self.connected, connect(f"tcp://127.0.0.1:{int(port)}")

    @state()
    def connected(self, upstream):
        self.upstream = upstream
        self.send(b"connected\\\\n")
        return self.ready

    @state(line())
    def ready(self, text):
        self.upstream.send(text.strip() * 2**20 + b"\\\\n")
        return self.answered, self.upstream.line()

    @state()
    def answered(self, text):
        self.send(b"%d " % VERSION + text)
        return self.ready


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG)
    reqtable.serve({f"tcp://127.0.0.{n}:0": each for n, each in enumerate((Ledger, Web, Echo, File, Relay), 1)})
""".replace("\\\\n", "\\n")
)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with Program(tmp_path, SOURCE, command=[sys.executable, "app.py"]) as own:
        yield own


def restart(program: Program, moved: int) -> None:
    program.change(next_version(SOURCE))
    outcome = program.moved()
    assert (outcome["moved"], outcome["refused"]) == (moved, []), program.log


def crc(data: bytes) -> int:
    return zlib.crc32(data)


def test_an_upload_and_a_download_go_on(program: Program) -> None:
    data = bytes(range(256)) * (MUCH // 256)
    with program.client() as up, program.client() as down:
        up.send(b"take %d\n" % MUCH + data[: MUCH // 3])
        down.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131072)
        down.send(b"give %d\n" % MUCH)
        first = down.receive(1000)
        program.operator().rows_once(lambda rows: any(each["state"] == "WRITING" for each in rows))
        restart(program, 2)
        up.send(data[MUCH // 3 :])
        assert answer_of(up.line()) == (2, program.pids[1], str(sum(data)))
        assert crc(first + down.receive(MUCH - 1000)) == crc(data)
        assert answer_of(down.line()) == (2, program.pids[1], "given")


def test_a_file_that_is_half_sent_goes_on(program: Program) -> None:
    data = b"".join(b"%d\n" % number for number in range(MUCH // 7))
    (program.folder / "data").write_bytes(data)
    with program.client("File") as client:
        client.send(b"data\n")
        first = client.receive(1000)
        restart(program, 1)
        (program.folder / "data").unlink()  # the new process has the file, not its name
        assert crc(first + client.receive(len(data) - 1000)) == crc(data)
        assert client.line() == b"2 sent\n"
        program.operator().rows_once(lambda rows: any(each["state"] == "READING" for each in rows))
        assert not [each for each in program.descriptors(program.pids[1]) if "data" in each]


def test_waits_keep_their_time(program: Program) -> None:
    """A sleep that is over when the request arrives ends at once; another one ends when it would have."""
    with program.client() as short, program.client() as long:
        short.send(b"nap 0.01\nadd 7\n")
        begun = time.monotonic()
        long.send(b"nap 1000\n")
        program.operator().rows_once(lambda rows: any(each["state"] == "SLEEPING" for each in rows))
        restart(program, 2)
        assert [answer_of(short.line()).rest for _ in range(2)] == ["awake", "7"]
        rows = program.operator().rows_once(lambda rows: any(each["state"] == "SLEEPING" for each in rows))
        [left_s] = [each["deadline_s"] for each in rows if each["state"] == "SLEEPING"]
        assert left_s <= 1000 - (time.monotonic() - begun) + 1


def test_http_goes_on_in_the_middle_of_a_message(program: Program) -> None:
    body = bytes(range(256)) * 10
    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n600\r\n" + body[:1536] + b"\r\n400\r\n"
    halves = {
        "head": (b"GET /one HTT", b"P/1.1\r\nHost: a\r\n\r\n", b"2 /one"),
        "body": (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2560\r\n\r\n" + body[:700],
            body[700:],
            b"2 2560 %d" % sum(body),
        ),
        "chunked": (
            chunked + body[1536:1700],
            body[1700:] + b"\r\n0\r\n\r\n",
            b"2 2560 %d" % sum(body),
        ),
        "kept": (b"GET /zero HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /two HTTP/1.1\r\nHost: a\r\n\r\n", b"2 /two"),
    }
    clients = {name: program.client("Web") for name in halves}
    try:
        for name, client in clients.items():
            client.send(halves[name][0])
        assert answered(clients["kept"]) == b"1 /zero"
        restart(program, len(halves))
        for name, client in clients.items():
            client.send(halves[name][1])
            assert answered(client) == halves[name][2], name
    finally:
        for client in clients.values():
            client.close()


def answered(client: Client) -> bytes:
    """Return the body of an answer."""
    length = 0
    while (field := client.line().strip().lower()) != b"":
        if field.startswith(b"content-length:"):
            length = int(field.partition(b":")[2])
    return client.receive(length)


def test_web_sockets_go_on_between_and_inside_messages(program: Program) -> None:
    message = ws.text("hello, world" * 20)
    halves = {
        "between": (b"", ws.text("hello")),
        "in a head": (message[:1], message[1:]),
        "in a payload": (message[:50], message[50:]),
        "between fragments": (
            ws.frame(ws.TEXT, b"one", is_last=False) + ws.ping(b"p"),
            ws.frame(0, b"two", is_last=True),
        ),
    }
    clients = {name: program.client("Echo") for name in halves}
    try:
        for name, client in clients.items():
            client.send(ws.handshake() + ws.text("first"))
            while client.line().strip():
                pass
            assert one_frame(client) == b"1 1 first"
            client.send(halves[name][0])
            if name == "between fragments":
                assert one_frame(client) == b"p"  # the pong: the fragment has come, too
        restart(program, len(halves))
        wanted = [b"hello", b"hello, world" * 20, b"hello, world" * 20, b"onetwo"]
        for (name, client), text in zip(clients.items(), wanted, strict=True):
            client.send(halves[name][1])
            assert one_frame(client) == b"2 2 " + text, name
    finally:
        for client in clients.values():
            client.close()


def one_frame(client: Client) -> bytes:
    """Return the payload of a short frame."""
    size = client.receive(2)[1]
    return client.receive(int.from_bytes(client.receive(2)) if size == 126 else size)


def test_connections_to_others_go_on_with_what_is_half_read_and_unsent(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as upstream, program.client("Relay") as client:
        upstream.settimeout(WAIT_S)
        assert client.ask(b"%d\n" % upstream.getsockname()[1]) == b"connected\n"
        other, _ = upstream.accept()
        with other:
            other.settimeout(WAIT_S)
            client.send(b"abcdef\n")  # six megabytes for the other one, which does not read
            other.sendall(b"half of a li")
            program.operator().rows_once(lambda rows: any(each["state"] == "WAITING" for each in rows))
            restart(program, 1)
            got = bytearray()
            while not got.endswith(b"\n"):
                got += other.recv(2**20)
            assert crc(bytes(got)) == crc(b"abcdef" * 2**20 + b"\n")
            other.sendall(b"ne\n")
            assert client.line() == b"2 half of a line\n"
            client.send(b"x\n")
            while not got.endswith(b"x\n"):
                got += other.recv(2**20)
            other.sendall(b"again\n")
            assert client.line() == b"2 again\n"
