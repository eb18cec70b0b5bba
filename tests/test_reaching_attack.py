"""Attacks on outgoing connections: failures, ends and cancellations at moments that are easily forgotten."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from typing import Any

import pytest

import reqtable
from reqtable import (
    AsyncRequestHandler,
    ConnectFailed,
    HandlerError,
    StateRequestHandler,
    System,
    call,
    connect,
    either,
    hand_off,
    line,
    sleep,
    start_tls,
    state,
    told,
)
from reqtable.net import attempts
from tests.certificates import server_context, write_certificate
from tests.support import WAIT_S, Client, served, wait_until
from tests.test_reaching import Upstream, echo, serving_with

# -- waits that are over ----------------------------------------------------------------------------------------------


def test_a_request_that_is_done_does_not_wake_for_a_sleep_that_is_over():
    class Sends(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(bytes(8_000_000))
            await self.read(either(line(), sleep(0.01)))

    go_on = threading.Event()

    def late(own: socket.socket) -> None:
        go_on.wait(WAIT_S)
        while own.recv(1_000_000):
            pass

    with Upstream(late) as upstream:
        target = upstream.target
        with served(Sends) as server, Client(server.server_address) as client:
            wait_until(server, lambda: any("ended" in repr(each.want) for each in server.table))
            [entry] = server.table
            assert entry.deadline is None
            go_on.set()
            assert client.rest() == b""


def test_a_tls_handshake_that_cant_begin_leaves_the_client_alone():
    class Encrypts(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(start_tls(cert="/nonexistent.pem"))
            except Exception as error:
                self.send(b"%s\n" % type(error).__name__.encode())
            for _ in range(2):
                _, item = await self.read(either(line(), told()))
                self.send(item)

    with served(Encrypts) as server, Client(server.server_address) as client:
        assert client.line() == b"ConfigurationError\n"
        client.send(b"1\n2\n")
        assert client.receive(4) == b"1\n2\n"
        assert client.rest() == b""


@pytest.mark.parametrize("how", ["cancel", "reset"])
def test_a_connection_that_ends_during_its_handshake_tells_the_request(how):
    class Encrypts(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(await self.read(line()))
            try:
                await self.read(upstream.start_tls(verify=False))
            except OSError as error:
                self.send(type(error).__name__.encode())

    def talk(own: socket.socket) -> None:
        own.recv(1)
        if how == "reset":
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            own.close()
        else:
            own.recv(1)

    with Upstream(talk) as upstream:
        target = upstream.target
        with served(Encrypts) as server, Client(server.server_address) as client:
            client.send(b"x\n" if how == "cancel" else b"x" * 60000 + b"\n")
            if how == "cancel":
                wait_until(server, lambda: any("start_tls" in repr(each.want) for each in server.table))
                [number] = server.table.connections
                server.table.cancel(number)
            said = client.rest()
            assert said in (
                [b"ConnectionAbortedError"] if how == "cancel" else [b"ConnectionResetError", b"ConnectFailed"]
            )


def test_a_reset_before_the_handshake_is_told_as_such():
    """The output that has to leave before the handshake meets the reset."""

    class Encrypts(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(bytes(16_000_000))
            try:
                await self.read(upstream.start_tls(verify=False))
            except OSError as error:
                self.send(type(error).__name__.encode())

    def talk(own: socket.socket) -> None:
        own.recv(1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        own.close()

    with Upstream(talk) as upstream:
        target = upstream.target
        with served(Encrypts) as server, Client(server.server_address) as client:
            assert client.rest() == b"ConnectionResetError"


def test_a_call_that_loses_to_input_is_given_up():
    begun, go_on = threading.Event(), threading.Event()
    ran: list[int] = []

    def block() -> None:
        begun.set()
        go_on.wait(WAIT_S)

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(either(line(), call(block)))
            self.send(b"first\n")
            await self.read(either(line(), call(ran.append, 1)))
            self.send(b"second\n")
            await self.read(line())
            await self.call(ran.append, 2)

    with serving_with(Asks, calls_max=1) as server, Client(server.server_address) as client:
        assert begun.wait(WAIT_S)
        assert client.ask(b"x\n") == b"first\n"
        wait_until(server, lambda: any("append" in repr(each.want) for each in server.table))
        assert client.ask(b"x\n") == b"second\n"
        go_on.set()
        client.send(b"x\n")
        assert client.rest() == b""
        assert ran == [2]


def test_a_handshake_that_loses_to_input_is_given_up():
    class Encrypts(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(b"x")
            self.send(b"ready\n")
            await self.read(either(line(), upstream.start_tls(verify=False)))
            try:
                await self.read(upstream.line())
            except OSError as error:
                self.send(type(error).__name__.encode())

    with Upstream(silent_for_ever) as upstream:
        target = upstream.target
        with served(Encrypts) as server, Client(server.server_address) as client:
            client.line()
            wait_until(server, lambda: any("start_tls" in repr(each.want) for each in server.table))
            client.send(b"x\n")
            assert client.rest() == b"ConnectFailed"


def silent_for_ever(own: socket.socket) -> None:
    while own.recv(1000):
        pass


# -- TLS --------------------------------------------------------------------------------------------------------------


def tls(talk: Any) -> Any:
    def secured(own: socket.socket) -> None:
        with server_context().wrap_socket(own.dup(), server_side=True) as other:
            talk(other, own)

    return secured


@pytest.mark.parametrize("want", ["chunk", "line"])
def test_a_tls_upstream_that_ends_without_close_notify(want, tmp_path):
    def cut(other: ssl.SSLSocket, own: socket.socket) -> None:
        other.recv(1)
        own.shutdown(socket.SHUT_RDWR)

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target, ca=ca))
            upstream.send(b"x")
            self.send(b"got %r" % await self.read(getattr(upstream, want)()))

    write_certificate(tmp_path)
    ca = str(tmp_path / "ca.pem")
    with Upstream(tls(cut)) as upstream:
        target = upstream.target.replace("tcp", "tls")
        with served(Asks) as server, Client(server.server_address) as client:
            assert client.rest() == b"got b''"


# -- names and addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "tcp://127.0.0.1%1:9",
        "tcp://[fe80::1%99999999999999999999]:9",
        "tcp://[fe80::1%\N{SUPERSCRIPT TWO}]:9",
        "tcp://[fe80::1%nonsense]:9",
        "tcp://" + 300 * "a" + ":9",
        "tcp://a..b:9",
        "tcp://\udcff:9",
        "udp://[fe80::1%99999999999999999999]:9",
        "tls://127.0.0.1%1:9",
        "tcp://0x7f.1:9",
        "unix:///nonexistent/\udcff",
        "unix://@" + "\N{EURO SIGN}" * 30,
    ],
)
def test_a_strange_address_fails_as_a_connect(target):
    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(connect(target))
            except ConnectFailed as error:
                self.send(b"%d" % str(error).startswith(f"can't connect to {target}"))

    with served(Asks) as server, Client(server.server_address) as client:
        assert client.rest() == b"1"


@pytest.mark.parametrize(
    "options",
    [
        {"alpn": (b"h2",)},
        {"alpn": "h2"},
        {"alpn": ("\N{EURO SIGN}",)},
        {"alpn": ("",)},
        {"alpn": ("x" * 256,)},
        {"context": "x"},
        {"server_name": "a\0b"},
        {"server_name": "." + "a" * 300},
        {"server_name": ".a"},
        {"ca": "/\0"},
        {"ca": "/"},
        {"cert": "/\0"},
    ],
)
def test_strange_options_of_tls_end_neither_the_server_nor_the_wait(options):
    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(connect(target, **options), timeout=5)
            except reqtable.TimedOut:
                self.send(b"timed out")
            except Exception as error:
                self.send(f"{type(error).__name__} {error}".encode())

    with Upstream(silent_for_ever) as upstream:
        target = upstream.target.replace("tcp", "tls")
        with served(Asks) as server, Client(server.server_address) as client:
            said = client.rest()
            assert not said.startswith(b"timed out"), said
            assert said


def test_no_thread_for_names():
    class Exhausted:
        def __init__(self, *args: Any) -> None:
            pass

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("can't start new thread")

        def shutdown(self, *args: Any, **kwargs: Any) -> None:
            pass

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(connect("tcp://localhost:9"))
            except ConnectFailed as error:
                self.send(str(error).encode())

    with serving_with(Asks, System(executor=Exhausted)) as server, Client(server.server_address) as client:
        assert client.rest() == b"can't connect to tcp://localhost:9: can't start new thread"


@pytest.mark.parametrize(
    "found",
    [
        [],
        [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))] * 3,
        [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))],
        [(99, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 9))],
        [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 99999))],
        [(socket.AF_INET, socket.SOCK_STREAM, 6, "", None)],
    ],
)
def test_what_a_resolver_may_find(found):
    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(connect("tcp://up.example:9"), timeout=5)
            except ConnectFailed:
                self.send(b"failed")

    system = System(getaddrinfo=lambda *_, **__: found)
    with serving_with(Asks, system) as server, Client(server.server_address) as client:
        assert client.rest() == b"failed"


def test_two_attempts_that_end_in_one_pass(caplog, monkeypatch):
    """The first one to be ready wins and closes the other, which the same poll has found ready too."""
    monkeypatch.setattr(attempts, "_NEXT_S", 0.001)

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(connect("tcp://up.example:9"))
            await self.send(b"open")

    with Upstream(silent_for_ever) as one, Upstream(silent_for_ever) as two:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each.address) for each in (one, two)]
        with serving_with(Asks, System(getaddrinfo=lambda *_, **__: found)) as server:
            real = attempts._Attempt.on_ready
            held: dict[Any, int] = {}

            def on_ready(self: Any, mask: int) -> None:
                held[self] = mask
                if len(held) == 2:
                    for each in held:
                        real(each, mask)

            monkeypatch.setattr(attempts._Attempt, "on_ready", on_ready)
            with Client(server.server_address) as client:
                assert client.rest() == b"open"
    assert not caplog.records


# -- a step in another thread -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
def test_what_a_step_does_with_a_connection_happens_in_order(dispatch, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"file ")

    class Sends(StateRequestHandler):
        upstream: Any

        def start(self) -> Any:
            return self.connected, connect(target)

        @state()
        def connected(self, upstream: Any) -> Any:
            self.upstream = upstream
            upstream.send(b"one ")
            upstream.send_file(file)
            upstream.send(b"two ")
            upstream.end_output()
            return self.answered, upstream.rest(1000)

        @state()
        def answered(self, data: bytes) -> None:
            self.send(data)

    with path.open("rb") as file, Upstream(echo) as upstream:
        target = upstream.target
        with served(Sends, dispatch) as server, Client(server.server_address) as client:
            assert client.rest() == b"one file two "


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
def test_a_connection_is_released_and_used_again_in_every_thread(dispatch):
    class Releases(StateRequestHandler):
        upstream: Any

        def start(self) -> Any:
            return self.connected, connect(target)

        @state()
        def connected(self, upstream: Any) -> Any:
            self.upstream = upstream
            upstream.send(b"x")
            return self.answered, upstream.chunk()

        @state()
        def answered(self, data: bytes) -> Any:
            self.upstream.release()
            self.send(data)
            return self.again, connect(target, reuse=True)

        @state()
        def again(self, upstream: Any) -> Any:
            self.upstream = upstream
            upstream.send(b"y")
            return self.ended, upstream.chunk()

        @state()
        def ended(self, data: bytes) -> Any:
            self.send(data)
            self.upstream.close()
            try:
                self.upstream.send(b"z")
            except HandlerError:
                self.send(b" closed")

    with Upstream(echo) as upstream:
        target = upstream.target
        with served(Releases, dispatch) as server:
            for _ in range(5):
                with Client(server.server_address) as client:
                    assert client.rest() == b"xy closed"
            assert server.table.connection_counts["reused"] == (5 if dispatch != "thread" else 0)
        if dispatch != "thread":
            assert len(upstream.connections) == 5


def test_a_pool_step_is_bounded_in_what_it_sends_to_a_connection():
    class Floods(StateRequestHandler):
        def start(self) -> Any:
            return self.connected, connect(target)

        @state()
        def connected(self, upstream: Any) -> Any:
            try:
                for _ in range(1000):
                    upstream.send(bytes(100_000))
            except reqtable.LimitExceeded as error:
                self.send(b"%d" % (error.connection is upstream))

    with Upstream(silent_for_ever) as upstream:
        target = upstream.target
        with (
            serving_with(Floods, output_bytes_max=1_000_000, dispatch="pool") as server,
            Client(server.server_address) as client,
        ):
            assert client.rest() == b"1"


def test_of_two_connects_that_one_poll_finds_ready_the_second_loses(caplog, monkeypatch):
    """The first wins an `either`, whose step closes the second, which the same pass then finds connected."""

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            index, _ = await self.read(either(connect(targets[0]), connect(targets[1])))
            await self.send(b"%d" % index)

    real = attempts._Attempt.on_ready
    held: dict[Any, int] = {}

    def on_ready(self: Any, mask: int) -> None:
        held[self] = mask
        if len(held) == 2:
            for each in held:
                real(each, mask)

    monkeypatch.setattr(attempts._Attempt, "on_ready", on_ready)
    with Upstream(silent_for_ever) as one, Upstream(silent_for_ever) as two:
        targets = [one.target, two.target]
        with served(Asks) as server, Client(server.server_address) as client:
            assert client.rest() in (b"0", b"1")
            wait_until(server, lambda: not server.table.connections)
            assert server.table.connection_counts == {"opened": 1}
    assert not caplog.records


# -- hand-offs, forks and reuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["thread", "fork", "pool"])
def test_a_connection_that_ends_in_the_pass_of_a_hand_off(policy):
    """The request in the thread or the child learns of the end, and the table of the engine has no trace of it."""

    class Hands(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            await self.read(line())
            self.server.table.cancel(upstream.id)
            await self.read(hand_off(policy))
            try:
                await self.read(upstream.line())
            except ConnectionAbortedError:
                self.send(b"aborted ")
            self.send(await self.read(line()))

    with Upstream(silent_for_ever) as upstream:
        target = upstream.target
        with served(Hands) as server, Client(server.server_address) as client:
            client.send(b"1\n")
            wait_until(server, lambda: not server.table.connections)
            client.send(b"2\n")
            assert client.rest() == b"aborted 2\n"


def test_what_was_kept_before_a_fork_stays_with_the_parent():
    """A child that serves by itself uses neither the idle connections of the parent nor its threads."""

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target, reuse=True))
            upstream.send(await self.read(line()))
            self.send(await self.read(upstream.line()))
            upstream.release()

    with Upstream(echo) as upstream:
        target = upstream.target.replace("127.0.0.1", "localhost")
        server = reqtable.TCPServer(("127.0.0.1", 0), Asks)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with Client(server.server_address) as client:
            assert client.ask(b"parent\n") == b"parent\n"
        wait_until(server, lambda: not len(server.table))
        server.shutdown()
        thread.join()
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            try:
                thread = threading.Thread(target=server.serve_forever)
                thread.start()
                with Client(server.server_address) as client:
                    os.write(writer, client.ask(b"child\n") + b"%d" % server.table.connection_counts["reused"])
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        assert os.read(reader, 100) == b"child\n0"
        os.close(reader)
        server.server_close()


def test_a_full_mailbox_stays_full_while_the_loop_looks_at_it():
    """The loop looks at the first item; meanwhile another thread must not find a place for one more."""

    class Told(AsyncRequestHandler):
        async def handle(self) -> None:
            here.append(self)
            await self.read(either(line(), sleep(60)))
            while True:
                got.append(await self.read(told()))

    here: list[Any] = []
    got: list[int] = []
    with serving_with(Told, told_max=1) as server, Client(server.server_address) as client:
        wait_until(server, lambda: bool(here))
        taken: list[bool] = []
        arrive = type(next(iter(server.table)).want).arrive

        def tells(self: Any, reach: Any, side: Any, data: Any) -> Any:
            if side is not None:
                taken.append(here[0].tell(2))
            return arrive(self, reach, side, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(next(iter(server.table)).want), "arrive", tells)
            assert here[0].tell(1)
            wait_until(server, lambda: bool(taken))
        assert taken == [False]
        client.send(b"x\n")
        wait_until(server, lambda: got == [1])


@pytest.mark.parametrize("secured", [False, True])
def test_a_connection_with_input_that_nobody_read_is_not_used_again(secured, tmp_path):
    def twice(own: Any, *rest: Any) -> None:
        while data := own.recv(1):
            own.sendall(b"%b\n%b stale\n" % (data, data))

    class Asks(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target, reuse=True, **options))
            for each in (b"1", b"2"):
                upstream.send(each)
                self.send(await self.read(upstream.exactly(2)))
                if len(upstream.row.input):
                    upstream.row.input.leftover()  # as if the rest had not come yet
                upstream.release()
                upstream = await self.read(connect(target, reuse=True, **options))

    write_certificate(tmp_path)
    with Upstream(tls(twice) if secured else twice) as upstream:
        target = upstream.target.replace("tcp", "tls") if secured else upstream.target
        options: Any = {"ca": str(tmp_path / "ca.pem")} if secured else {}
        with serving_with(Asks, recv_bytes=16_384 if secured else 2) as server, Client(server.server_address) as client:
            assert client.rest() == b"1\n2\n"
