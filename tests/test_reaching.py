"""Requests that talk to more than their client: `connect`, `either`, `told`, `disconnected`, and what bounds them."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import (
    Arrived,
    AsyncRequestHandler,
    ConnectFailed,
    HandlerError,
    IncompleteRead,
    InvalidTransition,
    LimitExceeded,
    Limits,
    StateRequestHandler,
    System,
    call,
    chunk,
    connect,
    disconnected,
    either,
    end_output,
    exactly,
    hand_off,
    line,
    parsed,
    rest,
    sleep,
    state,
    told,
)
from tests.support import Client, served, serving, wait_until

POLICIES = ["inline", "greenlet", "thread", "fork", "pool"]


class Upstream:
    """A plain server with a thread for each connection, which `talk` serves."""

    def __init__(self, talk: Any, family: int = socket.AF_INET, address: Any = ("127.0.0.1", 0)) -> None:
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen(64)
        self.address = self._listener.getsockname()
        self._talk = talk
        self._threads: list[threading.Thread] = []
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    @property
    def target(self) -> str:
        if isinstance(self.address, str):
            return f"unix://{self.address}"
        host = f"[{self.address[0]}]" if ":" in self.address[0] else self.address[0]
        return f"tcp://{host}:{self.address[1]}"

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for each in self.connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self.connections:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                own, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(own)
            thread = threading.Thread(target=self._serve, args=(own,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, own: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._talk(own)


def echo(own: socket.socket) -> None:
    while data := own.recv(65_536):
        own.sendall(data)
    own.shutdown(socket.SHUT_WR)


def silent(own: socket.socket) -> None:
    own.recv(1)


def reset(own: socket.socket) -> None:
    """Reset the connection as soon as something has come."""
    own.recv(1)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    own.close()


def says(*pieces: bytes) -> Any:
    """Return what sends these bytes and ends the connection."""

    def talk(own: socket.socket) -> None:
        for piece in pieces:
            own.sendall(piece)
        own.shutdown(socket.SHUT_WR)
        own.recv(1)

    return talk


class Asks(AsyncRequestHandler):
    """Sends each line to another server, and its answer back."""

    target = ""

    async def handle(self) -> None:
        upstream = await self.read(connect(self.target))
        while text := await self.read(line()):
            await upstream.send(text)
            await self.send(await self.read(upstream.line()))


class AsksByStates(StateRequestHandler):
    """Does the same as a state machine."""

    target = ""

    def start(self) -> Any:
        return self.connected, connect(self.target)

    @state()
    def connected(self, upstream: Any) -> Any:
        self.upstream = upstream
        return self.asked

    @state(line())
    def asked(self, text: bytes) -> Any:
        self.upstream.send(text)
        return self.answered, self.upstream.line()

    @state()
    def answered(self, text: bytes) -> Any:
        self.send(text)
        return self.asked


def of(handler: type, **attributes: Any) -> Any:
    """Return a subclass of a handler with these attributes."""
    return type(handler.__name__, (handler,), attributes)


@pytest.mark.parametrize("dispatch", POLICIES)
@pytest.mark.parametrize("handler", [Asks, AsksByStates])
def test_a_request_asks_another_server(handler, dispatch):
    with (
        Upstream(echo) as upstream,
        served(of(handler, target=upstream.target), dispatch) as server,
        Client(server.server_address) as client,
    ):
        for number in range(3):
            assert client.ask(b"%d\n" % number) == b"%d\n" % number
        client.end()
        assert client.rest() == b""
        wait_until(server, lambda: not len(server.table))
        assert not server.table.connections
        assert server.stats()["finished"]["done"] == 1


@pytest.mark.parametrize("family", ["tcp4", "tcp6", "unix", "abstract"])
def test_every_kind_of_stream(family, tmp_path):
    where: Any = {
        "tcp4": (socket.AF_INET, ("127.0.0.1", 0)),
        "tcp6": (socket.AF_INET6, ("::1", 0)),
        "unix": (socket.AF_UNIX, str(tmp_path / "up")),
        "abstract": (socket.AF_UNIX, f"\0reqtable-test-{os.getpid()}"),
    }[family]
    with Upstream(echo, *where) as upstream:
        target = upstream.target if family != "abstract" else f"unix://@reqtable-test-{os.getpid()}"
        with served(of(Asks, target=target)) as server, Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"hello\n"


def test_datagrams():
    class Relay(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(await self.read(line()))
            upstream.send(b"")
            for _ in range(2):
                self.send(b"%d\n" % len(await self.read(upstream.datagram())))

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.settimeout(20)
        target = f"udp://127.0.0.1:{own.getsockname()[1]}"
        with served(Relay) as server, Client(server.server_address) as client:
            client.send(b"hello\n")
            for _ in range(2):
                data, peer = own.recvfrom(100)
                own.sendto(data * 2, peer)
            assert client.rest() == b"12\n0\n"


def test_a_refused_datagram_is_an_error_of_the_connection():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        target = f"udp://127.0.0.1:{own.getsockname()[1]}"

    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(b"hello")
            try:
                await self.read(upstream.datagram())
            except ConnectionRefusedError as error:
                self.send(b"refused %d" % (error.connection is upstream))

    with served(Asking) as server, Client(server.server_address) as client:
        assert client.rest() == b"refused 1"


# -- the rows ---------------------------------------------------------------------------------------------------------


def test_a_connection_is_a_row_that_belongs_to_its_request():
    with (
        Upstream(echo) as upstream,
        served(of(AsksByStates, target=upstream.target)) as server,
        Client(server.server_address) as client,
    ):
        client.ask(b"hello\n")
        wait_until(server, lambda: server.table.snapshot()[0]["state"] == "READING")
        rows = server.table.snapshot()
        assert [(row["kind"], row["parent"], row["state"]) for row in rows] == [
            ("client", None, "READING"),
            ("connection", rows[0]["id"], "WAITING"),
        ]
        assert rows[1]["peer"] == ":".join(map(str, upstream.address))
        assert rows[1]["bytes_in"] == rows[1]["bytes_out"] == 6
        assert [entry.id for entry in server.table] == [rows[0]["id"]]
        assert len(server.table) == 1
        assert server.table.get(rows[1]["id"]).parent.id == rows[0]["id"]


def test_the_states_while_it_connects_and_waits():
    looked_up = threading.Event()
    go_on = threading.Event()

    def look_up(*args: Any, **kwargs: Any) -> Any:
        looked_up.set()
        go_on.wait(20)
        return socket.getaddrinfo("127.0.0.1", args[1], type=kwargs["type"])

    with Upstream(silent) as upstream:
        target = f"tcp://up.example:{upstream.address[1]}"

        class Asking(AsyncRequestHandler):
            async def handle(self) -> None:
                up = await self.read(connect(target))
                await self.read(either(up.line(), told(), sleep(60)))

        with serving_with(Asking, System(getaddrinfo=look_up)) as server, Client(server.server_address):
            looked_up.wait(20)
            wait_until(server, lambda: server.table.snapshot()[0]["state"] == "WAITING")
            client, connection = server.table.snapshot()
            assert (client["state"], client["letter"], client["waits_for"]) == ("WAITING", "T", f"connect({target!r})")
            assert (connection["state"], connection["letter"]) == ("CONNECTING", "N")
            assert connection["deadline_s"] == pytest.approx(10, abs=2)
            go_on.set()
            wait_until(server, lambda: all(row["state"] == "WAITING" for row in server.table.snapshot()))
            assert server.table.snapshot()[0]["waits_for"].startswith("either(line(")
            assert server.table.snapshot()[0]["deadline_s"] == pytest.approx(60, abs=5)


@contextlib.contextmanager
def serving_with(handler: type, system: System | None = None, dispatch: str | None = None, **limits: Any) -> Any:
    """Serve `handler` on an engine with this system and these limits."""
    server = reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch)
    reqtable.Engine(limits=Limits(**limits), system=system).add(server)
    with serving(server):
        yield server


class Holds(AsyncRequestHandler):
    """Opens a connection and waits as the test says."""

    target = ""
    wait: Any = None

    async def handle(self) -> None:
        self.upstream = await self.read(connect(self.target))
        self.send(b"open\n")
        await type(self).wait(self)


async def for_its_client(self: Any) -> None:
    await self.read(line())


async def for_the_other(self: Any) -> None:
    await self.read(self.upstream.line())


async def for_both(self: Any) -> None:
    await self.read(either(line(), self.upstream.line()))


async def in_a_sleep(self: Any) -> None:
    await self.sleep(600)


async def in_a_call(self: Any) -> None:
    await self.call(threading.Event().wait, 0.2)


@pytest.mark.parametrize("wait", [for_its_client, for_the_other, for_both, in_a_sleep, in_a_call])
@pytest.mark.parametrize("how", ["cancel", "reset", "close"])
def test_a_connection_ends_with_its_request_whatever_ends_it(wait, how):
    ended = threading.Event()

    def watch(own: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError):
            own.recv(1)
        ended.set()

    with Upstream(watch) as upstream:
        server = reqtable.TCPServer(("127.0.0.1", 0), of(Holds, target=upstream.target, wait=wait))
        with serving(server), Client(server.server_address) as client:
            client.receive(5)
            assert len(server.table.connections) == 1
            if how == "cancel":
                server.table.cancel(next(iter(server.table)).id)
            elif how == "reset":
                server.engine.post(server.engine.steps.end, next(iter(server.table)), reqtable.Event.LOST)
            if how != "close":
                wait_until(server, lambda: not server.table.connections and not len(server.table))
                assert ended.wait(20)
        assert ended.wait(20)  # server_close() ends it at the latest
        assert not server.table.connections


def test_cancelling_a_connection_ends_that_alone():
    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            self.send(b"open\n")
            try:
                await self.read(upstream.line())
            except ConnectionAbortedError as error:
                self.send(b"%s\n" % str(error).encode())
            await self.read(line())

    with Upstream(silent) as upstream:
        target = upstream.target
        with served(Asking) as server, Client(server.server_address) as client:
            client.line()
            [number] = server.table.connections
            assert server.table.cancel(number)
            assert client.line() == b"the connection to %s was cancelled\n" % target.encode()
            assert len(server.table) == 1
            assert not server.table.connections


def test_too_many_connections():
    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            first = await self.read(connect(target))
            try:
                await self.read(connect(target))
            except ConnectFailed as error:
                self.send(str(error).encode())
            first.close()
            await self.read(connect(target))
            self.send(b"; open")

    with Upstream(silent) as upstream:
        target = upstream.target
        with serving_with(Asking, connections_max=1) as server, Client(server.server_address) as client:
            assert client.rest() == b"can't connect to %s: connections_max = 1 are open; open" % target.encode()


def test_a_connect_that_succeeds_at_once_does_not_disturb_the_step_that_began_it(tmp_path):
    path = str(tmp_path / "up")

    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            first = await self.read(connect(target))
            one = await self.read(first.line())  # the second line has come, too
            second = await self.read(connect(f"unix://{path}"))
            self.send(b"%b %b %b" % (one, second.address[:4].encode(), await self.read(first.line())))

    with Upstream(says(b"one\ntwo\n")) as upstream, Upstream(silent, socket.AF_UNIX, path):
        target = upstream.target
        with served(Asking) as server, Client(server.server_address) as client:
            assert client.rest() == b"one\n unix two\n"


def test_a_handshake_that_fails_at_once_fails_once():
    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            self.send(await self.read(upstream.line()))
            try:
                await self.read(upstream.start_tls(context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
            except ConnectFailed:
                self.send(await self.read(line()))

    with Upstream(says(b"ready\n")) as upstream:
        target = upstream.target
        with served(Asking) as server, Client(server.server_address) as client:
            client.send(b"failed\n")
            assert client.rest() == b"ready\nfailed\n"


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", POLICIES)
@pytest.mark.parametrize("handler", [Asks, AsksByStates])
def test_a_connect_that_fails_ends_the_request_as_upstream(handler, dispatch, caplog, unused_port):
    target = f"tcp://127.0.0.1:{unused_port}"
    with (
        served(of(handler, target=target), dispatch) as server,
        Client(server.server_address) as client,
    ):
        assert client.rest() == b""
        wait_until(server, lambda: not len(server.table))
        assert server.stats()["finished"]["upstream"] == 1
        assert not server.table.connections


def test_why_a_connect_fails(tmp_path, unused_port):
    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            while target := (await self.read(line())).strip().decode():
                try:
                    await self.read(connect(target, timeout=20))
                except OSError as error:
                    assert isinstance(error, ConnectFailed)
                    assert error.address == target
                    self.send(f"{error.reason}\n".encode())

    with serving_with(Asking, System(getaddrinfo=unknown)) as server, Client(server.server_address) as client:
        assert client.ask(b"tcp://127.0.0.1:%d\n" % unused_port) == b"connection refused\n"
        assert client.ask(b"tcp://no.example:80\n") == b"no.example can't be looked up: name or service not known\n"
        missing = str(tmp_path / "missing").encode()
        assert client.ask(b"unix://%s\n" % missing) == b"no such file or directory\n"


def test_a_connect_times_out():
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fill = [socket.socket() for _ in range(4)]
    for each in fill:
        each.setblocking(False)
        each.connect_ex(full.getsockname())
    target = f"tcp://127.0.0.1:{full.getsockname()[1]}"

    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(connect(target, timeout=0.2))
            except ConnectFailed as error:
                self.send(error.reason.encode())

    with served(Asking) as server, Client(server.server_address) as client:
        assert client.rest() == b"not connected within 0.2 s"
        wait_until(server, lambda: not server.table.connections)
    for each in (full, *fill):
        each.close()


@pytest.mark.parametrize(
    ("address", "mend"),
    [
        ("127.0.0.1:80", "write tcp://host:port"),
        ("ftp://x:80", "write tcp://host:port"),
        ("tcp://x", "write tcp://host:port"),
        ("tcp://:80", "write tcp://host:port"),
        ("tcp://x:0", "give a port from 1 to 65535"),
        ("tcp://x:99999", "give a port from 1 to 65535"),
        ("tcp://x:http", "give a port from 1 to 65535"),
        ("tcp://::1:80", r"\[address\]:port for IPv6"),
        ("tcp://x/y:80", "write tcp://host:port"),
        ("unix://", "write an absolute path"),
        ("unix:///" + "x" * 107, "give a path of 1 to 107 bytes"),
    ],
)
def test_an_address_that_cant_be_used_is_refused_at_once(address, mend):
    with pytest.raises(ValueError, match=mend):
        connect(address)


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(TypeError, match="takes an address such as"):
        connect(("127.0.0.1", 80))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="options of TLS are for tls:// addresses"):
        connect("tcp://x:1", verify=False)
    with pytest.raises(TypeError, match="takes one want or more"):
        either()
    with pytest.raises(TypeError, match="takes wants"):
        either(line(), 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="wait for it alone"):
        either(line(), hand_off("thread"))
    with pytest.raises(TypeError, match="into the outer one"):
        either(line(), either(line()))
    with pytest.raises(ValueError, match="nothing may follow the port, but '/index' does"):
        connect("tcp://x:80/index")
    with pytest.raises(ValueError, match="write an absolute path"):
        connect("unix://x.sock")
    with pytest.raises(AttributeError, match="is a want, not yet a connection, so it has no send"):
        connect("tcp://x:80").send(b"early")


class Errs(StateRequestHandler):
    """Tells its client of errors, by name."""

    target = ""
    want: Any = None

    def start(self) -> Any:
        return self.connected, connect(self.target)

    @state()
    def connected(self, upstream: Any) -> Any:
        upstream.send(b"x")
        self.upstream = upstream
        return self.got, type(self).want(upstream)

    @state()
    def got(self, item: Any) -> Any:
        self.send(repr(item).encode() + b"\n")
        return self.got, type(self).want(self.upstream)

    def on_error(self, error: Exception) -> Any:
        own = getattr(error, "connection", None) is self.upstream
        self.send(f"{type(error).__name__} {own}\n".encode())
        return None if isinstance(error, HandlerError) else (self.got, type(self).want(self.upstream))


@pytest.mark.parametrize(
    ("talk", "want", "answer"),
    [
        (reset, lambda up: up.line(), b"ConnectionResetError True\nHandlerError False\n"),
        (reset, lambda up: either(up.line(), told()), b"ConnectionResetError True\nHandlerError False\n"),
        (says(b"a\nb"), lambda up: up.line(), b"b'a\\n'\nb'b'\nb''\nInvalidTransition False\n"),
        (says(b"a\nb"), lambda up: either(up.line()), b"(b'a\\n')(b'b')(b'')InvalidTransition False\n"),
        (says(b"ab"), lambda up: up.rest(9), b"b'ab'\nb''\nInvalidTransition False\n"),
        (says(b"ab"), lambda up: up.exactly(5), b"IncompleteRead True\nInvalidTransition False\n"),
        (says(b"ab"), lambda up: up.until(b";"), b"IncompleteRead True\nInvalidTransition False\n"),
        (says(b"abcdef"), lambda up: up.line(3), b"LimitExceeded True\n"),
    ],
)
def test_what_a_handler_gets_at_the_end_of_a_connection(talk, want, answer):
    with (
        Upstream(talk) as upstream,
        served(of(Errs, target=upstream.target, want=staticmethod(want))) as server,
        Client(server.server_address) as client,
    ):
        told_ = client.rest()
        if b"(" in answer:
            told_ = told_.replace(b"Arrived(index=0, item=", b"(").replace(b")\n", b")")
        assert told_ == answer
        wait_until(server, lambda: not len(server.table))
        assert not server.table.connections


def test_a_want_of_somebody_elses_connection():
    opened: list[Any] = []

    class Sharing(AsyncRequestHandler):
        async def handle(self) -> None:
            if not opened:
                opened.append(await self.read(connect(target)))
                self.send(b"open\n")
                await self.read(line())
                return
            for use in (
                lambda: self.read(opened[0].line()),
                lambda: self.read(either(line(), opened[0].line())),
            ):
                try:
                    await use()
                except HandlerError as error:
                    self.send(f"{error}\n".encode())

    with Upstream(silent) as upstream:
        target = upstream.target
        with served(Sharing) as server, Client(server.server_address) as one:
            one.line()
            with Client(server.server_address) as two:
                expected = b"the connection to %s belongs to request 1: each request opens its own\n" % target.encode()
                assert two.rest() == expected * 2
            assert len(server.table.connections) == 1
            one.ask(b"bye\n")
            with Client(server.server_address) as three:
                expected = b"the connection to %s was closed or released: open another one with connect()\n"
                assert three.rest() == expected % target.encode() * 2
            with pytest.raises(HandlerError, match="was closed or released"):
                opened[0].send(b"late")


@pytest.mark.parametrize("use", ["send", "end_output", "close", "release"])
def test_another_request_cant_use_the_connection(use):
    opened: list[Any] = []

    class Sharing(AsyncRequestHandler):
        async def handle(self) -> None:
            if not opened:
                opened.append(await self.read(connect(target)))
                self.send(b"open\n")
                opened[0].send(b"hello\n")
                self.send(await self.read(opened[0].line()))
            else:
                await self.read(line())
                try:
                    getattr(opened[0], use)(*([b"x"] if use == "send" else []))
                except HandlerError as error:
                    self.send(str(error).encode())

    gate = threading.Event()

    def late_echo(own: socket.socket) -> None:
        data = own.recv(100)
        gate.wait(20)
        own.sendall(data)

    with Upstream(late_echo) as upstream:
        target = upstream.target
        with served(Sharing) as server, Client(server.server_address) as one:
            one.line()
            with Client(server.server_address) as two:
                assert b"belongs to request 1: each request opens its own" in two.send(b"go\n").rest()
            gate.set()
            assert one.line() == b"hello\n"


def test_a_stream_has_no_datagrams_and_the_other_way_round():
    class Mixes(AsyncRequestHandler):
        async def handle(self) -> None:
            stream = await self.read(connect(target))
            datagrams = await self.read(connect("udp://127.0.0.1:9"))
            for mistake in (stream.datagram, datagrams.line, datagrams.end_output):
                try:
                    mistake()
                except HandlerError as error:
                    self.send(f"{error}\n".encode())

    with Upstream(silent) as upstream:
        target = upstream.target
        with served(Mixes) as server, Client(server.server_address) as client:
            said = client.rest().decode()
            assert said == (
                f"{target} is a stream: wait for line(), exactly(), chunk() and the like\n"
                "udp://127.0.0.1:9 brings datagrams, not a stream: wait for datagram()\n"
                "end_output() of udp://127.0.0.1:9: each datagram is whole by itself\n"
            )


def test_release_with_unsent_output_closes_the_connection():
    class Hasty(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.end_output()
            upstream.end_output()  # the second has no effect
            upstream.release()
            self.send(b"done")

    with Upstream(silent) as upstream:
        target = upstream.target
        with served(Hasty) as server, Client(server.server_address) as client:
            assert client.rest() == b"done"
            wait_until(server, lambda: not server.table.connections)


# -- either -----------------------------------------------------------------------------------------------------------


def test_either_takes_the_wants_in_turn_and_keeps_what_loses():
    class Both(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            await self.read(upstream.flushed())
            self.send(b"open\n")
            await self.read(line())  # from here on both sides have lines
            order = []
            for _ in range(6):
                arrived = await self.read(either(line(), upstream.line()))
                assert isinstance(arrived, Arrived)
                order.append((arrived.index, arrived.item))
            self.send(repr(order).encode())

    with Upstream(says(b"u1\nu2\nu3\n")) as upstream:
        target = upstream.target
        with served(Both) as server, Client(server.server_address) as client:
            client.line()
            row = next(iter(server.table.connections.values()))
            client.send(b"go\nc1\nc2\nc3\n")
            got = eval(client.rest())
            assert row.bytes_in == 9
            assert sorted(got) == [(0, b"c1\n"), (0, b"c2\n"), (0, b"c3\n"), (1, b"u1\n"), (1, b"u2\n"), (1, b"u3\n")]
            assert [item for index, item in got if index] == [b"u1\n", b"u2\n", b"u3\n"]
            indexes = [index for index, _ in got]
            first = indexes.index(1)
            assert indexes[first : first + 4] in ([1, 0, 1, 0], [1, 0, 1, 1]) or first == 3, (
                "in turn once both have lines"
            )


def test_either_gives_up_what_loses():
    given_up = threading.Event()
    begun = threading.Event()

    def run() -> None:
        begun.set()
        given_up.wait(20)

    class Racing(AsyncRequestHandler):
        async def handle(self) -> None:
            arrived = await self.read(either(call(run, on="thread"), sleep(600), connect(target), line()))
            self.send(b"%d %s" % (arrived.index, arrived.item))
            await self.read(line())

    def look_up(*args: Any, **kwargs: Any) -> Any:
        given_up.wait(20)
        return []

    target = "tcp://slow.example:1"
    with serving_with(Racing, System(getaddrinfo=look_up)) as server, Client(server.server_address) as client:
        begun.wait(20)
        assert len(server.table.connections) == 1
        assert client.send(b"me\n").line() == b"3 me\n"
        wait_until(server, lambda: not server.table.connections)
        assert not server.engine.steps.give_ups
        given_up.set()


@pytest.mark.parametrize("dispatch", ["inline", "thread", "pool", "fork"])
def test_either_with_a_sleep_a_call_and_a_timeout(dispatch):
    class Racing(AsyncRequestHandler):
        async def handle(self) -> None:
            self.send(repr(await self.read(either(line(), sleep(0.01)))).encode() + b"\n")
            self.send(repr(await self.read(either(line(), call(int, "7", on="thread")))).encode() + b"\n")
            try:
                await self.read(either(line(), told()), timeout=0.01)
            except TimeoutError:
                self.send(b"timeout\n")
            try:
                await self.read(either(line(), call(int, "x", on="thread")))
            except ValueError as error:
                self.send(f"{error}\n".encode())

    with served(Racing, dispatch) as server, Client(server.server_address) as client:
        assert client.line() == b"Arrived(index=1, item=None)\n"
        assert client.line() == b"Arrived(index=1, item=7)\n"
        assert client.line() == b"timeout\n"
        assert client.line() == b"invalid literal for int() with base 10: 'x'\n"


def test_the_clients_end_of_file_is_an_item_of_either_once():
    class Ends(AsyncRequestHandler):
        async def handle(self) -> None:
            for _ in range(3):
                self.send(repr(await self.read(either(line(), told()))).encode() + b"\n")
            try:
                await self.read(either(line(), exactly(3)))
            except InvalidTransition as error:
                self.send(str(error).encode())

    with served(Ends) as server, Client(server.server_address) as client:
        client.send(b"one\ntwo").end()
        assert client.line() == b"Arrived(index=0, item=b'one\\n')\n"
        assert client.line() == b"Arrived(index=0, item=b'two')\n"
        assert client.line() == b"Arrived(index=0, item=b'')\n"
        assert client.rest().endswith(b"can't be satisfied: every input has ended, and the handler knows")


def test_input_of_the_client_in_either_at_its_end_goes_to_on_eof():
    class Ends(StateRequestHandler):
        def start(self) -> Any:
            return self.got, either(exactly(5), told())

        @state()
        def got(self, item: Any) -> Any:
            return None

        def on_eof(self, partial: bytes) -> Any:
            self.send(b"eof " + partial)

    with served(Ends) as server, Client(server.server_address) as client:
        assert client.send(b"ab").end().rest() == b"eof ab"


# -- told -------------------------------------------------------------------------------------------------------------


class Listens(AsyncRequestHandler):
    """Sends what it is told."""

    listeners: ClassVar[list[Any]] = []

    async def handle(self) -> None:
        self.listeners.append(self)
        self.send(b"listening\n")
        try:
            while True:
                arrived = await self.read(either(told(), line()))
                if arrived.index == 1:
                    break
                self.send(arrived.item)
        finally:
            self.listeners.remove(self)


class Tells(Listens):
    """Tells all listeners each line."""

    async def handle(self) -> None:
        while text := await self.read(line()):
            self.send(b"%d\n" % sum(each.tell(text) for each in self.listeners))


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
def test_told_by_another_request(dispatch):
    class Either(Tells):
        listeners: ClassVar[list[Any]] = []

        async def handle(self) -> None:
            text = await self.read(line())
            await (Listens.handle(self) if text == b"listen\n" else Tells.handle(self))

    with served(Either, dispatch) as server, Client(server.server_address) as teller:
        listeners = [Client(server.server_address) for _ in range(3)]
        for each in listeners:
            assert each.ask(b"listen\n") == b"listening\n"
        teller.send(b"tell\n")
        for number in range(5):
            assert teller.ask(b"%d\n" % number) == b"3\n"
        for each in listeners:
            assert each.receive(10) == b"0\n1\n2\n3\n4\n"
            assert each.send(b"bye\n").rest() == b""
            each.close()
        assert teller.ask(b"more\n") == b"0\n"


@pytest.mark.parametrize("dispatch", ["inline", "thread", "pool"])
def test_told_by_threads(dispatch):
    class Hears(Listens):
        listeners: ClassVar[list[Any]] = []

    with served(Hears, dispatch) as server, Client(server.server_address) as client:
        client.line()
        [listener] = Hears.listeners

        def tell() -> None:
            for _ in range(100):
                while not listener.tell(b"x"):
                    pass  # it has taken nothing for a while

        threads = [threading.Thread(target=tell) for _ in range(4)]
        for each in threads:
            each.start()
        assert client.receive(400) == b"x" * 400
        for each in threads:
            each.join()


def test_a_forked_child_cant_tell_the_parents_requests():
    class Child(Listens):
        listeners: ClassVar[list[Any]] = []

        async def handle(self) -> None:
            if self.listeners:
                await self.hand_off("fork")
                self.send(b"%d\n" % self.listeners[0].tell(b"lost"))
            else:
                await Listens.handle(self)

    with served(Child) as server, Client(server.server_address) as parent:
        assert parent.line() == b"listening\n"
        with Client(server.server_address) as child:
            assert child.rest() == b"0\n"
        assert Child.listeners[0].tell(b"here\n")
        assert parent.line() == b"here\n"


def test_tell_is_bounded_and_says_so():
    class Deaf(Listens):
        listeners: ClassVar[list[Any]] = []

        async def handle(self) -> None:
            self.listeners.append(self)
            self.send(b"deaf\n")
            await self.read(line())
            for _ in range(3):
                self.send(await self.read(told()))

    with serving_with(Deaf, told_max=3) as server, Client(server.server_address) as client:
        client.line()
        [deaf] = Deaf.listeners
        assert [deaf.tell(b"%d" % number) for number in range(5)] == [True, True, True, False, False]
        assert client.ask(b"listen\n") == b"012"
        assert client.rest() == b""
        wait_until(server, lambda: not len(server.table))
        assert deaf.tell(b"late") is False


def test_a_slow_listener_keeps_its_messages_in_the_mailbox():
    class Slow(Listens):
        listeners: ClassVar[list[Any]] = []

    mark = 65_536
    with serving_with(Slow, told_max=10, high_water_bytes=mark) as server, Client(server.server_address) as client:
        client.line()
        [listener] = Slow.listeners
        taken = 0
        refused = 0
        while not refused:
            if listener.tell(bytes(mark)):
                taken += 1
            else:
                refused += 1
            wait_until(server, lambda: True)
        [row] = server.table.snapshot()
        assert row["state"] == "WAITING"
        assert row["buffered_out"] <= 2 * mark
        assert len(client.receive(taken * mark)) == taken * mark


# -- disconnected -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_disconnected_sees_an_end_of_file_behind_unread_input(dispatch):
    class Polls(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(line())
            self.send(b"waiting\n")
            arrived = await self.read(either(sleep(600), disconnected()))
            self.send(b"%d" % arrived.index)

    with served(Polls, dispatch) as server, Client(server.server_address) as client:
        assert client.ask(b"poll\n") == b"waiting\n"
        client.send(b"never read\n").end()
        assert client.rest() == b"1"
        wait_until(server, lambda: not len(server.table))


def test_disconnected_alone():
    class Polls(StateRequestHandler):
        def start(self) -> Any:
            self.send(b"waiting\n")
            return self.gone, disconnected()

        @state()
        def gone(self, _: None) -> Any:
            self.send(b"gone")

    with served(Polls) as server, Client(server.server_address) as client:
        client.line()
        assert client.end().rest() == b"gone"


# -- reuse ------------------------------------------------------------------------------------------------------------


class Reuses(AsyncRequestHandler):
    target = ""

    async def handle(self) -> None:
        while text := await self.read(line()):
            upstream = await self.read(connect(self.target, reuse=True))
            await upstream.send(text)
            self.send(await self.read(upstream.line()))
            upstream.release()


def test_a_released_connection_is_used_again():
    with (
        Upstream(echo) as upstream,
        served(of(Reuses, target=upstream.target)) as server,
        Client(server.server_address) as one,
        Client(server.server_address) as two,
    ):
        for each in (one, two, one):
            assert each.ask(b"hello\n") == b"hello\n"
        assert len(upstream.connections) == 1
        [row] = server.table.snapshot()[2:]
        assert (row["kind"], row["parent"]) == ("connection", None)
        assert 0 < row["deadline_s"] <= Limits().connections_idle_s
        upstream.connections[0].shutdown(socket.SHUT_RDWR)
        wait_until(server, lambda: not server.table.connections)
        assert one.ask(b"again\n") == b"again\n"
        assert len(upstream.connections) == 2


def test_an_idle_connection_ends_in_time_and_makes_room():
    with Upstream(echo) as upstream:
        handler = of(Reuses, target=upstream.target)
        with (
            serving_with(handler, connections_idle_s=0.05, connections_max=1) as server,
            Client(server.server_address) as client,
        ):
            client.ask(b"hello\n")
            wait_until(server, lambda: not server.table.connections)
            client.ask(b"hello\n")
            assert server.table.connection_counts == {"opened": 2}


# -- backpressure -----------------------------------------------------------------------------------------------------


class Forwards(AsyncRequestHandler):
    target = ""

    async def handle(self) -> None:
        upstream = await self.read(connect(self.target))
        open_sides = 2
        while open_sides:
            index, data = await self.read(either(chunk(), upstream.chunk()))
            open_sides -= not data
            if index == 0:
                upstream.send(data) if data else upstream.end_output()
            elif data:
                self.send(data)
            else:
                await self.read(end_output())


class ForwardsByStates(StateRequestHandler):
    target = ""
    open_sides: int = 2

    def start(self) -> Any:
        return self.connected, connect(self.target)

    @state()
    def connected(self, upstream: Any) -> Any:
        self.upstream = upstream
        return self.moved, either(chunk(), upstream.chunk())

    @state()
    def moved(self, arrived: Arrived) -> Any:
        index, data = arrived
        self.open_sides -= not data
        if index == 0:
            self.upstream.send(data) if data else self.upstream.end_output()
        elif data:
            self.send(data)
        else:
            return self.ended, end_output()
        return self.ended(None)

    @state()
    def ended(self, _: None) -> Any:
        return (self.moved, either(chunk(), self.upstream.chunk())) if self.open_sides else None


MIB = 2**20


@pytest.mark.parametrize("dispatch", ["inline", "thread", "pool", "fork"])
@pytest.mark.parametrize("handler", [Forwards, ForwardsByStates])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_slow_reader_holds_its_sender(handler, direction, dispatch):
    """A forwarder holds at most twice the high-water mark, and everything arrives."""
    go_on = threading.Event()
    count = 24 * MIB
    came: list[int] = []
    data = os.urandom(MIB)

    def slow(own: Any) -> None:
        go_on.wait(20)
        total = 0
        while more := own.recv(MIB):
            total += len(more)
        came.append(total)

    def fast(own: Any) -> None:
        for _ in range(count // MIB):
            own.sendall(data)
        own.shutdown(socket.SHUT_WR)

    def talk(own: socket.socket) -> None:
        (slow if direction == "up" else fast)(own)
        own.shutdown(socket.SHUT_WR)
        own.recv(1)

    with (
        Upstream(talk) as upstream,
        served(of(handler, target=upstream.target), dispatch) as server,
        Client(server.server_address) as client,
    ):
        worker = threading.Thread(target=fast if direction == "up" else slow, args=(client.socket,))
        worker.start()
        if dispatch in ("inline", "pool"):
            sides = {"up": 1, "down": 0}[direction]
            wait_until(server, lambda: len(server.table.snapshot()) == 2)
            wait_until(server, lambda: server.table.snapshot()[sides]["buffered_out"] > Limits().high_water_bytes)
            rows = server.table.snapshot()
            assert sum(row["buffered_out"] + row["buffered_in"] for row in rows) <= 2 * Limits().high_water_bytes
        go_on.set()
        if direction == "up":
            assert client.rest() == b""
        worker.join()
        if direction == "down":
            client.end()
        wait_until(server, lambda: not len(server.table))
        assert came == [count]
        assert server.stats()["finished"]["done"] == 1


@pytest.mark.parametrize("handler", [Forwards, ForwardsByStates])
def test_a_client_that_does_not_read_holds_up_one_direction_only(handler):
    """The other direction goes on while the client's output blocks."""
    came = threading.Event()

    def talk(own: socket.socket) -> None:
        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    own.sendall(bytes(MIB))

        thread = threading.Thread(target=send)
        thread.start()
        total = 0
        while total < 8 * MIB and (more := own.recv(MIB)):
            total += len(more)
        came.set()
        thread.join()

    with (
        Upstream(talk) as upstream,
        served(of(handler, target=upstream.target)) as server,
        Client(server.server_address) as client,
    ):
        wait_until(server, lambda: len(server.table.snapshot()) == 2)
        wait_until(server, lambda: server.table.snapshot()[0]["buffered_out"] > Limits().high_water_bytes)
        for _ in range(8):
            client.send(bytes(MIB))
        assert came.wait(20)


def test_what_was_sent_to_a_connection_arrives_although_the_request_ends():
    got: list[bytes] = []

    def take(own: socket.socket) -> None:
        data = bytearray()
        while more := own.recv(MIB):
            data += more
        got.append(bytes(data))

    class Leaves(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            upstream.send(bytes(16 * MIB))

    with Upstream(take) as upstream:
        target = upstream.target
        with served(Leaves) as server, Client(server.server_address) as client:
            assert client.rest() == b""
            wait_until(server, lambda: not len(server.table))
            assert not server.table.connections
    assert got == [bytes(16 * MIB)]


def test_an_upstream_that_takes_nothing_is_given_up():
    class Sends(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            try:
                while True:
                    await upstream.send(bytes(MIB))
            except TimeoutError as error:
                self.send(b"%d " % (error.connection is upstream) + str(error).encode())

    gate = threading.Event()
    with Upstream(lambda _: gate.wait(20)) as upstream:
        target = upstream.target
        with serving_with(Sends, write_timeout_s=0.1) as server, Client(server.server_address) as client:
            assert client.rest() == b"1 %s took none of its output for 0.1 s" % target.encode()
        gate.set()


# -- several addresses ------------------------------------------------------------------------------------------------


def test_the_next_address_is_tried_if_one_is_refused():
    with Upstream(echo) as upstream:
        port = upstream.address[1]

        def look_up(host: str, number: int, type: int) -> Any:
            stream = (type, 6, "")
            return [
                (socket.AF_INET6, *stream, ("::1", port, 0, 0)),
                (socket.AF_INET, *stream, ("127.0.0.2", port)),
                (socket.AF_INET, *stream, ("127.0.0.1", port)),
            ]

        handler = of(Asks, target=f"tcp://several.example:{port}")
        with serving_with(handler, System(getaddrinfo=look_up)) as server, Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"hello\n"
            assert server.table.snapshot()[1]["peer"] == f"127.0.0.1:{port}"


def test_every_address_that_fails_is_named(unused_port):
    def look_up(host: str, number: int, type: int) -> Any:
        return [
            (socket.AF_INET, type, 6, "", ("127.0.0.1", unused_port)),
            (socket.AF_INET, type, 6, "", ("127.0.0.2", unused_port)),
        ]

    class Asking(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(connect("tcp://several.example:1"))
            except ConnectFailed as error:
                self.send(error.reason.encode())

    with serving_with(Asking, System(getaddrinfo=look_up)) as server, Client(server.server_address) as client:
        refused = ": connection refused"
        assert client.rest().decode() == f"127.0.0.1:{unused_port}{refused}; 127.0.0.2:{unused_port}{refused}"


# -- handing off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["thread", "pool", "fork"])
def test_a_request_takes_its_connections_with_it(policy):
    class Moves(AsyncRequestHandler):
        async def handle(self) -> None:
            upstream = await self.read(connect(target))
            await upstream.send(b"one\n")
            self.send(await self.read(upstream.line()))
            await self.hand_off(policy)
            await upstream.send(b"two\n")
            self.send(await self.read(upstream.line()))
            await self.read(line())

    with Upstream(echo) as upstream:
        target = upstream.target
        with served(Moves) as server, Client(server.server_address) as client:
            assert client.receive(8) == b"one\ntwo\n"
            wait_until(server, lambda: not server.table.connections)
            client.send(b"bye\n")
            assert client.rest() == b""
            wait_until(server, lambda: not len(server.table))
            wait_until(server, lambda: len(upstream.connections) == 1)


def test_executor_refuses_connections_when_the_server_is_made():
    with pytest.raises(reqtable.ConfigurationError, match=r"start uses connect\(\), and a connection can't be shipped"):
        reqtable.TCPServer(("127.0.0.1", 0), AsksByStates, dispatch="executor")


# -- parsed -----------------------------------------------------------------------------------------------------------


def netstring(data: bytes) -> tuple[bytes, int] | None:
    head, found, body = data.partition(b":")
    if not found:
        return None
    size = int(head)
    return (body[:size], len(head) + size + 2) if len(body) > size else None


def test_parsed_finds_whole_messages():
    class Counts(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                while True:
                    self.send(await self.read(parsed(netstring, 20)) + b"\n")
            except (LimitExceeded, IncompleteRead, ValueError) as error:
                self.send(type(error).__name__.encode() + b"\n")

    with served(Counts) as server:
        for data, answer in (
            (b"5:hello,3:abc,", b"hello\nabc\nIncompleteRead\n"),
            (b"99:" + b"x" * 50, b"LimitExceeded\n"),
            (b"x:1", b"ValueError\n"),
        ):
            with Client(server.server_address) as client:
                assert client.send(data).end().rest() == answer


def test_half_close_of_the_client_side():
    class Ends(AsyncRequestHandler):
        async def handle(self) -> None:
            self.send(b"all\n")
            await self.read(end_output())
            Ends.got = await self.read(rest(100))

    with served(Ends) as server, Client(server.server_address) as client:
        assert client.rest() == b"all\n"
        client.send(b"more").end()
        wait_until(server, lambda: not len(server.table))
        assert Ends.got == b"more"
        assert server.stats()["finished"]["done"] == 1
