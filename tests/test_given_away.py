"""What becomes of a request that can't be given to a thread or a child after all, or that ends before it is."""

from __future__ import annotations

import errno
import os
import socket
import threading
import weakref
from typing import Any

import pytest

import reqtable
from reqtable import Config, Limits, Transition, hand_off, line, state
from reqtable.config import ThreadOptions
from reqtable.dispatch.policies.thread import RequestThread
from tests.support import WAIT_S, Client, serving, wait_until

ANY = ("127.0.0.1", 0)
ONE = Config(thread=ThreadOptions(threads_max=1))


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of the next threads can't be started: the number in the list."""
    left = [0]
    start = RequestThread.start

    def scarcely(self: RequestThread) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(RequestThread, "start", scarcely)
    return left


class Worker(reqtable.StateRequestHandler):
    """Hands itself off; if that fails it says so, and echoes."""

    released: threading.Event

    @state(line())
    def first(self, text: bytes) -> Any:
        return self.work, hand_off("thread")

    @state(line())
    def work(self, text: bytes) -> Transition:
        self.server.begun.set()
        self.server.released.wait(WAIT_S)
        return None

    @state(line())
    def echo(self, text: bytes) -> Transition:
        self.send(b"got " + text)
        return self.echo

    def on_error(self, error: Exception) -> Transition:
        self.send(b"error %b\n" % type(error).__name__.encode())
        return None if self.server.ends else self.echo


class Server(reqtable.TCPServer):
    ends = False

    def __init__(self, *args: Any, **options: Any) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        super().__init__(*args, **options)


@pytest.mark.parametrize("fails", [1, 2])
def test_no_input_is_lost_when_a_hand_off_fails_after_all(scarce: list[int], fails: int) -> None:
    with serving(Server(ANY, Worker, config=ONE)) as server, Client(server.server_address) as busy:
        busy.send(b"a\nb\n")
        assert server.begun.wait(WAIT_S)
        with Client(server.server_address) as waiting:
            waiting.send(b"go\none\ntwo\n")
            wait_until(server, lambda: any(row["waits_for"] == "vacancy()" for row in server.table.snapshot()))
            scarce[0] = fails
            server.released.set()
            assert waiting.end().rest() == b"error RuntimeError\ngot one\ngot two\n"


def test_a_hand_off_that_fails_counts_as_an_error_however_politely_it_ends(scarce: list[int]) -> None:
    class Polite(Server):
        ends = True

    with serving(Polite(ANY, Worker, dispatch="thread")) as server:
        scarce[0] = 1
        with Client(server.server_address) as client:
            assert client.send(b"go\n").rest() == b"error RuntimeError\n"
        wait_until(server, lambda: not len(server.table))
        assert server.stats()["finished"]["error"] == 1


class Datagrams(reqtable.StateRequestHandler):
    @state(reqtable.datagram())
    def echo(self, data: bytes) -> Transition:
        self.send(b"got " + data)
        return self.echo

    def on_error(self, error: Exception) -> Transition:
        self.send(b"error %b" % type(error).__name__.encode())
        return self.echo


def test_later_datagrams_come_to_a_session_that_could_not_be_given_away(scarce: list[int]) -> None:
    scarce[0] = 1
    with (
        serving(reqtable.UDPServer(ANY, Datagrams, dispatch="thread")) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(WAIT_S)
        client.connect(server.server_address)
        client.send(b"one")
        assert [client.recv(99), client.recv(99)] == [b"error RuntimeError", b"got one"]
        client.send(b"two")
        assert client.recv(99) == b"got two"


def test_a_hook_that_fails_after_the_fork_does_not_cut_off_the_childs_answer() -> None:
    parent = os.getpid()
    failed: list[bool] = []

    class Slow(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            assert self.request.recv(1) == b"?"
            self.request.sendall(b"answer")

    class Fragile(reqtable.TCPServer):
        def close_request(self, request: Any) -> None:
            if os.getpid() == parent and not failed:
                failed.append(True)
                raise OSError("close_request failed")
            super().close_request(request)

    with Fragile(ANY, Slow, dispatch="fork") as server, Client(server.server_address) as client:
        request, address = server.get_request()
        server.process_request(request, address)
        assert failed
        assert client.send(b"?").receive(6) == b"answer"
        request.close()


def test_a_request_that_ends_while_it_waits_for_a_thread_holds_no_socket() -> None:
    taken: list[socket.socket] = []

    class Waits(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            self.server.released.wait(WAIT_S)

    class Unclosed(Server):
        def get_request(self) -> Any:
            request, address = super().get_request()
            taken.append(request)
            return request, address

        def shutdown_request(self, request: Any) -> None:
            """Leaves it to the last reference."""

        def close_request(self, request: Any) -> None:
            """Leaves it to the last reference."""

    server = Unclosed(ANY, Waits, dispatch="thread", config=ONE)
    with serving(server), Client(server.server_address), Client(server.server_address) as second:
        wait_until(server, lambda: len(server.table) == 2)
        server.table.cancel(2)
        wait_until(server, lambda: len(server.table) == 1)
        connection = taken.pop()
        request = weakref.ref(connection)
        connection.close()
        del connection
        assert request() is None
        assert second.rest() == b""
        server.released.set()
        wait_until(server, lambda: not len(server.table))
    taken.pop().close()


def test_a_request_that_is_cancelled_before_it_is_forked_is_closed_all_the_same() -> None:
    closed: list[int] = []

    class Closes(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Transition:
            return self.command

        def on_close(self) -> None:
            closed.append(self.entry.id)

    class Fickle(reqtable.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            super().process_request(request, client_address)
            self.table.cancel(self.engine.table.last_id)

    with serving(Fickle(ANY, Closes, dispatch="fork")) as server, Client(server.server_address) as client:
        assert client.rest() == b""
        wait_until(server, lambda: closed == [1])


# -- around it --------------------------------------------------------------------------------------------------------


class Echo(reqtable.StateRequestHandler):
    @state(line())
    def echo(self, text: bytes) -> Transition:
        self.send(text)
        return self.echo


def test_one_newcomer_ends_one_request_at_most() -> None:
    limits = Limits(entries_max=4, entries_per_peer_max=2, when_full="evict")
    with serving(reqtable.TCPServer(ANY, Echo, config=Config(limits=limits))) as server:
        clients = []

        def come(host: str) -> None:
            client = socket.create_connection(server.server_address, WAIT_S, source_address=(host, 0))
            clients.append(client)
            client.sendall(b"x\n")
            assert client.recv(9) == b"x\n"

        try:
            for host in ("127.0.0.2", "127.0.0.3", "127.0.0.9", "127.0.0.9", "127.0.0.9"):
                come(host)
            hosts = sorted(row["peer"].partition(":")[0] for row in server.table.snapshot())
            assert hosts == ["127.0.0.2", "127.0.0.3", "127.0.0.9", "127.0.0.9"]
            assert server.stats()["refused"] == {"evicted": 1}
        finally:
            for client in clients:
                client.close()


def test_a_refused_second_loop_leaves_the_first_ones_shutdown_waiting() -> None:
    engine = reqtable.Engine()
    with reqtable.TCPServer(ANY, Echo) as server:
        engine.add(server)
        begun = threading.Event()
        engine.post(begun.set)
        thread = threading.Thread(target=engine.serve_forever)
        thread.start()
        assert begun.wait(WAIT_S)
        with pytest.raises(reqtable.ReqtableError, match="running already"):
            engine.serve_forever()
        engine.shutdown()
        assert not engine.steps.running
        thread.join(WAIT_S)


def test_an_engine_ends_a_servers_own_loop_and_waits_for_it() -> None:
    with reqtable.TCPServer(ANY, Echo) as server:
        begun = threading.Event()
        server.engine.post(begun.set)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert begun.wait(WAIT_S)
        server.engine.shutdown()
        assert not server.engine.steps.running
        thread.join(WAIT_S)


def test_a_server_may_be_hosted_before_its_constructor_has_run() -> None:
    class Early(reqtable.TCPServer):
        def __init__(self, engine: reqtable.Engine, *args: Any) -> None:
            engine.add(self)
            super().__init__(*args)

    engine = reqtable.Engine()
    with Early(engine, ANY, Echo) as server:
        assert server.engine is engine
        assert server._policies.steps is engine.steps


def test_a_listener_that_pauses_again_and_again_has_one_timer() -> None:
    class Exhausted(reqtable.TCPServer):
        broken = False

        def get_request(self) -> Any:
            if self.broken:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().get_request()

    with Exhausted(ANY, Echo) as server:
        engine = server.engine
        engine.listeners.listen(server)
        clients = [Client(server.server_address) for _ in range(9)]
        engine.loop.run_once(0)
        server.broken = True
        with Client(server.server_address):
            for client in clients:
                engine.loop.run_once(0)
                client.reset()
                engine.loop.run_once(1)
            assert len(engine.loop.mailbox.timers) == 1
        engine.listeners.unlisten(server)
