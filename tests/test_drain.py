"""Draining: which connections see end of file, which go on, what happens to the others, and the signals for it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, Limits, call, exactly, line, state
from tests.http_client import Asking
from tests.service import Service
from tests.support import WAIT_S, Client, serving, wait_until

ROOT = Path(__file__).parent.parent
ANY = ("127.0.0.1", 0)
QUICK = Config(limits=Limits(drain_idle_s=0.05))


class States(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Any:
        self.send(text)
        return (self.body, exactly(10)) if text == b"body\n" else self.command

    @state()
    def body(self, data: bytes) -> Any:
        self.send(data + b"\n")
        return self.command

    def on_eof(self, partial: bytes) -> None:
        self.send(b"goodbye\n")


class Coroutine(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line()):
            await self.send(text)
            if text == b"body\n":
                await self.send(await self.read(exactly(10)) + b"\n")
        await self.send(b"goodbye\n")


class Blocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(text)
            if text == b"body\n":
                self.wfile.write(self.rfile.read(10) + b"\n")
        self.wfile.write(b"goodbye\n")


@pytest.mark.parametrize(
    ("handler", "dispatch"),
    [
        (States, "inline"),
        (Coroutine, "inline"),
        (Blocking, "greenlet"),
        (States, "pool"),
        (States, "thread"),
        (Coroutine, "thread"),
    ],
)
def test_the_idle_are_told_and_the_others_go_on(handler: Any, dispatch: str) -> None:
    server = reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=QUICK)
    with serving(server), Client(server.server_address) as idle, Client(server.server_address) as busy:
        assert idle.ask(b"a\n") == b"a\n"
        assert busy.send(b"body\n01234").line() == b"body\n"
        drain = threading.Thread(target=server.drain, args=(WAIT_S,))
        drain.start()
        assert idle.rest() == b"goodbye\n"
        if (
            handler is not Blocking
        ):  # whose buffer has what came: as far as anyone can see it waits for the next request
            assert drain.is_alive()
            assert busy.send(b"56789").rest() == b"0123456789\ngoodbye\n"
        drain.join(WAIT_S)
        assert not drain.is_alive()
        assert server.stats()["finished"]["drained"] == 0


class Slow(reqtable.StateRequestHandler):
    """Takes a while for each command, then asks for more input, as a mail server that looks something up."""

    @state(line())
    def command(self, text: bytes) -> Any:
        self.server.begun.set()  # type: ignore[attr-defined]
        self.server.found.wait(WAIT_S)  # type: ignore[attr-defined]
        self.send(b"go on\n")
        return self.more

    @state(line())
    def more(self, text: bytes) -> Any:
        self.send(text)
        return self.command


class SlowBlocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline():
            self.server.begun.set()  # type: ignore[attr-defined]
            self.server.found.wait(WAIT_S)  # type: ignore[attr-defined]
            self.wfile.write(b"go on\n")
            self.wfile.write(self.rfile.readline())


def pass_by(server: Any, seconds: float) -> None:
    """Wait until `seconds` have passed on the server's clock."""
    until = server.table.clock() + seconds
    wait_until(server, lambda: server.table.clock() > until)


class LooksUp(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Any:
        self.server.begun.set()  # type: ignore[attr-defined]
        return self.asks_back, call(self.server.found.wait, WAIT_S)  # type: ignore[attr-defined]

    @state()
    def asks_back(self, found: bool) -> Any:
        self.send(b"go on\n")
        return self.more

    @state(line())
    def more(self, text: bytes) -> Any:
        self.send(text)
        return self.command


@pytest.mark.parametrize(
    ("handler", "dispatch"), [(LooksUp, "inline"), (Slow, "pool"), (Slow, "thread"), (SlowBlocking, "thread")]
)
def test_who_is_at_work_is_not_told(handler: Any, dispatch: str) -> None:
    """The connection is quiet for longer than `drain_idle_s`, but its handler still works and will read more input."""
    config = Config(limits=Limits(drain_idle_s=0.25))
    server: Any = reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=config)
    server.begun, server.found = threading.Event(), threading.Event()
    with serving(server), Client(server.server_address) as client:
        client.send(b"look it up\n")
        assert server.begun.wait(WAIT_S)
        drain = threading.Thread(target=server.drain, args=(WAIT_S,))
        drain.start()
        pass_by(server, 0.4)
        server.found.set()
        assert client.line() == b"go on\n"
        pass_by(server, 0.1)  # it is not idle since before it answered
        assert client.ask(b"and this\n") == b"and this\n"
        client.end()
        drain.join(WAIT_S)
        assert not drain.is_alive()
        assert server.stats()["finished"]["drained"] == 0


def test_those_who_come_meanwhile_are_refused_and_those_left_in_the_end_are_ended() -> None:
    with serving(reqtable.TCPServer(ANY, States, config=QUICK)) as server, Client(server.server_address) as busy:
        assert busy.send(b"body\n0").line() == b"body\n"
        drain = threading.Thread(target=server.drain, args=(0.3,))
        drain.start()
        wait_until(server, lambda: not len(server.engine.listeners))
        with pytest.raises(ConnectionRefusedError):
            Client(server.server_address)
        assert busy.rest() == b""
        drain.join(WAIT_S)
        assert server.stats()["finished"]["drained"] == 1
        assert server.stats()["accepted"] == 1


def test_those_who_have_connected_are_served() -> None:
    """They are in the listening socket's queue: closing that socket at once would reset them."""
    with serving(reqtable.TCPServer(ANY, States, config=QUICK)) as server, contextlib.ExitStack() as stack:
        held, released = threading.Event(), threading.Event()
        server.engine.post(lambda: held.set() or released.wait(WAIT_S))
        assert held.wait(WAIT_S)
        clients = [stack.enter_context(Client(server.server_address)).send(b"a\n") for _ in range(100)]
        drain = threading.Thread(target=server.drain, args=(WAIT_S,))
        drain.start()
        released.set()
        assert {client.line() for client in clients} == {b"a\n"}
        assert {client.rest() for client in clients} == {b"goodbye\n"}
        drain.join(WAIT_S)


def test_a_busy_client_is_served_until_the_time_is_over() -> None:
    """A busy client is never idle, so each of its requests is answered. Only the deadline cuts it off."""
    with serving(reqtable.TCPServer(ANY, States, config=QUICK)) as server, Client(server.server_address) as client:
        client.ask(b"a\n")
        drain = threading.Thread(target=server.drain, args=(0.5,))
        drain.start()
        answers = 0
        with contextlib.suppress(ConnectionError):
            while client.send(b"again\n").line() == b"again\n":
                answers += 1
        drain.join(WAIT_S)
        assert answers > 10
        assert server.stats()["finished"]["drained"] == 1


@contextlib.contextmanager
def command(*arguments: str, stderr: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    words = [sys.executable, "-m", "reqtable", "serve", "examples/notes.py:Notes", "--bind", "tcp://127.0.0.1:0"]
    process = subprocess.Popen([*words, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert process.stdout is not None
        [port] = re.findall(rb"127\.0\.0\.1:(\d+)", process.stdout.readline())
        yield process, ("127.0.0.1", int(port))
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_what_has_begun_finish() -> None:
    with command() as (process, address), Client(address) as client:
        client.send(b"count\nput 9\na b").line()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert b"ending when 1 request is done, or in 30 s" in process.stderr.readline()
        assert client.send(b" c d e").ask(b"count\n") == b"5\n"
        client.end()
        assert process.wait(WAIT_S) == 0


@pytest.mark.parametrize("workers", [None, 1])
def test_an_answer_whose_step_runs_when_sigterm_comes_says_that_the_connection_closes(workers: int | None) -> None:
    with Service(handler="tests/programs/signalled.py:Signalled", workers=workers) as service:
        with Asking(service.address) as client:
            assert client.get("/").fields["connection"] == "close"
            assert client.rest() == b""
        if workers:
            service.signal(signal.SIGTERM)
        assert service.wait() == 0


def test_finished_requests_are_logged_as_json_where_that_is_asked_for() -> None:
    with command("--access-log", "--log-format", "json") as (process, address), Client(address) as client:
        assert client.send(b"count\n").end().rest() == b"0\n"
        peer = client.socket.getsockname()
        assert process.stderr is not None
        line = json.loads(process.stderr.readline())
    assert (line["logger"], line["level"], line["handler"], line["ending"]) == (
        "reqtable.access",
        "INFO",
        "Notes",
        "done",
    )
    assert (line["peer"], line["bytes_in"], line["bytes_out"]) == (f"127.0.0.1:{peer[1]}", 6, 2)
    assert (line["id"], line["local"]) == (1, f"127.0.0.1:{address[1]}")


def test_a_second_sigterm_ends_at_once() -> None:
    with command() as (process, address), Client(address) as client:
        client.send(b"count\nput 9\na b").line()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert client.rest() == b""


def test_a_terminal_shows_how_far_it_is() -> None:
    own, theirs = pty.openpty()
    try:
        with command(stderr=theirs) as (process, address), Client(address) as client:
            client.send(b"count\nput 9\na b").line()
            process.send_signal(signal.SIGTERM)
            shown = b""
            while not re.search(rb"\rdraining: 1 of 1, \d+ s left", shown):
                assert select.select([own], [], [], WAIT_S)[0], shown
                shown += os.read(own, 1000)
            client.end()
            assert process.wait(WAIT_S) == 0
    finally:
        os.close(own)
        os.close(theirs)
