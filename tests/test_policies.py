"""Rules for every dispatch policy: how requests end and are cancelled, and that they leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, Limits, Transition, line, nothing, state
from tests.policies import ANY, StateWhere, Where, empty, where
from tests.support import WAIT_S, Client, Started, served, serving, wait_until

# -- cancelling, and deadlines ----------------------------------------------------------------------------------------


class Stuck(reqtable.StreamRequestHandler):
    """Waits for a line that does not arrive, and tells how its wait ended."""

    def handle(self) -> None:
        self.wfile.write(b"%d\n" % os.getpid())
        try:
            self.server.ended.append(self.rfile.readline())  # type: ignore[attr-defined]
        except OSError as error:
            self.server.ended.append(error)  # type: ignore[attr-defined]


class StateStuck(reqtable.StateRequestHandler):
    def start(self) -> Transition:
        self.send(b"%d\n" % os.getpid())
        return self.never

    @state(line())
    def never(self, text: bytes) -> Transition:
        raise AssertionError(text)

    def on_close(self) -> None:
        self.server.ended.append("closed")


@pytest.mark.parametrize("how", ["cancel", "expire"])
@pytest.mark.parametrize("handler", [Stuck, StateStuck])
@pytest.mark.parametrize("dispatch", ["thread", "pool", "fork"])
def test_who_has_the_request_ends_with_it(dispatch: str, handler: Any, how: str) -> None:
    limits = Limits(request_timeout_s=0.3 if how == "expire" else None)
    server = reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=Config(limits=limits))
    server.ended = []  # type: ignore[attr-defined]
    with serving(server):
        client = Client(server.server_address)
        pid = int(client.line())
        if how == "cancel":
            [row] = server.table.snapshot()
            assert server.table.cancel(row["id"])
        with contextlib.suppress(ConnectionResetError):
            assert client.rest() == b""
        client.close()
        empty(server)
        if dispatch == "fork":
            assert pid != os.getpid()
            wait_until(server, lambda: not server.active_children)
        else:
            wait_until(server, lambda: bool(server.ended))
            assert len(server.ended) == 1


class Sleepy(reqtable.StateRequestHandler):
    def start(self) -> Transition:
        self.send(b"asleep\n")
        return self.awake, reqtable.sleep(3600)

    @state()
    def awake(self, _: None) -> None:
        raise AssertionError


@pytest.mark.parametrize("dispatch", ["thread", "fork"])
def test_a_sleep_can_be_cancelled(dispatch: str) -> None:
    with served(Sleepy, dispatch) as server:
        client = Client(server.server_address)
        assert client.line() == b"asleep\n"
        server.table.cancel(server.table.snapshot()[0]["id"])
        assert client.rest() == b""
        client.close()
        empty(server)
        wait_until(server, lambda: server._policies.chosen.busy == 0)


# -- closing the server -----------------------------------------------------------------------------------------------


def test_server_close_waits_for_children_and_for_threads() -> None:
    for dispatch in ("fork", "thread", "pool"):
        server = reqtable.TCPServer(ANY, Where, dispatch=dispatch)
        loop = threading.Thread(target=server.serve_forever)
        loop.start()
        client = Client(server.server_address)
        where(client)
        server.shutdown()
        loop.join(WAIT_S)
        closed = threading.Event()
        closing = threading.Thread(target=lambda s=server, c=closed: (s.server_close(), c.set()))
        closing.start()
        assert where(client)[1], "it is still served"
        assert not closed.is_set()
        client.hang_up()
        assert closed.wait(WAIT_S)
        closing.join(WAIT_S)
        assert len(server.table) == 0


# -- handle_request ---------------------------------------------------------------------------------------------------


class Leaving(reqtable.StreamRequestHandler):
    """Ends in the way that its client asks for."""

    def handle(self) -> None:
        text = self.rfile.readline()
        if text == b"crash\n":
            os._exit(3)
        if text == b"kill\n":
            os.kill(os.getpid(), signal.SIGKILL)
        self.wfile.write(text)


@pytest.mark.parametrize("by", ["handle_request", "_handle_request_noblock"])
@pytest.mark.parametrize("plain_close", [False, True], ids=["shutdown_request", "close_request alone"])
@pytest.mark.parametrize(
    ("base", "text", "answer"),
    [
        (reqtable.ForkingTCPServer, b"crash\n", b""),
        (reqtable.ForkingTCPServer, b"kill\n", b""),
        (reqtable.ForkingTCPServer, b"well\n", b"well\n"),
        (reqtable.ThreadingTCPServer, b"well\n", b"well\n"),
    ],
)
def test_a_client_sees_the_end_though_no_loop_runs(
    by: str, plain_close: bool, base: Any, text: bytes, answer: bytes
) -> None:
    """A program with its own loop calls `handle_request` for each request, and may not call it again for long."""

    class Server(base):  # type: ignore[misc]
        def shutdown_request(self, request: Any) -> None:
            if plain_close:
                self.close_request(request)
            else:
                super().shutdown_request(request)

    with Server(ANY, Leaving) as server, Client(server.server_address) as client:
        assert select.select([server], [], [], WAIT_S)[0] == [server]
        getattr(server, by)()
        assert client.send(text).rest() == answer


@pytest.mark.parametrize("base", [reqtable.ForkingTCPServer, reqtable.ThreadingTCPServer])
def test_a_request_that_handle_request_took_can_be_cancelled(base: Any) -> None:
    with base(ANY, Where) as server, Client(server.server_address) as client, Client(server.server_address) as next_one:
        server.handle_request()
        where(client)
        (entry,) = server.table
        assert server.table.cancel(entry.id)
        server.handle_request()
        assert client.rest() == b""
        next_one.end()


def test_handle_request_returns_when_a_thread_or_a_child_has_the_request() -> None:
    for made in (reqtable.ThreadingTCPServer, reqtable.ForkingTCPServer):
        with made(ANY, Where) as server:
            clients = []
            for _ in range(3):
                clients.append(Client(server.server_address))
                server.handle_request()
            assert len({where(client) for client in clients}) == 3, "all three are served at once"
            for client in clients:
                client.hang_up()
        assert not (server.active_children if made is reqtable.ForkingTCPServer else server._threads)


def test_handle_request_ends_a_connection_that_is_driven() -> None:
    for dispatch in ("thread", "fork"):
        with reqtable.TCPServer(ANY, StateWhere, dispatch=dispatch) as server:
            client = Client(server.server_address).send(b"?\n").end()
            server.handle_request()
            assert len(client.rest().split()) == 2
            client.hang_up()


# -- a group of disconnects -------------------------------------------------------------------------------------------


def disconnects(inner: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("two tasks", [ConnectionResetError("gone"), ExceptionGroup("of one", [inner])])


class GroupStream(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        raise disconnects(self.server.inner)  # type: ignore[attr-defined]


class GroupState(reqtable.StateRequestHandler):
    @state(nothing())
    def only(self, _: None) -> Transition:
        raise disconnects(self.server.inner)


class GroupAsync(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        raise disconnects(self.server.inner)


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", [GroupStream, GroupState, GroupAsync])
@pytest.mark.parametrize(("inner", "ending"), [(BrokenPipeError("gone"), "reset"), (ValueError("ours"), "error")])
def test_a_group_of_disconnects_is_a_disconnect(
    dispatch: str, handler: Any, inner: Exception, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reqtable")
    with served(handler, dispatch, inner=inner) as server:
        with Client(server.server_address) as client:
            assert client.rest() == b""
        empty(server)
        assert {name: count for name, count in server.stats()["finished"].items() if count} == {ending: 1}
    (record,) = [each for each in caplog.records if "two tasks" in caplog.handler.format(each)]
    assert ("\n" in caplog.handler.format(record)) == (ending == "error")


# -- Nagle's algorithm ------------------------------------------------------------------------------------------------


class Nagle(reqtable.StreamRequestHandler):
    """Answers whether the kernel sends a second small segment at once (tcp(7), TCP_NODELAY)."""

    def handle(self) -> None:
        if self.connection.family == socket.AF_INET:
            self.wfile.write(b"%d\n" % self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        else:
            self.wfile.write(b"no TCP\n")


class NagleOfItsOwn(Nagle):
    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        super().setup()


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_no_second_segment_of_a_blocking_handler_waits_for_the_first(dispatch: str, tmp_path: Path) -> None:
    for handler, answer in ((Nagle, b"1\n"), (NagleOfItsOwn, b"0\n")):
        with served(handler, dispatch) as server, Client(server.server_address) as client:
            assert client.line() == answer
    path = str(tmp_path / "sock")
    with serving(reqtable.UnixStreamServer(path, Nagle, dispatch=dispatch)):
        with Client(path, socket.AF_UNIX) as client:
            assert client.line() == b"no TCP\n"


# -- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [pytest.param("fork", marks=pytest.mark.longest), "thread"])
@pytest.mark.usefixtures("unchecked")
def test_thousands_of_requests_leave_nothing(dispatch: str) -> None:
    count = 10_000 if dispatch == "thread" else 3000
    command = [sys.executable, str(Path(__file__).with_name("thousands_server.py")), dispatch, str(count)]
    with Started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        measured = [json.loads(process.stdout.readline())]
        for number in range(count):
            with Client(address) as client:
                assert client.ask(b"%d\n" % number) == b"%d\n" % number
            if number + 1 in (count // 2, count):
                measured.append(json.loads(process.stdout.readline()))
        before, half, after = measured
        active = json.loads(process.stdout.readline())
        assert process.wait(WAIT_S) == 0
    print(f"{count} requests under {dispatch}: {before} before, {half} half-way, {after} at the end")
    assert active == []
    assert (after["descriptors"], after["threads"]) == (before["descriptors"], before["threads"])
    assert after["zombies"] == 0
    assert after["kib"] - half["kib"] < 1024, "memory is level"
