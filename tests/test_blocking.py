"""The blocking handler classes: their files, their attributes, and answers that arrive despite unread input.

Each program runs under all policies that accept it, and with the standard library's `socketserver` if possible.
"""

from __future__ import annotations

import array
import contextlib
import io
import queue
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import reqtable
from tests.support import WAIT_S, Client, serving, wait_until

ANY = ("127.0.0.1", 0)
both = pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
everywhere = pytest.mark.parametrize(
    ("lib", "options"),
    [
        pytest.param(socketserver, {}, id="socketserver"),
        pytest.param(reqtable, {"dispatch": "inline"}, id="inline"),
        pytest.param(reqtable, {"dispatch": "greenlet"}, id="greenlet"),
    ],
)


class Failures:
    """Keeps the errors passed to `handle_error`. Server classes of these tests derive from it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.failures: list[BaseException] = []
        super().__init__(*args, **kwargs)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.failures.append(sys.exc_info()[1])


def server_of(lib: ModuleType, handler: Any, **options: Any) -> Any:
    return type("Server", (Failures, lib.TCPServer), {})(ANY, handler, **options)


@contextlib.contextmanager
def serving_one(server: Any) -> Iterator[Client]:
    """Yield a client, while `handle_request()` serves it in a thread. Then wait for the thread and close the server."""
    with server, Client(server.server_address) as client:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield client
        client.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()


# -- without a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lib", [socketserver, reqtable])
@pytest.mark.parametrize(
    ("failing", "called"),
    [
        ((), ["setup", "handle", "finish"]),
        (("handle",), ["setup", "handle", "finish"]),
        (("handle", "finish"), ["setup", "handle", "finish"]),
        (("finish",), ["setup", "handle", "finish"]),
        (("setup",), ["setup"]),
    ],
)
def test_constructor_runs_the_request(lib: ModuleType, failing: tuple[str, ...], called: list[str]) -> None:
    """The request can be any object: the base class does not look at it."""
    seen: list[str] = []

    def hook(name: str) -> Any:
        def call(self: Any) -> None:
            assert (self.request, self.client_address, self.server) == ("request", "address", "server")
            seen.append(name)
            if name in failing:
                raise KeyError(name)

        return call

    handler = type("Handler", (lib.BaseRequestHandler,), {name: hook(name) for name in ("setup", "handle", "finish")})
    if failing:
        with pytest.raises(KeyError, match=failing[-1]):
            handler("request", "address", "server")
    else:
        handler("request", "address", "server")
    assert seen == called
    lib.BaseRequestHandler("request", "address", "server")


@pytest.mark.parametrize("lib", [socketserver, reqtable])
def test_datagram_handler_sends_one_answer(lib: ModuleType) -> None:
    class Answering(lib.DatagramRequestHandler):  # type: ignore[name-defined,misc]
        def handle(self) -> None:
            assert self.packet == self.rfile.read() == b"question"
            assert self.socket is own
            for part in (b"an", b"swer"):
                self.wfile.write(part)

    sent = []

    class Recording(socket.socket):
        def sendto(self, *args: Any) -> Any:
            sent.append(args)

    with Recording(socket.AF_INET, socket.SOCK_DGRAM) as own:
        Answering((b"question", own), ("host", 7), None)
    assert sent == [(b"answer", ("host", 7))]


# -- the files --------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("rbufsize", [-1, 0, 1, 16])
@pytest.mark.parametrize("wbufsize", [0, -1, 16])
def test_files_are_buffered_as_asked(lib: ModuleType, options: dict[str, str], rbufsize: int, wbufsize: int) -> None:
    """An unbuffered write sends before it returns. A buffered write waits for a flush or the handler's end."""
    seen: queue.Queue[Any] = queue.Queue()
    long = bytes(range(256)) * 16

    class Handler(lib.StreamRequestHandler):  # type: ignore[name-defined,misc]
        def handle(self) -> None:
            assert self.connection is self.request
            written = self.wfile.write(self.rfile.readline().upper())
            seen.put((written, self.wfile.writable(), self.wfile.fileno() == self.request.fileno()))
            seen.put(isinstance(self.rfile, io.BufferedReader))
            assert self.rfile.readline() == b"go on\n"
            self.wfile.writelines([b"a", b"bc\n"])
            self.wfile.flush()
            assert self.rfile.readline() == b"and on\n"
            self.wfile.write(long)

    Handler.rbufsize, Handler.wbufsize = rbufsize, wbufsize
    server = server_of(lib, Handler, **options)
    with serving_one(server) as client:
        client.send(b"hello\n")
        assert seen.get(timeout=WAIT_S) == (6, True, True)
        assert seen.get(timeout=WAIT_S) == (rbufsize != 0)
        if wbufsize:
            client.socket.settimeout(0)
            with pytest.raises(BlockingIOError):
                client.socket.recv(1)
            client.socket.settimeout(WAIT_S)
        else:
            assert client.line() == b"HELLO\n"
        client.send(b"go on\n")
        assert client.receive(4 + 6 * bool(wbufsize)) == (b"HELLO\n" if wbufsize else b"") + b"abc\n"
        client.send(b"and on\n")
        assert client.rest() == long
    assert server.failures == []


@both
def test_unbuffered_writer_counts_bytes_and_sends_them_all(dispatch: str) -> None:
    """The data can be any object with a buffer, and the client does not read yet."""
    numbers = array.array("I", range(500_000))

    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            assert self.wfile.write(numbers) == numbers.itemsize * len(numbers)
            assert self.wfile.write(memoryview(numbers)[:2]) == 2 * numbers.itemsize
            assert self.wfile.write(b"") == 0
            with pytest.raises(TypeError):
                self.wfile.write("text")
            assert not self.wfile.readable()

    with serving(server_of(reqtable, Handler, dispatch=dispatch)) as server, Client(server.server_address) as client:
        assert client.rest() == numbers.tobytes() + numbers[:2].tobytes()
        assert server.failures == []


@everywhere
def test_attributes_set_the_socket(lib: ModuleType, options: dict[str, str]) -> None:
    seen = []

    class Plain(lib.StreamRequestHandler):  # type: ignore[name-defined,misc]
        def handle(self) -> None:
            nagle = self.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            seen.append((self.request.gettimeout(), bool(nagle)))
            if self.timeout:
                self.rfile.readline()

    class Set(Plain):
        timeout = 0.05
        disable_nagle_algorithm = True

    for handler in (Plain, Set):
        with server_of(lib, handler, **options) as server, Client(server.server_address) as silent:
            server.handle_request()
            assert silent.rest() == b""
            failures = [(type(failure), str(failure)) for failure in server.failures]
            assert failures == ([] if handler is Plain else [(TimeoutError, "timed out")])
    assert seen == [(None, lib is reqtable), (0.05, True)]


@everywhere
@pytest.mark.parametrize("wbufsize", [0, 65_536])
def test_finish_of_a_peer_that_has_gone(lib: ModuleType, options: dict[str, str], wbufsize: int) -> None:
    """Output that can't be sent raises exactly one error, wherever it shows, and the connection is closed."""
    seen = []

    class Handler(lib.StreamRequestHandler):  # type: ignore[name-defined,misc]
        def handle(self) -> None:
            seen.append(self)
            assert self.rfile.read(1) == b"x"
            with pytest.raises(ConnectionResetError):
                self.rfile.read(1)
            self.wfile.write(b"answer")
            seen.append("written")

    Handler.wbufsize = wbufsize
    server = server_of(lib, Handler, **options)
    with serving_one(server) as client:
        client.send(b"x")
        client.reset()
    assert [type(failure) for failure in server.failures] == [BrokenPipeError]
    assert seen[1:] == (["written"] if wbufsize else [])
    assert seen[0].wfile.closed
    seen[0].rfile.close()
    assert seen[0].request.fileno() == -1


# -- closing ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("answer", [b"no, thank you\n", b"x" * 60_000], ids=["short", "long"])
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_unread_input_does_not_cut_off_the_answer(dispatch: str, answer: bytes, fails: bool) -> None:
    """Closing a connection with unread input resets it; the client must get its answer, then the end of file."""

    class Deaf(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(1)  # there is input, so that there is something unread when this ends
            self.wfile.write(answer)
            if fails:
                raise KeyError

    with serving(server_of(reqtable, Deaf, dispatch=dispatch)) as server, Client(server.server_address) as client:
        client.send(bytes(2**20))
        assert client.rest() == answer
        client.end()  # not reset yet, either
        wait_until(server, lambda: not len(server.table))
        assert len(server.failures) == fails
