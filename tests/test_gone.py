"""A client that resets its connection is noticed at once, whatever its request waits for. One that only ends is not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import (
    AsyncRequestHandler,
    StateRequestHandler,
    Transition,
    call,
    either,
    hand_off,
    line,
    sleep,
    state,
    told,
)
from reqtable.config import Config, ThreadOptions, TLSOptions
from reqtable.loop.platform import System
from reqtable.loop.process import LOOPS
from reqtable.server.engine import Engine
from tests.certificates import client_context, write_certificate
from tests.support import WAIT_S, Client, served, serving, slow_but, wait_until

LONG_S = 3600.0
SHORT_S = 0.3
MANY_PASSES = 200  # of a loop that waits for SHORT_S while a test looks every 5 ms; one that spins makes thousands


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(str(tmp_path / "gate"))
    with contextlib.closing(made):
        yield made


class Gate:
    """A named pipe, at which threads and processes wait until the test opens it."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.mkfifo(path)
        self._end = os.open(path, os.O_RDWR)

    @property
    def is_reached(self) -> bool:
        return os.path.exists(self.path + ".reached")

    def open(self) -> None:
        os.write(self._end, b"!" * 100)

    def close(self) -> None:
        self.open()
        os.close(self._end)


def reach(path: str) -> None:
    Path(path + ".reached").touch()


def pass_gate(path: str) -> str:
    end = os.open(path, os.O_RDONLY)
    try:
        reach(path)  # only now: if the gate were closed before, it could not be opened any more
        os.read(end, 1)
    finally:
        os.close(end)
    return path


class Waits(StateRequestHandler):
    """Reads the path of a gate, and what to wait for. Then answers with the next line."""

    path: str = ""

    @state(line())
    def command(self, text: bytes) -> Transition:
        what, path = text.decode().split()
        self.send(b"waits\n")
        if what == "sleep":
            reach(path)
            return self.done, sleep(LONG_S)
        if what.startswith("hand_off-"):
            self.path = path
            return self.elsewhere, hand_off(what.partition("-")[2])
        if what == "step":
            pass_gate(path)
            return self.done, sleep(0)
        return self.done, call(pass_gate, path, on=what)

    @state()
    def elsewhere(self, _: None) -> Transition:
        reach(self.path)
        return self.done, sleep(LONG_S)

    @state()
    def done(self, _: object) -> Transition:
        return self.last

    @state(line())
    def last(self, text: bytes) -> Transition:
        self.send(text)
        return None


class AsyncWaits(AsyncRequestHandler):
    async def handle(self) -> None:
        what, path = (await self.read(line())).decode().split()
        await self.send(b"waits\n")
        if what == "sleep":
            reach(path)
            await self.sleep(LONG_S)
        elif what.startswith("hand_off-"):
            await self.hand_off(what.partition("-")[2])
            reach(path)
            await self.sleep(LONG_S)
        else:
            await self.call(pass_gate, path, on=what)


class Blocks(reqtable.StreamRequestHandler):
    """Reads the path of a gate, and waits for the gate, not for its socket."""

    def handle(self) -> None:
        path = self.rfile.readline().decode().split()[1]
        self.wfile.write(b"waits\n")
        pass_gate(path)


def abort(client: socket.socket) -> None:
    """Reset a TCP connection although forked children may have copies of the client's socket.

    Connecting a socket to an address of the family AF_UNSPEC dissolves its association (connect(2)).
    """
    assert ctypes.CDLL(None).connect(client.fileno(), bytes(16), 16) == 0


def ended_by_reset(server: Any) -> bool:
    return not len(server.table) and server.stats()["finished"]["reset"] == 1


def reset_while_waiting(server: Any, what: str, gate: Gate, letters: str) -> None:
    """Reset a connection whose request waits, and wait for the request's end."""
    with Client(server.server_address) as client:
        try:
            client.send(f"{what} {gate.path}\n".encode())
            wait_until(server, lambda: gate.is_reached)
            wait_until(server, lambda: [row["letter"] in letters for row in server.table.snapshot()] == [True])
            abort(client.socket)
            wait_until(server, lambda: ended_by_reset(server))
        finally:
            gate.open()


QUICK = [("inline", "sleep"), ("inline", "thread"), ("thread", "sleep"), ("fork", "sleep"), ("pool", "step")]
WAYS = [
    *((policy, what) for policy in ("inline", "greenlet") for what in ("sleep", "thread", "process", "fork")),
    *(
        (policy, what)
        for policy in ("thread", "pool", "fork")
        for what in ("sleep", "thread", "process", "fork", "step")
    ),
    *(("executor", what) for what in ("sleep", "thread", "process", "fork", "step")),
    *(("inline", f"hand_off-{policy}") for policy in ("thread", "pool", "fork")),
]


@pytest.mark.parametrize(("policy", "what"), slow_but(WAYS, *QUICK, ("inline", "fork"), ("inline", "hand_off-fork")))
def test_a_reset_ends_the_request_at_once(policy: str, what: str, gate: Gate) -> None:
    with served(Waits, policy) as server:
        reset_while_waiting(server, what, gate, "SFD")


@pytest.mark.parametrize(
    ("policy", "what"), slow_but([way for way in WAYS if way[0] != "executor" and way[1] != "step"])
)
def test_so_it_does_for_a_coroutine(policy: str, what: str, gate: Gate) -> None:
    with served(AsyncWaits, policy) as server:
        reset_while_waiting(server, what, gate, "SFD")


@pytest.mark.parametrize("policy", ["thread", "pool", "fork"])
def test_so_it_does_for_a_blocking_handler_that_waits_for_something_else(policy: str, gate: Gate) -> None:
    """A thread goes on until its wait is over, but its request is gone. A child is killed."""
    with served(Blocks, policy) as server:
        reset_while_waiting(server, "?", gate, "D")
        if policy == "fork":
            server._policies.chosen.collect(blocking=True)


@pytest.mark.parametrize("policy", ["thread", "fork"])
def test_a_thread_or_child_that_reads_meets_the_reset_itself_and_may_clean_up(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reqtable.dispatch.handoff._NOTICE_S", LONG_S)

    class Reads(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"waits\n")
            self.rfile.read(len(b"part of an upload"))
            poll = select.poll()
            poll.register(self.request, 0)
            poll.poll()
            time.sleep(0.05)  # the loop has seen the reset by now
            try:
                self.rfile.read()
            except ConnectionResetError:
                (tmp_path / "reset").touch()
                raise

    with served(Reads, policy, handle_error=lambda *_: None) as server, Client(server.server_address) as client:
        assert client.line() == b"waits\n"
        client.send(b"part of an upload")
        wait_until(server, lambda: [row["letter"] for row in server.table.snapshot()] == ["D"])
        abort(client.socket)
        wait_until(server, lambda: ended_by_reset(server))
    assert (tmp_path / "reset").exists()


class Telling(Waits):
    closed: ClassVar[list[Any]] = []

    def on_close(self) -> None:
        self.closed.append(self)


@pytest.mark.parametrize("policy", ["inline", "thread", "pool"])
def test_the_handler_is_told(policy: str, gate: Gate) -> None:
    Telling.closed.clear()
    with served(Telling, policy) as server:
        reset_while_waiting(server, "sleep", gate, "SD")
    assert len(Telling.closed) == 1


def test_a_step_that_runs_elsewhere_returns_before_the_handler_is_told(gate: Gate) -> None:
    Telling.closed.clear()
    with served(Telling, "pool") as server, Client(server.server_address) as client:
        client.send(f"step {gate.path}\n".encode())
        wait_until(server, lambda: gate.is_reached)
        abort(client.socket)
        wait_until(server, lambda: ended_by_reset(server))
        assert Telling.closed == []
        gate.open()
        wait_until(server, lambda: len(Telling.closed) == 1)


@pytest.mark.parametrize("handler", [Waits, Blocks])
def test_one_that_waits_for_a_vacancy_is_noticed_too(handler: Any, gate: Gate) -> None:
    config = Config(thread=ThreadOptions(threads_max=1))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch="thread", config=config)) as server:
        with Client(server.server_address) as first, Client(server.server_address) as second:
            first.send(f"thread {gate.path}\n".encode())
            wait_until(server, lambda: gate.is_reached)
            wait_until(server, lambda: len(server.table) == 2)
            abort(second.socket)
            wait_until(server, lambda: len(server.table) == 1)
            assert server.stats()["finished"]["reset"] == 1
            gate.open()


@pytest.mark.parametrize("policy", ["inline", "thread", "pool", "fork"])
def test_a_half_closed_client_gets_its_answer(policy: str, gate: Gate) -> None:
    with served(Waits, policy) as server, Client(server.server_address) as client:
        assert client.ask(f"thread {gate.path}\n".encode()) == b"waits\n"
        client.send(b"answer\n").end()
        wait_until(server, lambda: gate.is_reached)
        gate.open()
        assert client.rest() == b"answer\n"
        wait_until(server, lambda: server.stats()["finished"]["done"] == 1)


# -- a connection that has only ended ---------------------------------------------------------------------------------


class UnixServer(reqtable.UnixStreamServer):
    """Counts its passes."""

    passes = 0

    def service_actions(self) -> None:
        self.passes += 1


class Naps(StateRequestHandler):
    """Sleeps a little, and then reads what its client has sent. Knows how many passes its loop has made meanwhile."""

    seen: ClassVar[list[Any]] = []

    def start(self) -> Transition:
        return self.awake, sleep(SHORT_S)

    @state()
    def awake(self, _: None) -> Transition:
        self.seen.append(LOOPS[threading.get_ident()].times.passes)
        return self.read

    @state(line())
    def read(self, text: bytes) -> Transition:
        self.seen.append(text)
        return None


@pytest.mark.parametrize("policy", ["inline", "thread"])
def test_what_a_unix_client_sent_before_it_closed_is_read_and_no_loop_spins(policy: str, tmp_path: Path) -> None:
    Naps.seen.clear()
    path = str(tmp_path / "socket")
    with serving(UnixServer(path, Naps, dispatch=policy)) as server:
        with Client(path, socket.AF_UNIX) as client:
            client.send(b"the last words\n")
        wait_until(server, lambda: server.stats()["finished"]["done"] == 1)
        assert server.passes < MANY_PASSES
    passes, text = Naps.seen
    assert text == b"the last words\n"
    assert passes < MANY_PASSES


def test_nor_does_it_for_a_tcp_connection_of_which_both_sides_have_ended(gate: Gate) -> None:
    class Ends(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.request.shutdown(socket.SHUT_WR)
            pass_gate(gate.path)

    passes: list[None] = []
    with served(Ends, "thread", service_actions=lambda _: passes.append(None)) as server:
        with Client(server.server_address) as client:
            assert client.rest() == b""
        wait_until(
            server, lambda: gate.is_reached and [entry.transport.transport.watched for entry in server.table] == [0]
        )
        del passes[:]
        later = threading.Event()
        server.engine.post(server.engine.loop.mailbox.call_later, later.set, SHORT_S)
        assert later.wait(WAIT_S)
        assert len(passes) < MANY_PASSES
        gate.open()
        wait_until(server, lambda: not len(server.table))
        assert server.stats()["finished"]["reset"] == 0


def test_a_unix_client_that_leaves_an_answer_unread_has_reset_its_connection(tmp_path: Path, gate: Gate) -> None:
    """As in unix(7): its own end of file would say that it has read everything."""
    path = str(tmp_path / "socket")
    with serving(UnixServer(path, Waits)) as server:
        with Client(path, socket.AF_UNIX) as client:
            client.send(f"sleep {gate.path}\n".encode())
            wait_until(server, lambda: gate.is_reached)
        wait_until(server, lambda: ended_by_reset(server))


# -- TLS, and other selectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "handler"),
    [("inline", Waits), *slow_but([("thread", Waits), ("fork", Waits), ("thread", Blocks), ("fork", Blocks)])],
)
def test_a_reset_below_tls_is_the_same(policy: str, handler: Any, gate: Gate, tmp_path: Path) -> None:
    config = Config(tls=TLSOptions(cert=write_certificate(tmp_path)))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=policy, config=config)) as server:
        plain = socket.create_connection(server.server_address)
        with client_context().wrap_socket(plain, server_hostname="127.0.0.1") as client:
            try:
                client.sendall(f"sleep {gate.path}\n".encode())
                wait_until(server, lambda: gate.is_reached)
                abort(client)
                wait_until(server, lambda: ended_by_reset(server))
            finally:
                gate.open()


def test_another_selector_is_not_asked_for_what_it_does_not_know(gate: Gate) -> None:
    engine = Engine(system=System(selector=selectors.SelectSelector))
    with reqtable.TCPServer(("127.0.0.1", 0), Waits) as server:
        engine.add(server)
        with serving(server), Client(server.server_address) as client:
            assert client.ask(f"thread {gate.path}\n".encode()) == b"waits\n"
            wait_until(server, lambda: [entry.transport.watched for entry in server.table] == [0])
            gate.open()
            assert client.ask(b"answer\n") == b"answer\n"


# -- a request that waits for several things --------------------------------------------------------------------------


class Reaches(StateRequestHandler):
    """Waits for what its client names."""

    seen: ClassVar[list[Any]] = []

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.send(b"waits\n")
        if text == b"told\n":
            return self.done, told()
        if text == b"input\n":
            return self.done, either(line(), sleep(LONG_S))
        return self.done, either(told(), sleep(SHORT_S))

    @state()
    def done(self, item: Any) -> Transition:
        self.seen.append(LOOPS[threading.get_ident()].times.passes)
        return self.last

    @state(line())
    def last(self, text: bytes) -> Transition:
        self.seen.append(text)
        return None


@pytest.mark.parametrize("policy", ["inline", "thread"])
@pytest.mark.parametrize("what", ["told", "either", "input"])
def test_a_reset_ends_a_request_that_waits_for_another(policy: str, what: str) -> None:
    with served(Reaches, policy) as server, Client(server.server_address) as client:
        assert client.ask(f"{what}\n".encode()) == b"waits\n"
        wait_until(server, lambda: [row["letter"] in "TD" for row in server.table.snapshot()] == [True])
        abort(client.socket)
        wait_until(server, lambda: ended_by_reset(server))


@pytest.mark.parametrize("policy", ["inline", "thread"])
def test_a_unix_client_that_has_closed_does_not_make_such_a_wait_spin(policy: str, tmp_path: Path) -> None:
    Reaches.seen.clear()
    path = str(tmp_path / "socket")
    with serving(UnixServer(path, Reaches, dispatch=policy)) as server:
        with Client(path, socket.AF_UNIX) as client:
            assert client.send(b"either\nlast words\n").line() == b"waits\n"
        wait_until(server, lambda: server.stats()["finished"]["done"] == 1)
        assert server.passes < MANY_PASSES
    passes, text = Reaches.seen
    assert text == b"last words\n"
    assert passes < MANY_PASSES
