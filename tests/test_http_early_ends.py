"""Requests of HTTP that end early, by a deadline or by `cancel`: their clients get 503, or 504, under every policy."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time

import pytest

import reqtable
from reqtable import connect, line, sleep, state
from reqtable.config import Config, ForkOptions, GreenletOptions, PoolOptions, ThreadOptions, TLSOptions
from reqtable.dispatch.policies.fork import Fork
from reqtable.http import HTTPRequestHandler, wsgi_handler
from reqtable.table.engine_wants import VACANCY
from reqtable.table.limits import Limits
from tests.certificates import TLSClient, write_certificate
from tests.support import WAIT_S, Client, serving, wait_until
from tests.test_gone import abort

HOST = b"Host: x\r\n"
GET = b"GET / HTTP/1.1\r\n%s\r\n" % HOST
POLICIES = ["inline", "greenlet", "pool", "thread", "fork"]
ELSEWHERE = ["pool", "thread", "fork"]  # a step that blocks does not hold up the loop
LONG_S = 30


class Sleeps(HTTPRequestHandler):
    def do_GET(self):
        enter(self.server)
        return self.wakes, sleep(LONG_S)

    @state()
    def wakes(self, _):
        return self.answer(200, "late")


class Blocks(HTTPRequestHandler):
    """Blocks its thread until the server's gate opens; in a child, for a long time."""

    def do_GET(self):
        wait_in(self.server)
        return self.answer(200, "late")


class BlocksHalfway(HTTPRequestHandler):
    def do_GET(self):
        self.begin_answer(200)
        self.write(b"part")
        return self.goes_on, reqtable.flushed()

    @state()
    def goes_on(self, _):
        wait_in(self.server)
        return self.end_answer()


class WaitsForAnother(HTTPRequestHandler):
    def do_GET(self):
        return self.connected, connect(self.server.upstream)

    @state()
    def connected(self, upstream):
        return self.told, upstream.line()

    @state(line())
    def told(self, _):
        return self.answer(200, "late")


def enter(server):
    """Let the test know that the request has come so far, also from a child."""
    os.write(server.entered, b"x")


def wait_in(server):
    enter(server)
    if server.dispatch in ("fork", "greenlet"):
        time.sleep(LONG_S)
    else:
        server.gate.wait(LONG_S)


def blocks(environ, start_response):
    wait_in(environ["test.server"])
    start_response("200 OK", [])
    return [b"late"]


def application_of(made):
    def application(environ, start_response):
        environ["test.server"] = made[0]
        return blocks(environ, start_response)

    return wsgi_handler(application)


class Served:
    """Serves a handler during the block. `gate` lets blocked steps go on."""

    def __init__(self, handler, dispatch, request_timeout_s=None, **options):
        made = []
        limits = Limits(request_timeout_s=request_timeout_s)
        options |= {"pool": PoolOptions(size=2), "greenlet": GreenletOptions(suspend_all_sockets=True)}
        config = Config(limits=limits, **options)
        handler = application_of(made) if handler is blocks else handler
        self.server = reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)
        made.append(self.server)
        self.server.dispatch = dispatch
        self.server.gate = threading.Event()
        self._entered, self.server.entered = os.pipe()
        self.server.await_entry = lambda: os.read(self._entered, 1)
        self._serving = serving(self.server)

    def __enter__(self):
        self._serving.__enter__()
        return self.server

    def __exit__(self, *error):
        self.server.gate.set()
        wait_until(self.server, lambda: not len(self.server.table))
        self._serving.__exit__(*error)
        os.close(self._entered)
        os.close(self.server.entered)


def is_answered(answer, status):
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"Connection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1, answer


CASES = [
    *((Sleeps, dispatch) for dispatch in POLICIES),
    *((Blocks, dispatch) for dispatch in ELSEWHERE),
    *((blocks, dispatch) for dispatch in ["greenlet", *ELSEWHERE]),
]


@pytest.mark.parametrize(("handler", "dispatch"), CASES)
def test_a_deadline_is_answered_with_503(handler, dispatch, caplog):
    caplog.set_level(logging.INFO)
    with Served(handler, dispatch, 0.2) as server, Client(server.server_address) as client:
        client.send(GET)
        is_answered(client.rest(), 503)
    assert server.stats()["finished"]["timeout"] == 1


@pytest.mark.parametrize(("handler", "dispatch"), CASES)
def test_cancel_is_answered_with_503(handler, dispatch):
    with Served(handler, dispatch) as server, Client(server.server_address) as client:
        client.send(GET)
        server.await_entry()
        (entry,) = server.table
        assert server.table.cancel(entry.id)
        is_answered(client.rest(), 503)
    assert server.stats()["finished"]["cancelled"] == 1


@pytest.mark.parametrize("dispatch", POLICIES)
@pytest.mark.parametrize("ends", ["cancel", "deadline"])
def test_a_request_that_waits_for_another_service_is_answered_with_504(dispatch, ends):
    timeout_s = 0.2 if ends == "deadline" else None
    with Upstream() as upstream, Served(WaitsForAnother, dispatch, timeout_s) as server:
        server.upstream = upstream.address
        with Client(server.server_address) as client:
            client.send(GET)
            with upstream.accept():
                if ends == "cancel":
                    (entry,) = server.table
                    assert server.table.cancel(entry.id)
                is_answered(client.rest(), 504)


class SaysNothingAfter(Sleeps):
    def on_close(self):
        time.sleep(LONG_S)


def test_a_child_that_has_answered_is_not_answered_for():
    """The child has had its last words at the deadline. It is killed in its `on_close`."""
    with Served(SaysNothingAfter, "fork", 0.2) as server, Client(server.server_address) as client:
        client.send(GET)
        is_answered(client.rest(), 503)


def test_a_killed_child_may_take_its_time_to_exit(monkeypatch):
    kill = Fork.kill
    monkeypatch.setattr(Fork, "kill", lambda fork, pid: threading.Timer(0.5, kill, (fork, pid)).start())
    with Served(Blocks, "fork") as server, Client(server.server_address) as client:
        client.send(GET)
        server.await_entry()
        (entry,) = server.table
        assert server.table.cancel(entry.id)
        is_answered(client.rest(), 503)


@pytest.mark.parametrize("dispatch", ELSEWHERE)
@pytest.mark.parametrize("ends", ["cancel", "deadline"])
def test_no_answer_follows_part_of_another(dispatch, ends, caplog):
    caplog.set_level(logging.INFO)
    timeout_s = 0.2 if ends == "deadline" else None
    with Served(BlocksHalfway, dispatch, timeout_s) as server, Client(server.server_address) as client:
        client.send(GET)
        server.await_entry()
        if ends == "cancel":
            (entry,) = server.table
            assert server.table.cancel(entry.id)
        answer = rest(client)
        assert answer.endswith(b"\r\n\r\n4\r\npart\r\n")
        server.gate.set()
    assert ("was not done within 0.2 s: closed" in caplog.text) is (ends == "deadline")


def rest(client):
    """Return what comes, up to the end of the connection: it may be a reset, because the answer is not complete."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while more := client.socket.recv(262_144):
            data += more
    return bytes(data)


@pytest.mark.parametrize("dispatch", ["thread", "fork"])
def test_a_deadline_runs_for_each_request_of_a_connection(dispatch):
    """A connection that a thread or a child has may be older than `request_timeout_s`."""

    class Answers(Blocks):
        def do_POST(self):
            return self.answer(200, "soon")

    with Served(Answers, dispatch, 0.3) as server, Client(server.server_address) as client:
        until = time.monotonic() + 0.7
        count = 0
        while time.monotonic() < until:
            client.send(b"POST / HTTP/1.1\r\n%sContent-Length: 0\r\n\r\n" % HOST)
            while not client.line().startswith(b"\r\n"):
                pass
            assert client.receive(4) == b"soon"
            count += 1
        assert count > 1
        client.send(GET)
        is_answered(client.rest(), 503)


@pytest.mark.parametrize("dispatch", ["thread", "fork"])
def test_a_request_that_waits_for_a_thread_or_a_child_is_answered_with_503(dispatch):
    few = {"thread": ThreadOptions(threads_max=1), "fork": ForkOptions(max_children=1)}
    with (
        Served(blocks, dispatch, **{dispatch: few[dispatch]}) as server,
        Client(server.server_address) as first,
        Client(server.server_address) as second,
    ):
        first.send(GET)
        server.await_entry()
        second.send(GET)
        wait_until(server, lambda: any(entry.want == VACANCY for entry in server.table))
        for client, entry in zip((second, first), reversed([*server.table]), strict=True):
            assert server.table.cancel(entry.id)
            is_answered(client.rest(), 503)


def test_an_application_learns_that_its_answer_is_not_wanted():
    seen = []

    def application(environ, start_response):
        asked.set()
        assert gate.wait(WAIT_S)
        seen.append(environ["reqtable.disconnected"]())
        start_response("200 OK", [])
        return [b"late"]

    gate, asked = threading.Event(), threading.Event()
    for dispatch in ("pool", "thread"):
        asked.clear()
        gate.clear()
        with Served(wsgi_handler(application), dispatch) as server, Client(server.server_address) as client:
            client.send(GET)
            assert asked.wait(WAIT_S)
            (entry,) = server.table
            assert server.table.cancel(entry.id)
            is_answered(client.rest(), 503)
            gate.set()
    assert seen == [True, True]


def test_a_request_can_cancel_itself():
    class Ends(HTTPRequestHandler):
        def do_GET(self):
            self.server.table.cancel(self.entry.id)
            return self.answer(200, "never sent")

    with Served(Ends, "inline") as server, Client(server.server_address) as client:
        client.send(GET)
        assert rest(client) == b""


@pytest.mark.parametrize("handler", [Sleeps, Blocks, blocks])
@pytest.mark.parametrize("dispatch", ["pool", "thread", "fork"])
def test_over_tls(handler, dispatch, tmp_path):
    """A child that blocks is killed, and only the child could encrypt an answer."""
    tls = TLSOptions(cert=write_certificate(tmp_path))
    with Served(handler, dispatch, tls=tls) as server, TLSClient(server.server_address) as client:
        client.send(GET)
        server.await_entry()
        (entry,) = server.table
        assert server.table.cancel(entry.id)
        answer = client.rest()
        assert answer == b"" if dispatch == "fork" else answer.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize("dispatch", POLICIES)
def test_an_application_is_told_that_its_client_has_ended_its_side(dispatch):
    """The request goes on: the client may still read."""

    def application(environ, start_response):
        enter(made[0])
        while not environ["reqtable.disconnected"]():
            time.sleep(0.001)
        start_response("200 OK", [])
        return [b"told"]

    made = []
    with Served(wsgi_handler(application), dispatch) as server, Client(server.server_address) as client:
        made.append(server)
        client.send(GET)
        server.await_entry()
        client.end()
        assert client.rest().endswith(b"\r\n\r\ntold")


@pytest.mark.parametrize("dispatch", ["greenlet", "fork"])
def test_a_reset_ends_an_application_that_can_be_ended(dispatch):
    with Served(blocks, dispatch) as server:
        with Client(server.server_address) as client:
            client.send(GET)
            server.await_entry()
            abort(client.socket)
        wait_until(server, lambda: not len(server.table) and not getattr(server, "active_children", None))
    assert server.stats()["finished"]["reset"] == 1


class Upstream:
    """Accepts connections, and never answers."""

    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_S)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        return self

    def __exit__(self, *error):
        self._listener.close()

    def accept(self):
        return self._listener.accept()[0]
