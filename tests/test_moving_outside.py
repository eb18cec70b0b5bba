"""`save` and `restore` called outside the loop: from another thread, or while no loop runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest

from reqtable import (
    NotMovable,
    ReqtableError,
    StateRequestHandler,
    TCPServer,
    Transition,
    UDPServer,
    datagram,
    line,
    state,
)
from tests.support import WAIT_S, Client, served, serving, wait_until


class Counts(StateRequestHandler):
    reached: ClassVar[threading.Event]
    released: ClassVar[threading.Event]

    count: int = 0
    thread: int = 0

    @state(line())
    def ask(self, text: bytes) -> Transition:
        self.count += 1
        self.thread = threading.get_ident()
        if text == b"hold\n":
            Counts.reached.set()
            assert Counts.released.wait(WAIT_S)
        self.send(b"%d\n" % self.count)
        return self.ask


class Waits(StateRequestHandler):
    @state(line(), timeout=30)
    def ask(self, text: bytes) -> Transition:
        self.send(b"\n")
        return self.ask


def held(server: Any, client: Client, call: Callable[[], Any]) -> Any:
    """Call a function in another thread while a step holds the loop up. Return its result."""
    Counts.reached, Counts.released = threading.Event(), threading.Event()
    client.send(b"hold\n")
    assert Counts.reached.wait(WAIT_S)
    with ThreadPoolExecutor(1) as threads:
        called = threads.submit(call)
        try:
            until = time.monotonic() + WAIT_S
            while not called.done() and not server.engine.loop.mailbox.posts and time.monotonic() < until:
                time.sleep(0)  # lets the other thread run
        finally:
            Counts.released.set()
        return called.result(WAIT_S)


def test_requests_are_saved_when_their_step_has_ended() -> None:
    with served(Counts) as first, Client(first.server_address) as client:
        [_] = held(first, client, first.table.save)
        assert client.line() == b"1\n"


def test_why_a_request_can_not_be_saved_is_told() -> None:
    with served(Counts) as first, Client(first.server_address) as client:
        with pytest.raises(NotMovable, match=r"^there is no request 99$"):
            held(first, client, lambda: first.table.save([99]))
        with pytest.raises(ReqtableError, match="need 1 sockets and files, but 0 are given"):
            first.table.restore(first.table.save(), [])


def test_a_restored_request_goes_on_in_the_thread_of_the_loop() -> None:
    with served(Counts) as first, served(Counts) as second, Client(first.server_address) as client:
        assert client.send(b"a\n").line() == b"1\n"
        records = first.table.save()
        [entry] = first.table
        theirs = entry.transport.request.dup()
        first.table.cancel(entry.id)
        wait_until(first, lambda: not len(first.table))
        client.send(b"b\n")
        [id] = second.table.restore(records, [theirs])
        assert client.line() == b"2\n"
        restored = second.table.get(id)
        assert restored is not None
        assert restored.handler.thread == second.table.thread


def test_a_caller_goes_on_by_itself_if_the_loop_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with TCPServer(("127.0.0.1", 0), Counts) as server:
        server.table.thread = threading.get_ident() + 1  # as if another thread ran the loop

        def end_loop(*_: Any) -> None:
            server.table.thread = None

        monkeypatch.setattr(server.engine.steps, "post", end_loop)
        assert server.table.save() == []


def test_a_table_whose_loop_has_not_run_for_long_knows_the_time() -> None:
    with TCPServer(("127.0.0.1", 0), Waits) as first, TCPServer(("127.0.0.1", 0), Waits) as second:
        with serving(first), Client(first.server_address) as client:
            assert client.ask(b"a\n") == b"\n"
            first.shutdown()
            second.table.now -= 100
            records = first.table.save()
            [entry] = first.table
            [id] = second.table.restore(records, [entry.transport.request.dup()])
            restored = second.table.get(id)
            assert restored is not None
            assert restored.deadline is not None
            assert 0 < restored.deadline - time.monotonic() <= 30
            assert abs(restored.active_at - time.monotonic()) < 30


class Numbers(StateRequestHandler):
    count: int = 0

    @state(datagram(), timeout=30)
    def ask(self, _: bytes) -> Transition:
        self.count += 1
        self.send(b"%d" % self.count)
        return self.ask


def test_sessions_of_datagrams_need_no_sockets() -> None:
    with (
        serving(UDPServer(("127.0.0.1", 0), Numbers)) as first,
        serving(UDPServer(("127.0.0.1", 0), Numbers)) as second,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(WAIT_S)
        for server, answer in [(first, b"1"), (second, b"2")]:
            client.sendto(b"x", server.server_address)
            assert client.recv(9) == answer
            if server is first:
                assert second.table.restore(first.table.save()) == [1]
