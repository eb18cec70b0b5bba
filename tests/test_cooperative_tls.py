"""TLS in blocking handlers: the socket is wrapped in the handler, in `get_request`, or by a listening TLS socket.

The tests use real sockets, and `ssl` on both sides.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import queue
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable.dispatch.green.tls import CooperativeTLSSocket
from tests.certificates import AUTHORITY, TLSClient, begin_tls, server_context
from tests.support import WAIT_S, Client, open_descriptors, serving, wait_until

ANY = ("127.0.0.1", 0)
BIG = bytes(range(256)) * 65536  # 16 MiB: more than both kernels' buffers hold
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)  # the beginning of one


class Lines(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(text.upper())


class PatientLines(Lines):
    timeout = WAIT_S


class WrappingLines(Lines):
    def setup(self) -> None:
        self.request = server_context().wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()


class Failures(reqtable.TCPServer):
    """Keeps the errors that handlers raise."""

    request_queue_size = 64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failures: list[BaseException] = []
        super().__init__(*args, **kwargs)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        self.failures.append(error)


class InGetRequest(Failures):
    context = staticmethod(server_context)

    def get_request(self) -> tuple[Any, Any]:
        request, address = super().get_request()
        return self.context().wrap_socket(request, server_side=True), address


@contextlib.contextmanager
def served(where: str, handler: Any = Lines, **options: Any) -> Iterator[Any]:
    """Serve a TLS server in a thread. `where` says what wraps its sockets."""
    options.setdefault("dispatch", "greenlet")
    if where == "handler":
        server = Failures(ANY, WrappingLines, **options)
    elif where == "get_request":
        server = InGetRequest(ANY, handler, **options)
    else:
        server = Failures(ANY, handler, **options)
        server.socket = server_context().wrap_socket(server.socket, server_side=True)
    with serving(server):
        yield server


everywhere = pytest.mark.parametrize("where", ["listening socket", "get_request", "handler"])


@everywhere
def test_silent_and_half_shaken_clients_hold_up_nobody(where: str) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as stack, served(where) as server:
        for opening in [b""] * 10 + [CLIENT_HELLO[:3]] * 5 + [CLIENT_HELLO] * 5:
            stack.enter_context(Client(server.server_address)).send(opening)
        wait_until(server, lambda: len(server.table) == 20)
        with TLSClient(server.server_address) as first, TLSClient(server.server_address) as second:
            assert first.ask(b"one\n") == b"ONE\n"
            assert second.ask(b"two\n") == b"TWO\n"
            assert first.ask(b"three\n") == b"THREE\n"
        assert threading.active_count() == before + 1  # the one that this test serves in


PROGRAM = """
import ssl, sys, reqtable

class Lines(reqtable.StreamRequestHandler):
    def handle(self):
        for text in self.rfile:
            self.wfile.write(text.upper())

context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(sys.argv[1])
server = reqtable.TCPServer(("127.0.0.1", 0), Lines, dispatch=sys.argv[2])
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("dispatch", ["greenlet", "thread", "pool", "fork"])
def test_no_policy_but_inline_shakes_hands_while_it_accepts(dispatch: str, tmp_path: Path) -> None:
    """Runs in its own process: a child that is forked while another thread is in OpenSSL may wait for its locks."""
    certificate = AUTHORITY.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "server.pem"), dispatch]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with Client(address), Client(address) as half, Client(address):
            half.send(CLIENT_HELLO)
            with TLSClient(address) as client:
                assert client.ask(b"one\n") == b"ONE\n"
    finally:
        process.terminate()
        process.communicate()


@everywhere
def test_a_handshake_that_fails_ends_its_request_alone(where: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable")
    with served(where) as server:
        before = open_descriptors()
        with TLSClient(server.server_address) as honest:
            assert honest.ask(b"one\n") == b"ONE\n"
            for garbage in (b"GET / HTTP/1.0\r\n\r\n", bytes(1000), CLIENT_HELLO + b"\xff" * 600):
                with Client(server.server_address) as client:
                    with contextlib.suppress(OSError):  # the server may be the quicker one
                        client.send(garbage).end().rest()
            wait_until(server, lambda: len(server.table) == 1)
            with Client(server.server_address) as client:
                client.send(CLIENT_HELLO)
                wait_until(server, lambda: len(server.table) == 2)
                client.reset()
            with Client(server.server_address) as client:
                client.send(CLIENT_HELLO).end()
                client.rest()
            assert honest.ask(b"two\n") == b"TWO\n"
        wait_until(server, lambda: not server.table)
        assert open_descriptors() == before
        if where == "handler":
            assert len(server.failures) == 5
            assert all(isinstance(each, OSError) for each in server.failures)
        else:
            assert server.failures == []
            lines = [record.getMessage() for record in caplog.records]
            assert sum("its TLS handshake failed: " in each for each in lines) == 5


@everywhere
def test_both_ways_beyond_what_the_kernel_holds(where: str) -> None:
    with served(where) as server, TLSClient(server.server_address) as client:
        text = b"x" * len(BIG) + b"\n"
        assert client.send(text).receive(len(text)) == text.upper()
        (entry,) = server.table
        assert entry.bytes_in == entry.bytes_out == len(text)


def test_two_are_served_at_a_time_while_one_does_not_read() -> None:
    class Flood(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            if self.rfile.readline() == b"flood\n":
                self.wfile.write(BIG)

    with served("get_request", Flood) as server, TLSClient(server.server_address) as reader:
        reader.send(b"flood\n")
        wait_until(server, lambda: [entry.state for entry in server.table] == [reqtable.State.WRITING])
        with TLSClient(server.server_address) as other:
            assert other.send(b"\n").rest() == b""
        assert reader.rest() == BIG


def test_a_timeout_is_that_of_the_handshake_and_of_a_read() -> None:
    class Impatient(InGetRequest):
        def get_request(self) -> tuple[Any, Any]:
            request, address = super().get_request()
            request.settimeout(0.1)  # a handshake takes less
            return request, address

    class Once(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10)

    with serving(Impatient(ANY, Once, dispatch="greenlet")) as server:
        with Client(server.server_address) as silent:
            assert silent.rest() == b""
        assert server.failures == []
        with TLSClient(server.server_address) as client:
            assert client.rest() == b""
        assert [repr(failure) for failure in server.failures] == ["TimeoutError('timed out')"]


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.filterwarnings("ignore:unclosed")  # socketserver leaves it to the garbage, too
@pytest.mark.parametrize("in_get_request", [False, True], ids=["on connect", "by get_request"])
def test_a_handshake_that_times_out_is_a_line_and_closes_the_connection(
    dispatch: str, in_get_request: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reqtable")

    class Wrapping(Failures):
        def get_request(self) -> tuple[Any, Any]:
            request, address = super().get_request()
            request.settimeout(0.3)
            at_once = not in_get_request
            request = server_context().wrap_socket(request, server_side=True, do_handshake_on_connect=at_once)
            if in_get_request:
                request.do_handshake()
            return request, address

    gc.collect()
    gc.disable()  # nobody else closes what nobody holds
    try:
        with serving(Wrapping(ANY, PatientLines, dispatch=dispatch)) as server:
            with Client(server.server_address) as silent:
                assert silent.rest() == b""
            with TLSClient(server.server_address) as client:
                assert client.ask(b"hello\n") == b"HELLO\n"
            wait_until(server, lambda: not server.table)
    finally:
        gc.enable()
    assert server.failures == []
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert "timed out" in line
    assert "\n" not in line


def perform(operation: Any, dispatch: str = "greenlet") -> Any:
    """Run `operation` on a request in its handler. Yields the TLS client, and a function that returns the result."""
    results: queue.Queue[Any] = queue.Queue()

    class Operating(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            try:
                results.put(operation(self.request))
            except BaseException as error:
                results.put(error)

    @contextlib.contextmanager
    def performing() -> Iterator[Any]:
        with served("get_request", Operating, dispatch=dispatch) as server, TLSClient(server.server_address) as client:
            yield client, lambda: results.get(timeout=WAIT_S)

    return performing()


def test_calls_are_as_those_of_a_plain_tls_socket() -> None:
    def operation(own: Any) -> Any:
        seen: list[Any] = [isinstance(own, ssl.SSLSocket), own.version(), own.gettimeout(), own.pending()]
        for call in (
            lambda: own.recv(1, socket.MSG_PEEK),
            lambda: own.sendmsg([b"x"]),
            own.dup,
            lambda: own.recvmsg(1),
        ):
            with pytest.raises((ValueError, NotImplementedError)) as refused:
                call()
            seen.append(refused.type)
        own.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError):
            own.recv(1)
        own.settimeout(None)
        own.sendall(b"go\n")
        buffer = bytearray(10)
        seen.append((own.recv_into(buffer, 4), bytes(buffer[:4])))
        with own.makefile("rwb") as file:
            seen.append(file.readline())
            file.write(b"by a file\n")
        seen.append(own.read(5))
        own.sendall(b"all\n")
        return seen

    with perform(operation) as (client, result):
        assert client.line() == b"go\n"
        client.send(b"four")
        client.send(b"a line\n")
        assert client.line() == b"by a file\n"
        client.send(b"12345")
        assert client.line() == b"all\n"
        refusals = [ValueError, NotImplementedError, NotImplementedError, NotImplementedError]
        assert result() == [True, "TLSv1.3", None, 0, *refusals, (4, b"four"), b"a line\n", b"12345"]


def test_sendfile(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(BIG)

    def operation(own: Any) -> Any:
        with path.open("rb") as file:
            return own.sendfile(file)

    with perform(operation) as (client, result):
        assert client.rest() == BIG
        assert result() == len(BIG)


@pytest.mark.parametrize("dispatch", ["greenlet", "thread"])
def test_tls_may_begin_and_end_in_mid_request(dispatch: str) -> None:
    class StartTLS(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            assert self.rfile.readline() == b"STARTTLS\n"
            self.wfile.write(b"ok\n")
            secure = server_context().wrap_socket(self.request, server_side=True)
            with secure.makefile("rb", buffering=0) as file:
                secure.sendall(file.readline().upper())
            plain = secure.unwrap()
            plain.sendall(b"plain again: " + plain.recv(100))
            plain.close()

    with serving(reqtable.TCPServer(ANY, StartTLS, dispatch=dispatch)) as server:
        with Client(server.server_address) as client:
            assert client.ask(b"STARTTLS\n") == b"ok\n"
            begin_tls(client)
            assert client.ask(b"secret\n") == b"SECRET\n"
            client.socket = client.socket.unwrap()  # type: ignore[attr-defined]
            assert client.send(b"open\n").rest() == b"plain again: open\n"


@pytest.mark.parametrize("hook", ["verify_request", "setup"])
def test_a_clients_certificate_is_there_for_whoever_asks(hook: str) -> None:
    names = []

    def note(request: Any) -> None:
        names.append(dict(field[0] for field in request.getpeercert()["subject"])["organizationName"])

    class Server(InGetRequest):
        @staticmethod
        def context() -> ssl.SSLContext:
            return server_context(True)

        def verify_request(self, request: Any, client_address: Any) -> bool:
            if hook == "verify_request":
                note(request)
            return True

    class Handler(Lines):
        def setup(self) -> None:
            if hook == "setup":
                note(self.request)
            super().setup()

    with serving(Server(ANY, Handler, dispatch="greenlet")) as server, TLSClient(server.server_address, True) as client:
        assert client.ask(b"hello\n") == b"HELLO\n"
        assert len(names) == 1
        assert names[0].startswith("trustme")


def test_another_thread_may_use_the_socket() -> None:
    def operation(own: Any) -> Any:
        got: list[bytes] = []

        def work() -> None:
            got.append(own.recv(100))
            own.sendall(BIG)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return got

    with perform(operation) as (client, result):
        client.send(b"hello")
        assert client.receive(len(BIG)) == BIG
        assert result() == [b"hello"]


def test_a_connection_of_the_handlers_own_is_shaken_at_once() -> None:
    """An example is the data connection of FTPS. It is no request, so its handshake blocks the loop, as documented."""
    seen = []

    class Data(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            with socket.create_server(ANY) as listening:
                self.wfile.write(b"%d\n" % listening.getsockname()[1])
                connection, _ = listening.accept()
                with server_context().wrap_socket(connection, server_side=True) as secure:
                    seen.append((type(secure), secure.version()))

    with served("get_request", Data) as server, TLSClient(server.server_address) as client:
        with TLSClient(("127.0.0.1", int(client.line()))) as data:
            assert data.rest() == b""
    assert seen == [(ssl.SSLSocket, "TLSv1.3")]


def test_who_hands_requests_to_threads_of_its_own_finds_the_handshake_done() -> None:
    class OwnThreads(InGetRequest):
        def process_request(self, request: Any, client_address: Any) -> None:
            def serve() -> None:
                self.finish_request(request, client_address)
                self.shutdown_request(request)

            threads.append(threading.Thread(target=serve))
            threads[0].start()

    class Asks(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            own: Any = self.request
            self.wfile.write(f"{own.version()} {own.cipher()[1]} {own.selected_alpn_protocol()}\n".encode())

    threads: list[threading.Thread] = []
    with serving(OwnThreads(ANY, Asks, dispatch="greenlet")) as server, TLSClient(server.server_address) as client:
        assert client.rest() == b"TLSv1.3 TLSv1.3 None\n"
        threads[0].join()


def test_everyone_elses_tls_sockets_are_what_they_were() -> None:
    with served("get_request") as server, TLSClient(server.server_address) as client:
        assert type(client.socket) is ssl.SSLSocket
        assert client.ask(b"a\n") == b"A\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wrapped = server_context().wrap_socket(ours, server_side=True, do_handshake_on_connect=False)
        assert type(wrapped) is ssl.SSLSocket
        wrapped.close()
    assert not issubclass(CooperativeTLSSocket.plain, ssl.SSLSocket)
