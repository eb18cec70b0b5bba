"""Thousands of clients, all in the middle of a request, are served on one thread."""

from __future__ import annotations

import contextlib
import random
import resource
import selectors
import socket
import sys
import threading
import tracemalloc
from typing import Any

import pytest

import reqtable
from reqtable import StateRequestHandler, line, state
from tests.benchmarks import trickle
from tests.support import serving, wait_until

CLIENTS = 5000
IDLE = 300  # with those before them, just not enough to have the dict of the table grow to twice its size
ONCE = 40  # that have a server make what it makes once


class Reverse(StateRequestHandler):
    @state(line(limit=64), timeout=120)
    def ask(self, text: bytes) -> Any:
        self.send(text.strip()[::-1] + b"\n")
        return self.ask


@pytest.fixture
def enough_descriptors() -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * CLIENTS + 200
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"{needed} descriptors are needed; this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.usefixtures("enough_descriptors", "unchecked")
def test_5000_clients_in_mid_request_are_all_answered_on_one_thread() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    threads = threading.active_count()
    with serving(reqtable.TableTCPServer(("127.0.0.1", 0), Reverse)) as server:
        clients = []
        for number in range(CLIENTS):
            client = socket.create_connection(server.server_address)
            client.settimeout(20)
            clients.append((client, b"%05d-request" % number))
        wait_until(server, lambda: len(server.table) == CLIENTS)
        # A byte each, round after round, in another order each time.
        for position in range(len(clients[0][1])):
            rng.shuffle(clients)
            for client, request in clients:
                client.send(request[position : position + 1])
        total = CLIENTS * len(clients[0][1])
        wait_until(server, lambda: sum(row["bytes_in"] for row in server.table.snapshot()) == total)
        assert len(server.table) == CLIENTS
        assert {row["state"] for row in server.table.snapshot()} == {"READING"}
        assert threading.active_count() == threads + 1  # the server's own loop
        rng.shuffle(clients)
        with selectors.DefaultSelector() as waiting:
            for client, request in clients:
                client.send(b"\n")
                waiting.register(client, selectors.EVENT_READ, request)
            answered = 0
            while answered < CLIENTS:
                ready = waiting.select(20)
                assert ready, f"{CLIENTS - answered} clients were not answered"
                for key, _ in ready:
                    assert key.fileobj.recv(100) == key.data[::-1] + b"\n"
                    waiting.unregister(key.fileobj)
                    answered += 1
        for client, _ in clients:
            client.close()
        wait_until(server, lambda: len(server.table) == 0)


@pytest.mark.slow
def test_2000_clients_trickle_their_requests_to_an_http_server_with_no_thread_more() -> None:
    """The handler is an unmodified `SimpleHTTPRequestHandler`. `trickle` checks every answer."""
    figures = trickle.measure("TableHTTPServer", 2000, bytes_at_a_time=6, seed=5)
    assert figures.threads == 0
    assert figures.memory_kib < 40, "a suspended stack and its files, not a thread's"


class Echo(StateRequestHandler):
    @state(line())
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_an_idle_connection_takes_little(address: str) -> None:
    """Measures what Python has allocated for connections that are idle after one line and its answer."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(reqtable.TCPServer((address, 0), Echo, bind_and_activate=False))
        server.request_queue_size = IDLE
        server.server_bind()
        server.server_activate()
        clients = [stack.enter_context(socket.socket()) for _ in range(ONCE + IDLE)]
        server.engine.listeners.listen(server)

        def converse(clients: list[socket.socket]) -> None:
            for client in clients:
                client.connect(("127.0.0.1", server.server_address[1]))
                client.send(b"line\n")
            steps = 2 * (len(server.table) + len(clients))  # to its first state, and the line
            while sum(entry.steps for entry in server.table) < steps:
                server.engine.loop.run_once()

        converse(clients[:ONCE])
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        converse(clients[ONCE:])
        after, _ = tracemalloc.get_traced_memory()
        assert (after - before) / IDLE <= 1024 * (0.66 if sys.version_info < (3, 12) else 0.68)
        assert len({id(entry.input) for entry in server.table}) == 1
