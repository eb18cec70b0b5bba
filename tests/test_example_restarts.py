"""Each example is restarted in the middle of a request: the request goes on, or the table says why it can't."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import reqtable
from examples.events import Events
from examples.http_api import Notes
from examples.miniredis import MiniRedis, Store
from examples.websocket_chat import Room
from reqtable import chunk, state
from tests.restarted import ROOT, Program
from tests.support import WAIT_S, serving, slow_but
from tests.test_examples import program as found
from tests.test_examples import run

EXAMPLES = ROOT / "examples"

STACK = "its handler has a stack: only a state machine is data"
THREAD = "a thread or a child has it"


class Case(NamedTuple):
    """One example, and a dialogue with a restart in it."""

    handler: str
    before: bytes  # sent before the restart
    answer: bytes  # what comes before the restart
    after: bytes = b""  # sent after the restart, and then end of file
    end: bytes = b""  # a regular expression of what comes after that
    why_not: str | None = None  # why the request can't move
    options: tuple[str, ...] = ()


CLOSE = b"st: x\r\nConnection: close\r\n\r\n"

CASES = [
    Case("chat.py:Chat", b"ann\n/who\n", b"your name? ann\n", b"/who\n/quit\n", rb"ann\n"),
    Case("echo.py:StateEcho", b"one\ntw", b"one\n", b"o\n", rb"two\n"),
    Case("echo.py:AsyncEcho", b"one\n", b"one\n", why_not=STACK),
    Case("echo.py:BlockingEcho", b"one\n", b"one\n", why_not=STACK),
    Case("events.py:Events", b"GET / HTTP/1.1\r\nHo", b"", CLOSE, rb"HTTP/1.1 200 OK(?s:.*)</html>\n"),
    Case("files.py:Files", b"get x\n", b"error: no such file\n", why_not=THREAD, options=("--dispatch=fork",)),
    Case("forward.py:Forward", b"one", b"one", b"two", rb"two"),
    Case("http_api.py:Notes", b"GET /notes HTTP/1.1\r\nHo", b"", CLOSE, rb"HTTP/1.1 200 OK(?s:.*){}\n"),
    Case("miniredis.py:MiniRedis", b"SET a b\r\n*2\r\n$3\r\nGE", b"+OK\r\n", b"T\r\n$1\r\na\r\n", rb"\$1\r\nb\r\n"),
    Case("netstrings.py:Reverse", b"3:abc,5:he", b"3:cba,", b"llo,", rb"5:olleh,"),
    Case("notes.py:Notes", b"put 9\none t", b"", b"wo 3count\nbye\n", rb"3\n"),
    Case("smtp_relay.py:Relay", b"NOOP\r\n", b"", why_not=STACK),
    Case("socks5.py:Socks5", b"\x05\x01\x00\x05", b"\x05\x00", b"\x09\x00\x01", rb"\x05\x07(?s:.*)"),
    Case("websocket_chat.py:Room", b"GET /x HTTP/1.1\r\nHo", b"", CLOSE, rb"HTTP/1.1 404 (?s:.*)"),
]

# A request of these is one datagram, and soon over; or, in tftp.py, a short transfer.
DATAGRAMS = {"dns_forwarder.py:Dns", "timeserver.py:Time", "tftp.py:Tftp"}


def test_every_example_that_serves_is_here() -> None:
    found = {
        each
        for path in EXAMPLES.glob("[a-z]*.py")
        for each in re.findall(r"reqtable serve \S+/(\w+\.py:\w+)", path.read_text())
    }
    assert found == {case.handler for case in CASES} | DATAGRAMS


@pytest.fixture
def upstream() -> Iterator[str]:
    """Where an echo listens, for the example that forwards."""
    with reqtable.TCPServer(("127.0.0.1", 0), StateEchoBytes) as server, serving(server):
        yield "tcp://{}:{}".format(*server.server_address)


class StateEchoBytes(reqtable.StateRequestHandler):
    @state(chunk())
    def echo(self, data: bytes) -> Any:
        self.send(data)
        return self.echo


def program(handler: str, folder: Path, *options: str, **environment: str) -> Program:
    """Serve an example."""
    served = [sys.executable, "-m", "reqtable", "serve", str(EXAMPLES / handler), "--log-level=debug"]
    served += ["--bind=tcp://127.0.0.1:0", "--config=reqtable.toml", *options]
    return Program(folder, command=served, environment={"FILES_FOLDER": str(folder), **environment})


@pytest.mark.parametrize("case", CASES, ids=[case.handler for case in CASES])
def test_a_request_goes_on_in_the_next_process_or_the_table_says_why_not(
    case: Case, tmp_path: Path, upstream: str
) -> None:
    with program(case.handler, tmp_path, *case.options, FORWARD_TO=upstream) as own, own.client() as client:
        client.send(case.before)
        assert client.receive(len(case.answer)) == case.answer
        seen = len(case.before) if case.why_not is None else 0
        own.operator().rows_once(lambda rows: any(row["kind"] == "client" and row["bytes_in"] >= seen for row in rows))
        if case.why_not is not None:
            outcome = own.restart(check=True)
            assert (outcome["problem"], outcome["immovable"]) == (None, {case.why_not: 1})
            return
        outcome = own.moved()
        assert (outcome["moved"], outcome["left"], outcome["refused"]) == (1, 0, [])
        client.send(case.after).end()
        assert re.fullmatch(case.end, client.rest())


def test_miniredis_keeps_its_data_and_those_who_wait(tmp_path: Path) -> None:
    with program("miniredis.py:MiniRedis", tmp_path) as own:
        with own.client() as client, own.client() as first, own.client() as second, own.client() as subscriber:
            assert client.ask(b"RPUSH list a b\r\n") == b":2\r\n"
            assert client.ask(b"SET key value EX 1000\r\n") == b"+OK\r\n"
            first.send(b"BLPOP queue 0\r\n")
            own.operator().rows_once(lambda rows: [row for row in rows if row["handler_state"] == "popped"])
            second.send(b"BLPOP other queue 0\r\n")
            own.operator().rows_once(lambda rows: len([row for row in rows if row["handler_state"] == "popped"]) == 2)
            subscriber.send(b"SUBSCRIBE news\r\n")
            assert b"subscribe" in subscriber.receive(33)
            for _ in range(2):
                assert own.moved()["moved"] == 4
            assert 900 < int(client.ask(b"TTL key\r\n")[1:]) <= 1000
            assert client.send(b"LRANGE list 0 -1\r\n").receive(18) == b"*2\r\n$1\r\na\r\n$1\r\nb\r\n"
            assert client.ask(b"RPUSH queue one two three\r\n") == b":3\r\n"
            assert first.receive(24) == b"*2\r\n$5\r\nqueue\r\n$3\r\none\r\n"  # it has waited longest
            assert second.receive(24) == b"*2\r\n$5\r\nqueue\r\n$3\r\ntwo\r\n"
            assert client.ask(b"PUBLISH news hello\r\n") == b":1\r\n"
            assert subscriber.receive(38).endswith(b"$5\r\nhello\r\n")
            subscriber.send(b"UNSUBSCRIBE\r\n").receive(36)
            assert client.ask(b"PUBLISH news hello\r\n") == b":0\r\n"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("requests", slow_but([20_000, 40_000], 20_000))
def test_redis_benchmark_does_not_notice_three_restarts(requests: int, tmp_path: Path) -> None:
    benchmark, client = found("redis-benchmark"), found("redis-cli")
    with program("miniredis.py:MiniRedis", tmp_path, "--log-level=info") as own:
        port = str(own.place()[1])
        command = [benchmark, "-p", port, "-t", "incr,lpush,set,get", "-n", str(requests), "-c", "20", "--csv"]
        restarts = threading.Thread(target=lambda: [own.moved() for _ in range(3)])
        restarts.start()
        runs = 0
        while restarts.is_alive():
            said = run(*command).decode()
            runs += 1
            assert [line.split(",")[0] for line in said.splitlines()[1:]] == ['"SET"', '"GET"', '"INCR"', '"LPUSH"']
        restarts.join()
        assert len(own.pids) == 4
        assert run(client, "-p", port, "get", "counter:__rand_int__").strip() == b"%d" % (runs * requests)
        assert run(client, "-p", port, "rpush", "mylist", "x").strip() == b"%d" % (runs * requests + 1)


def test_who_listens_to_events_hears_those_after_a_restart(tmp_path: Path) -> None:
    post = b"POST /events HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    with program("events.py:Events", tmp_path) as own, own.client() as listener, own.client() as speaker:
        listener.send(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        own.operator().rows_once(lambda rows: [row for row in rows if row["handler_state"] == "listening"])
        assert own.moved()["moved"] == 2
        speaker.send(post)
        while (text := listener.line()) != b"data: hello\n":
            assert text, "the stream has ended"


class Browser:
    """A WebSocket of the chat."""

    def __init__(self, address: Any, path: str, name: str) -> None:
        self.socket = socket.create_connection(address, WAIT_S)
        key = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
        self.socket.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n%b%b\r\n\r\n" % (path.encode(), key, b"A" * 22 + b"=="))
        self.unread = b""
        while b"\r\n\r\n" not in self.unread:
            self.take()
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        assert b" 101 " in head
        self.say(name)

    def take(self) -> None:
        data = self.socket.recv(65_536)
        assert data, "the WebSocket was cut off"
        self.unread += data

    def say(self, text: str) -> None:
        data = text.encode()
        self.socket.sendall(bytes([0x81, 0x80 | len(data)]) + bytes(4) + data)  # the mask is zero

    def hear(self) -> Any:
        """Return the next message. Answer pings before it."""
        while True:
            while len(self.unread) < 2 or len(self.unread) < 2 + self.unread[1]:
                self.take()
            kind, size = self.unread[:2]
            assert size < 126
            data, self.unread = self.unread[2 : 2 + size], self.unread[2 + size :]
            if kind == 0x81:
                return json.loads(data)
            assert kind == 0x89, "a ping"
            self.socket.sendall(bytes([0x8A, 0x80 | len(data)]) + bytes(4) + data)


@contextmanager
def chatting(address: Any, rooms: int, members: int) -> Iterator[list[list[Browser]]]:
    """Open WebSockets, so many in each room, that have heard of each other."""
    with ExitStack() as stack:
        found: list[list[Browser]] = []
        for room in range(rooms):
            found.append([])
            for number in range(members):
                browser = Browser(address, f"/rooms/r{room}", f"m{number}")
                stack.callback(browser.socket.close)
                if number:
                    assert browser.hear()["text"].startswith("here: m0")
                found[-1].append(browser)
                for each in found[-1]:
                    assert each.hear() == {"text": f"m{number} has joined"}
        yield found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("rooms", "members"), slow_but([(5, 4), (1_000, 10)], (5, 4)))
def test_each_member_of_a_chat_gets_each_message_once_through_a_restart(
    rooms: int, members: int, tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = rooms * members + 500
    if limit[1] < needed:
        pytest.skip(f"this needs {needed} descriptors, and the limit is {limit[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit[0], needed), limit[1]))
    try:
        # The checks of all rows after each pass are too slow for thousands of rows.
        own = program("websocket_chat.py:Room", tmp_path, "--log-level=info", REQTABLE_DEBUG="0")
        own.configure("[limits]\nentries_max = 20000\n")
        with own, chatting(own.place(), rooms, members) as there:
            talking = there[:: max(1, rooms // 20)]
            said = 0
            own.kill(own.pid, signal.SIGUSR2)
            while f"restart: {rooms * members} requests moved" not in own.log:
                for browsers in talking:
                    browsers[said % members].say(f"{said}")
                said += 1
                time.sleep(0.02)  # the pace of the talk: with thousands of rows, the restart takes seconds
            for browsers in talking:
                for browser in browsers:
                    heard = sorted(int(browser.hear()["text"]) for _ in range(said))
                    assert heard == list(range(said))
            for browsers in there:  # nobody has anything else, and all are there
                browsers[-1].say("end")
                for browser in browsers:
                    assert browser.hear() == {"from": f"m{members - 1}", "text": "end"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def chat_of(handler: Any) -> Any:
    return SimpleNamespace(table={id: SimpleNamespace(id=id, handler=handler()) for id in (1, 2)})


def test_what_two_old_workers_give_to_one_new_worker_is_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples with hooks add what is given to what is there, also if both workers have used the same key."""
    nobody: Any = SimpleNamespace(table={})
    monkeypatch.setattr(Notes, "notes", {})
    monkeypatch.setattr(Notes, "last", [0])
    Notes.restore_state(nobody, {"notes": {"1": "a", "2": "b"}, "last": [2]})
    Notes.restore_state(nobody, {"notes": {"1": "c"}, "last": [1]})
    assert (Notes.notes, Notes.last) == ({"1": "a", "2": "b", "3": "c"}, [3])

    monkeypatch.setattr(Events, "recent", deque())
    monkeypatch.setattr(Events, "last", [0])
    monkeypatch.setattr(Events, "listeners", set())
    for id, events in enumerate(([(1, b"a"), (4, b"d")], [(2, b"b"), (3, b"c")]), 1):
        Events.restore_state(chat_of(object), {"listeners": [id, 9], "recent": events, "last": [id]})
    assert ([each for each, _ in Events.recent], Events.last, len(Events.listeners)) == ([1, 2, 3, 4], [2], 2)

    monkeypatch.setattr(Room, "rooms", {})
    server = chat_of(SimpleNamespace)
    for id in (1, 2):
        Room.restore_state(server, {"/": {"ann": id}, "/empty": {"bob": 9}})
    assert Room.rooms == {"/": {"ann": 1, "ann'": 2}}
    assert server.table[2].handler.name == "ann'"

    monkeypatch.setattr(MiniRedis, "store", store := Store(lambda: 10.0))
    for id, data in ((1, {b"a": b"1", b"both": b"1"}), (2, {b"b": [b"2"], b"both": b"2"})):
        waits: dict[bytes, list[int]] = {b"key": [id]}
        MiniRedis.restore_state(
            chat_of(object),
            {"values": data, "expires_s": {b"a": 5.0} if id == 1 else {}, "waiting": waits, "subscribers": {}},
        )
    assert store.values == {b"a": b"1", b"b": deque([b"2"]), b"both": b"2"}
    assert store.expires_at == {b"a": 15.0}
    assert len(store.waiting[b"key"]) == 2
