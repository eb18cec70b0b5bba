"""TLS of outgoing connections (`tls://`), and TLS that begins later: `start_tls` of both sides (STARTTLS)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import (
    Arrived,
    AsyncRequestHandler,
    ConnectFailed,
    Limits,
    PeerError,
    StateRequestHandler,
    Transition,
    chunk,
    connect,
    either,
    end_output,
    line,
    sleep,
    start_tls,
    state,
    told,
)
from reqtable.testing import exercise
from tests.certificates import TLSStream, begin_tls, client_context, server_context, write_certificate
from tests.support import WAIT_S, Client, serving, wait_until
from tests.test_reaching import Upstream, echo


@contextlib.contextmanager
def running(handler: Any, dispatch: str | None = None, **limits: Any) -> Iterator[Any]:
    """Run a server of `handler` during the block. Afterwards no request, connection or descriptor of it is left."""
    config = reqtable.Config(limits=Limits(**limits))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)) as server:
        yield server
        wait_until(server, lambda: len(server.table) == len(server.table.connections) == 0)
        assert server.stats()["buffered_bytes"] == 0


def endings(server: Any) -> dict[str, int]:
    wait_until(server, lambda: len(server.table) == len(server.table.connections) == 0)
    return {how: count for how, count in server.stats()["finished"].items() if count}


# -- the client's own connection -------------------------------------------------------------------------------------


class Secures(AsyncRequestHandler):
    """Echoes lines. After `tls` the connection is encrypted."""

    cert: ClassVar[Any]
    timeout_s: ClassVar[float | None] = None

    async def handle(self) -> None:
        while text := await self.read(line()):
            if text == b"tls\n":
                await self.send(b"go\n")
                try:
                    await self.read(start_tls(cert=self.cert), timeout=self.timeout_s)
                except (OSError, PeerError, reqtable.ReqtableError) as error:
                    await self.failed(error)
                    continue
            await self.send(text if self.tls is None else self.tls.version().encode() + b" " + text)

    async def failed(self, error: Exception) -> None:
        raise error


class SecuresByStates(StateRequestHandler):
    """Does the same as a state machine."""

    cert: ClassVar[Any]

    @state(line())
    def command(self, text: bytes) -> Transition:
        if text == b"tls\n":
            self.send(b"go\n")
            return self.secured, start_tls(cert=self.cert)
        self.send(text if self.tls is None else self.tls.version().encode() + b" " + text)
        return self.command

    @state()
    def secured(self, _: None) -> Transition:
        self.send(self.tls.version().encode() + b" tls\n")
        return self.command


STYLES = [Secures, SecuresByStates]


@pytest.fixture
def cert(tmp_path: Path) -> str:
    return write_certificate(tmp_path)


def made(style: Any, cert: Any, **attributes: Any) -> Any:
    return type(style.__name__, (style,), {"cert": cert, **attributes})


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool"])
@pytest.mark.parametrize("style", STYLES)
def test_a_client_is_encrypted_later(style: Any, dispatch: str, cert: str) -> None:
    with running(made(style, cert), dispatch) as server, Client(server.server_address) as client:
        assert client.ask(b"plain\n") == b"plain\n"
        assert client.ask(b"tls\n") == b"go\n"
        begin_tls(client)
        assert client.line() == b"TLSv1.3 tls\n"
        long = b"x" * 60_000 + b"\n"
        client.send(long * 3)
        for _ in range(3):
            assert client.receive(8 + len(long)) == b"TLSv1.3 " + long
        client.socket.unwrap()  # type: ignore[attr-defined]
        wait_until(server, lambda: not server.table)
        assert endings(server) == {"done": 1}


@pytest.mark.parametrize("dispatch", ["thread", "fork"])
def test_a_client_is_not_encrypted_later_where_another_loop_ends_its_connection(dispatch: str, cert: str) -> None:
    class Tells(Secures):
        async def failed(self, error: Exception) -> None:
            await self.send(f"{error}\n".encode())

    with running(made(Tells, cert), dispatch) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        assert client.line().endswith(b"whose handler runs on the loop, not in a thread or a child\n")
        assert client.ask(b"plain\n") == b"plain\n"
        client.end()
        assert client.rest() == b""


@pytest.mark.parametrize("style", STYLES)
def test_what_a_client_sends_behind_its_finished_is_served(style: Any, cert: str) -> None:
    """Its first line leaves with the last message of the handshake."""
    with running(made(style, cert)) as server:
        plain = socket.create_connection(server.server_address, timeout=WAIT_S)
        plain.sendall(b"tls\n")
        assert plain.recv(3) == b"go\n"
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context().wrap_bio(came, goes, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        plain.sendall(goes.read())
        while True:
            came.write(plain.recv(65_536))
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
        tls.write(b"one\n")
        tls.write(b"two\n")
        plain.sendall(goes.read())
        heard = b""
        while heard.count(b"\n") < 3:
            try:
                heard += tls.read(1000)
            except ssl.SSLWantReadError:
                came.write(plain.recv(65_536))
        assert heard == b"TLSv1.3 tls\nTLSv1.3 one\nTLSv1.3 two\n"
        plain.close()
        assert sum(endings(server).values()) == 1


@pytest.mark.parametrize("style", STYLES)
def test_input_that_comes_before_the_handshake_is_refused(style: Any, cert: str) -> None:
    with running(made(style, cert)) as server, Client(server.server_address) as client:
        client.send(b"tls\nrset\n")
        assert client.line() == b"go\n"
        with contextlib.suppress(ConnectionError):
            assert client.rest() == b""
        assert endings(server) == {"error": 1}


def test_a_handler_may_go_on_in_plain_after_it_has_refused(cert: str) -> None:
    class Tells(Secures):
        async def failed(self, error: Exception) -> None:
            await self.send(f"{type(error).__name__}\n".encode())

    with running(made(Tells, cert)) as server, Client(server.server_address) as client:
        assert client.send(b"tls\nplain\n").end().rest() == b"go\nPeerError\nplain\n"
        assert endings(server) == {"done": 1}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("leaves", ["end of file", "reset", "half a record", "no TLS"])
def test_a_client_that_leaves_in_mid_handshake(style: Any, leaves: str, cert: str) -> None:
    with running(made(style, cert)) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        if leaves == "reset":
            client.reset()
        else:
            said = {"half a record": b"\x16\x03\x01\x02\0\1", "no TLS": b"GET / HTTP/1.0\r\n\r\n"}.get(leaves, b"")
            with contextlib.suppress(OSError):  # the server may have gone already
                client.send(said).end()
                client.rest()
        assert endings(server) == {"reset": 1}


@pytest.mark.parametrize("leaves", ["end of file", "no TLS", "silent"])
def test_after_a_failed_handshake_a_handler_sees_the_end_and_nothing_is_sent(leaves: str, cert: str) -> None:
    errors: list[Exception] = []

    class Notes(Secures):
        async def failed(self, error: Exception) -> None:
            errors.append(error)
            await self.send(b"in the clear")

    with running(made(Notes, cert, timeout_s=0.05)) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        if leaves != "silent":
            with contextlib.suppress(OSError):  # the server may have gone already
                client.send(b"x" * 1000 * (leaves == "no TLS")).end()
        with contextlib.suppress(ConnectionError):
            assert b"in the clear" not in client.rest()
        assert endings(server) in ({"done": 1}, {"timeout": 1})
    [error] = errors
    assert isinstance(error, TimeoutError if leaves == "silent" else ConnectionError)


@pytest.mark.parametrize("style", STYLES)
def test_a_silent_handshake_ends_by_the_limit(style: Any, cert: str) -> None:
    with running(made(style, cert), handshake_timeout_s=0.05) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        assert client.rest() == b""
        assert endings(server) == {"timeout": 1}


def test_one_of_several_wants_may_end_a_handshake(cert: str) -> None:
    arrived: list[Arrived] = []

    class Impatient(AsyncRequestHandler):
        async def handle(self) -> None:
            seconds = float(await self.read(line()))
            await self.send(b"go\n")
            arrived.append(await self.read(either(start_tls(cert=cert), sleep(seconds))))
            await self.send(b"in the clear")

    with running(Impatient) as server:
        with Client(server.server_address) as client:
            assert client.send(b"0.05\n").rest() == b"go\n"
        with Client(server.server_address) as client:
            assert client.ask(b"20\n") == b"go\n"
            begin_tls(client)
            assert client.rest() == b"in the clear"
    assert arrived == [Arrived(1, None), Arrived(0, None)]


def test_a_request_that_is_cancelled_in_mid_handshake(cert: str) -> None:
    with running(made(Secures, cert)) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        client.send(b"\x16\x03\x01\x02\0\1")
        wait_until(server, lambda: [row["state"] for row in server.table.snapshot()] == ["WAITING"])
        for entry in server.table:
            server.table.cancel(entry.id)
        with contextlib.suppress(ConnectionError):
            assert client.rest() == b""
        assert endings(server) == {"cancelled": 1}


def test_a_connection_is_not_encrypted_twice(cert: str) -> None:
    class Tells(Secures):
        async def failed(self, error: Exception) -> None:
            await self.send(f"{error}\n".encode())

    with running(made(Tells, cert)) as server, Client(server.server_address) as client:
        client.ask(b"tls\n")
        begin_tls(client)
        client.line()
        assert client.ask(b"tls\n") == b"go\n"
        assert client.line() == b"start_tls(): the connection is encrypted already\n"
        assert client.ask(b"on\n") == b"TLSv1.3 on\n"


def test_the_log_has_the_line_that_asked_to_encrypt_twice(cert: str, caplog: pytest.LogCaptureFixture) -> None:
    with running(made(SecuresByStates, cert)) as server, Client(server.server_address) as client:
        client.ask(b"tls\n")
        begin_tls(client)
        client.line()
        assert client.ask(b"tls\n") == b"go\n"
        assert client.rest() == b""
        assert endings(server) == {"error": 1}
    [said] = [each.getMessage() for each in caplog.records if "encrypted already" in each.getMessage()]
    assert re.search(rf"already, in SecuresByStates\.command \({re.escape(__file__)}:\d+\)$", said)


def test_exercise_refuses_to_encrypt_twice() -> None:
    class Always(StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Transition:
            return self.secured, start_tls(cert=text.decode())

        @state()
        def secured(self, _: None) -> Transition:
            return self.command

    tried = exercise(Always).send(b"tls\n")
    assert tried.is_encrypted
    with pytest.raises(reqtable.HandlerError, match="the connection is encrypted already"):
        tried.send(b"tls\n")


@pytest.mark.parametrize("bad", ["missing", "no key"])
def test_a_certificate_that_can_not_be_used(bad: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "server.pem"
    if bad == "no key":
        path.write_text("-----BEGIN CERTIFICATE-----\n")
    with running(made(Secures, str(path))) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        assert client.rest() == b""
        assert endings(server) == {"error": 1}
    assert f"start_tls(): cert {path}" in caplog.text
    assert f", in Secures.handle ({__file__}:" in caplog.text
    assert "tls.cert" not in caplog.text


def test_what_others_send_meanwhile_is_encrypted(cert: str) -> None:
    entered = threading.Event()

    class Chatty(AsyncRequestHandler):
        async def handle(self) -> None:
            if await self.read(line()) == b"tls\n":
                entered.set()
                await self.read(start_tls(cert=cert))
                await self.send(b"after\n")
                await self.read(line())
            else:
                for entry in self.server.table:
                    if entry.handler is not self:
                        entry.handler.send(b"meanwhile\n")
                await self.send(b"sent\n")

    with running(Chatty) as server, Client(server.server_address) as client:
        client.send(b"tls\n")
        assert entered.wait(WAIT_S)
        wait_until(server, lambda: [row["state"] for row in server.table.snapshot()] == ["WAITING"])
        with Client(server.server_address) as other:
            assert other.ask(b"say\n") == b"sent\n"
        begin_tls(client)
        assert client.line() == b"meanwhile\n"
        assert client.line() == b"after\n"


def test_the_arguments_of_start_tls() -> None:
    for arguments in ({}, {"cert": "x", "context": server_context()}):
        with pytest.raises(ValueError, match=r"start_tls\(\) takes cert='server.pem'"):
            start_tls(**arguments)
    assert repr(start_tls(cert="x")) == "start_tls()"


def test_a_context_of_the_program(cert: str) -> None:
    context = server_context(client_certificate=True)
    before = context.sslsocket_class

    class Names(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(start_tls(context=context))
            await self.send(str(self.tls.getpeercert()["subjectAltName"]).encode())

    with running(Names) as server:
        with Client(server.server_address) as client:
            begin_tls(client, certificate=True)
            assert client.rest() == b"(('email', 'ann@example.org'),)"
        with Client(server.server_address) as client, contextlib.suppress(OSError):
            begin_tls(client)
            assert client.rest() == b""
    assert context.sslsocket_class is before


# -- outgoing connections --------------------------------------------------------------------------------------------


def secured(own: socket.socket, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    return (context or server_context()).wrap_socket(own, server_side=True)


def tls_echo(own: socket.socket) -> None:
    with secured(own) as tls:
        while data := tls.recv(65_536):
            tls.sendall(data)
        tls.unwrap()


def starttls_echo(own: socket.socket) -> None:
    """Answers a line, begins TLS, and then echoes."""
    while not own.recv(100).endswith(b"\n"):
        pass
    own.sendall(b"go\n")
    tls_echo(own)


class Relays(AsyncRequestHandler):
    """Connects, and passes on lines and answers. The first answer says how it went."""

    target: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    later: ClassVar[dict[str, Any] | None] = None
    timeout_s: ClassVar[float | None] = None

    async def handle(self) -> None:
        try:
            upstream = await self.read(connect(self.target, **self.options))
            if self.later is not None:
                upstream.send(b"starttls\n")
                await self.read(upstream.line())
                await self.read(upstream.start_tls(**self.later), timeout=self.timeout_s)
        except (ConnectFailed, TimeoutError) as error:
            await self.send(f"{type(error).__name__}: {getattr(error, 'reason', error)}\n".encode())
            return
        await self.send(f"{upstream.tls and upstream.tls.version()}\n".encode())
        while text := await self.read(line()):
            await upstream.send(text)
            await self.send(await self.read(upstream.line()))


class RelaysByStates(StateRequestHandler):
    """Does the same as a state machine."""

    target: ClassVar[str]
    options: ClassVar[dict[str, Any]]
    later: ClassVar[dict[str, Any] | None] = None
    upstream: Any = None

    def start(self) -> Transition:
        return self.connected, connect(self.target, **self.options)

    @state()
    def connected(self, upstream: Any) -> Transition:
        self.upstream = upstream
        if self.later is None:
            return self.ready(None)
        upstream.send(b"starttls\n")
        return self.answered, upstream.line()

    @state()
    def answered(self, _: bytes) -> Transition:
        assert self.later is not None
        return self.ready, self.upstream.start_tls(**self.later)

    @state()
    def ready(self, _: None) -> Transition:
        self.send(f"{self.upstream.tls and self.upstream.tls.version()}\n".encode())
        return self.ask

    @state(line())
    def ask(self, text: bytes) -> Transition:
        self.upstream.send(text)
        return self.answer, self.upstream.line()

    @state()
    def answer(self, text: bytes) -> Transition:
        self.send(text)
        return self.ask

    def on_error(self, error: Exception) -> Transition:
        assert isinstance(error, ConnectFailed)
        self.send(f"ConnectFailed: {error.reason}\n".encode())


RELAYS = [Relays, RelaysByStates]


def relaying(style: Any, upstream: Upstream, later: Any = None, scheme: str = "tls", **options: Any) -> Any:
    target = upstream.target if later is not None else upstream.target.replace("tcp", scheme)
    return type(style.__name__, (style,), {"target": target, "options": options, "later": later})


@pytest.fixture
def ca(tmp_path: Path, cert: str) -> str:
    return str(tmp_path / "ca.pem")


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "pool", "thread"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("style", RELAYS)
def test_an_outgoing_connection_is_encrypted(style: Any, later: bool, dispatch: str, ca: str) -> None:
    if dispatch == "pool" and style is Relays:
        pytest.skip("a coroutine runs in one thread")
    with Upstream(starttls_echo if later else tls_echo) as upstream:
        handler = relaying(style, upstream, {"ca": ca}) if later else relaying(style, upstream, ca=ca)
        with running(handler, dispatch) as server, Client(server.server_address) as client:
            assert client.line() == b"TLSv1.3\n"
            long = b"y" * 60_000 + b"\n"
            for _ in range(3):
                assert client.send(long).receive(len(long)) == long
            client.end()
            assert client.rest() == b""


REASONS = {
    "untrusted": r"its certificate can't be trusted: (self-signed certificate in .*|unable to get local .*)",
    "wrong name": r"its certificate can't be trusted: Hostname mismatch.*other\.example\.org.*",
    "not TLS": r"TLS handshake: .+",
    "leaves": r"the connection ended before the TLS handshake was complete",
    "missing ca": r"ca '/nowhere': no such file or directory: give certificates as PEM",
}


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("problem", REASONS)
@pytest.mark.parametrize("style", RELAYS)
def test_why_a_handshake_fails(style: Any, problem: str, later: bool, ca: str) -> None:
    def talk(own: socket.socket) -> None:
        if later:
            own.recv(100)
            own.sendall(b"go\n")
        if problem == "not TLS":
            own.recv(10)
            own.sendall(b"220 hello, this is no TLS\r\n" * 10)
            own.recv(10_000)
        elif problem == "leaves":
            own.recv(10_000)
            own.shutdown(socket.SHUT_RDWR)
        else:
            secured(own)

    options: dict[str, Any] = {"ca": ca}
    if problem == "untrusted":
        options = {}
    elif problem == "wrong name":
        options["server_name"] = "other.example.org"
    elif problem == "missing ca":
        options["ca"] = "/nowhere"
        if later:
            pytest.skip("it is a ConfigurationError there: see below")
    with Upstream(talk) as upstream:
        handler = relaying(style, upstream, options) if later else relaying(style, upstream, **options)
        with running(handler) as server, Client(server.server_address) as client:
            answer = client.line().decode()
            prefix, _, reason = answer.strip().partition(": ")
            assert prefix == "ConnectFailed"
            assert re.fullmatch(REASONS[problem], reason), reason
            assert client.rest() == b""
            if not later:
                assert server.table.connection_counts["failed"] == 1


def test_what_the_options_do(tmp_path: Path, ca: str) -> None:
    def talk(own: socket.socket) -> None:
        context = server_context(client_certificate=True)
        context.set_alpn_protocols(["two"])
        with secured(own, context) as tls:
            names = tls.getpeercert()["subjectAltName"]  # type: ignore[index]
            tls.sendall(f"{tls.selected_alpn_protocol()} {names}\n".encode())
            tls.unwrap()

    own = write_certificate(tmp_path, "client.example.org")

    class Looks(AsyncRequestHandler):
        async def handle(self) -> None:
            up = await self.read(connect(target, ca=ca, cert=own, alpn=("one", "two"), server_name="127.0.0.1"))
            await self.send(up.tls.selected_alpn_protocol().encode() + b" " + await self.read(up.line()))

    class Trusts(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(connect(target, verify=False, cert=own, server_name="whatever.example.org"))
            await self.send(b"ok\n")

    class OwnContext(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(connect(target, context=client_context(certificate=True)))
            await self.send(b"ok\n")

    with Upstream(talk) as upstream:
        target = upstream.target.replace("tcp", "tls")
        with running(Looks) as server, Client(server.server_address) as client:
            assert client.rest() == b"two two (('DNS', 'client.example.org'),)\n"
        for handler in (Trusts, OwnContext):
            with running(handler) as server, Client(server.server_address) as client:
                assert client.rest() == b"ok\n"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_slow_handshake_is_given_up(later: bool, ca: str) -> None:
    def talk(own: socket.socket) -> None:
        if later:
            own.recv(100)
            own.sendall(b"go\n")
        while own.recv(10_000):
            pass

    with Upstream(talk) as upstream:
        for how in ("its own timeout", "the limit"):
            own = how == "its own timeout"
            handler = relaying(Relays, upstream, {"ca": ca}) if later else relaying(Relays, upstream, ca=ca)
            if own and later:
                handler.timeout_s = 0.05
            elif own:
                handler.options["timeout"] = 0.05
            limit = {} if own else {"connect_timeout_s": 0.05}
            with running(handler, **limit) as server, Client(server.server_address) as client:
                answer = client.rest().decode()
                expected = "TimedOut: start_tls()" if later else "ConnectFailed: not connected within 0.05 s"
                assert answer.startswith(expected), answer


def test_a_client_that_leaves_while_its_request_shakes_hands(ca: str) -> None:
    waiting = threading.Event()

    def talk(own: socket.socket) -> None:
        own.recv(100)
        own.sendall(b"go\n")
        own.recv(10_000)
        waiting.set()
        own.recv(10_000)

    with Upstream(talk) as upstream, running(relaying(Relays, upstream, {"ca": ca})) as server:
        client = Client(server.server_address)
        assert waiting.wait(WAIT_S)
        client.reset()
        assert endings(server) == {"reset": 1}


@pytest.mark.parametrize("style", RELAYS)
def test_an_end_without_close_notify_is_the_end_of_file(style: Any, ca: str) -> None:
    """Nothing is unread, so nothing can have been cut off."""

    def talk(own: socket.socket) -> None:
        tls = secured(own)
        tls.recv(100)
        socket.socket.shutdown(tls, socket.SHUT_RDWR)
        tls.close()

    with Upstream(talk) as upstream:
        with running(relaying(style, upstream, ca=ca)) as server, Client(server.server_address) as client:
            assert client.line() == b"TLSv1.3\n"
            client.send(b"hello\n").end()
            assert client.rest() == b""
            assert endings(server) == {"done": 1}


def test_an_end_that_cuts_an_item_off_is_an_error(ca: str) -> None:
    def talk(own: socket.socket) -> None:
        tls = secured(own)
        tls.recv(100)
        tls.sendall(b"half a li")
        socket.socket.shutdown(tls, socket.SHUT_WR)
        tls.close()

    with Upstream(talk) as upstream:
        with running(relaying(Relays, upstream, ca=ca)) as server, Client(server.server_address) as client:
            assert client.line() == b"TLSv1.3\n"
            client.send(b"hello\n")
            assert client.rest() == b""
            assert endings(server) == {"upstream": 1}


class Forwards(AsyncRequestHandler):
    """Forwards both directions, over TLS on both sides."""

    target: ClassVar[str]
    cert: ClassVar[str]
    ca: ClassVar[str]

    async def handle(self) -> None:
        await self.read(start_tls(cert=self.cert))
        upstream = await self.read(connect(self.target, ca=self.ca))
        ended = 0
        while ended < 2:
            index, data = await self.read(either(chunk(), upstream.chunk()))
            if data:
                (self if index else upstream).send(data)
                continue
            ended += 1
            if index:
                await self.read(end_output())
            else:
                upstream.end_output()


@pytest.mark.timeout(60)
def test_a_forwarder_between_two_encrypted_sides_does_not_lock_up(cert: str, ca: str) -> None:
    """The upstream sends all it gets back and reads on only when that is taken, so both directions fill up."""
    size = 8 * 2**20
    with Upstream(tls_echo) as upstream:
        attributes = {"target": upstream.target.replace("tcp", "tls"), "cert": cert, "ca": ca}
        with running(type("Forwards", (Forwards,), attributes), high_water_bytes=20_000) as server:
            stream = TLSStream(server.server_address)
            data = os.urandom(2**16) * (size // 2**16)
            heard = bytearray()
            lock = threading.Lock()  # of the TLS state: one thread sends, and this one receives

            def take() -> None:
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                    while True:
                        heard.extend(stream.tls.read(2**16))

            def send() -> None:
                for start in range(0, size, 2**16):
                    with lock:
                        stream.tls.write(data[start : start + 2**16])
                        out = stream.goes.read()
                    stream.plain.sendall(out)

            sender = threading.Thread(target=send)
            sender.start()
            while len(heard) < size:
                came = stream.plain.recv(2**16)
                assert came, f"the end came after {len(heard)} bytes"
                with lock:
                    stream.came.write(came)
                    take()
            sender.join()
            assert bytes(heard) == data
            with contextlib.suppress(ssl.SSLWantReadError):
                stream.tls.unwrap()  # not before: input that comes during an `unwrap` is lost
            stream.plain.sendall(stream.goes.read())
            stream.close()


def test_an_encrypted_connection_is_not_reused_as_a_plain_one(ca: str) -> None:
    class Twice(AsyncRequestHandler):
        async def handle(self) -> None:
            for _ in range(2):
                up = await self.read(connect(target, reuse=True))
                up.send(b"starttls\n")
                await self.read(up.line())
                await self.read(up.start_tls(ca=ca))
                up.send(b"hello\n")
                await self.send(await self.read(up.line()))
                up.release()

    with Upstream(starttls_echo) as upstream:
        target = upstream.target
        with running(Twice) as server, Client(server.server_address) as client:
            assert client.rest() == b"hello\nhello\n"
            assert server.table.connection_counts["reused"] == 0


def test_start_tls_of_a_connection_that_can_not_have_it(ca: str) -> None:
    said: list[str] = []

    class Tries(AsyncRequestHandler):
        async def handle(self) -> None:
            tls = await self.read(connect(secure, ca=ca))
            closed = await self.read(connect(plain))
            closed.close()
            udp = await self.read(connect(datagrams))
            for each in (tls, closed, udp):
                try:
                    await self.read(each.start_tls(ca=ca))
                except reqtable.HandlerError as error:
                    said.append(str(error))
            tls.send(b"still here\n")
            await self.send(await self.read(tls.line()))

    with Upstream(tls_echo) as one, Upstream(echo) as two:
        secure, plain, datagrams = one.target.replace("tcp", "tls"), two.target, two.target.replace("tcp", "udp")
        with running(Tries) as server, Client(server.server_address) as client:
            assert client.rest() == b"still here\n"
    assert [each[:40] for each in said] == [
        "start_tls(): the connection is encrypted already"[:40],
        f"the connection to {plain} was closed or released"[:40],
        "start_tls() is for streams whose handler runs on the loop"[:40],
    ]


def test_a_limit_that_is_too_small_for_tls_is_refused(ca: str, cert: str) -> None:
    with Upstream(tls_echo) as upstream, running(relaying(Relays, upstream, ca=ca), recv_bytes=1000) as server:
        with Client(server.server_address) as client:
            assert client.rest() == b"ConnectFailed: limits.recv_bytes is 1000: TLS needs at least 16384\n"
    with running(made(Secures, cert), recv_bytes=1000) as server, Client(server.server_address) as client:
        assert client.ask(b"tls\n") == b"go\n"
        assert client.rest() == b""


def test_a_message_may_come_while_a_connection_is_encrypted(ca: str) -> None:
    class Patient(AsyncRequestHandler):
        async def handle(self) -> None:
            up = await self.read(connect(target))
            up.send(b"starttls\n")
            await self.read(up.line())
            self.tell(b"hello\n")
            await self.read(up.start_tls(ca=ca))
            up.send(b"over TLS\n")
            for _ in range(2):
                _, item = await self.read(either(told(), up.line()))
                await self.send(item)

    with Upstream(starttls_echo) as upstream:
        target = upstream.target
        with running(Patient) as server, Client(server.server_address) as client:
            assert client.rest() == b"hello\nover TLS\n"
