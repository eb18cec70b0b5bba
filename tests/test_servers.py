"""The server classes: hooks and their order, single requests, serving, stopping, draining, several servers on a loop.


If the standard library's `socketserver` can run the same program, the same test runs it there. Most tests serve in
their own thread, after the clients' bytes have reached the kernel, so no result depends on speed.
"""

from __future__ import annotations

import functools
import http.client
import inspect
import logging
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import reqtable
from reqtable import ConfigurationError, Engine, System
from reqtable.loop.platform import SYSTEM
from reqtable.loop.process import Process
from tests.certificates import write_certificate
from tests.support import WAIT_S, Client, serving, wait_until

AT_ONCE_S = 1.0
ANY = ("127.0.0.1", 0)
both = pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
# a library and its options: the standard library, or reqtable under a policy
everywhere = pytest.mark.parametrize(
    ("lib", "options"),
    [
        pytest.param(socketserver, {}, id="socketserver"),
        pytest.param(reqtable, {"dispatch": "inline"}, id="inline"),
        pytest.param(reqtable, {"dispatch": "greenlet"}, id="greenlet"),
    ],
)


class Lines(reqtable.StreamRequestHandler):
    """Echoes lines in upper case. The server's `commands` maps some lines to functions to call first."""

    def handle(self) -> None:
        for text in self.rfile:
            getattr(self.server, "commands", {}).get(text, bool)()
            self.wfile.write(text.upper())


class OneLine(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


class Length(reqtable.DatagramRequestHandler):
    """Answers with the length of the datagram. Writes nothing for an empty datagram."""

    def handle(self) -> None:
        if self.packet:
            self.wfile.write(b"%d" % len(self.rfile.read()))


def serve_until(server: Any, condition: Callable[[], bool]) -> None:
    """Serve in this thread until `condition()` holds after a pass."""
    server.service_actions = lambda: server.shutdown() if condition() else None
    server.serve_forever()
    del server.service_actions


def has_read(server: Any, *counts: int) -> Callable[[], bool]:
    """Return a condition: the requests in the table have read exactly these numbers of bytes."""
    return lambda: sorted(entry.bytes_in for entry in server.table) == sorted(counts)


def is_answered(client: Client) -> bool:
    """Return whether bytes or an end of file have arrived at the client."""
    return bool(select.select([client.socket], [], [], 0)[0])


def started(target: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


@pytest.fixture
def unix_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a path that is short enough for a Unix socket."""
    monkeypatch.chdir(tmp_path)
    return "s"


# -- the hooks --------------------------------------------------------------------------------------------------------

BUG = ValueError("a bug")
TAKEN = ["_handle_request_noblock", "get_request", "verify_request"]
BEGUN = [*TAKEN, "process_request", "finish_request"]
HANDLED = [*BEGUN, "setup", "handle", "finish"]
ENDED = ["shutdown_request", "close_request"]
FAILED = ["handle_error", *ENDED]

# case: (what the hooks raise or return, the hooks that are called, the error that propagates)
CASES: dict[str, tuple[dict[str, Any], list[str], type[BaseException] | None]] = {
    "success": ({}, [*HANDLED, *ENDED], None),
    "handle raises": ({"handle": BUG}, [*HANDLED, *FAILED], None),
    "handle exits": ({"handle": SystemExit()}, [*HANDLED, *ENDED], SystemExit),
    "handle is interrupted": ({"handle": KeyboardInterrupt()}, [*HANDLED, *ENDED], KeyboardInterrupt),
    "handle and finish raise": ({"handle": KeyError(), "finish": BUG}, [*HANDLED, *FAILED], None),
    "handle_error raises": ({"handle": KeyError(), "handle_error": BUG}, [*HANDLED, *FAILED], ValueError),
    "handle_error exits": ({"handle": BUG, "handle_error": SystemExit()}, [*HANDLED, *FAILED], SystemExit),
    "setup raises": ({"setup": BUG}, [*BEGUN, "setup", *FAILED], None),
    "setup exits": ({"setup": SystemExit()}, [*BEGUN, "setup", *ENDED], SystemExit),
    "finish_request raises": ({"finish_request": BUG}, [*BEGUN, *FAILED], None),
    "process_request raises": ({"process_request": BUG}, [*BEGUN[:-1], *FAILED], None),
    "process_request exits": ({"process_request": SystemExit()}, [*BEGUN[:-1], *ENDED], SystemExit),
    "verify_request says no": ({"verify_request": False}, [*TAKEN, *ENDED], None),
    "verify_request raises": ({"verify_request": BUG}, TAKEN, ValueError),
    "get_request has none": ({"get_request": OSError()}, TAKEN[:-1], None),
    "get_request raises": ({"get_request": BUG}, TAKEN[:-1], ValueError),
}


class Program:
    """Runs a server that notes which hooks are called. `run` serves one client with one `handle_request()`."""

    def __init__(self, case: str) -> None:
        self.faults, self.expected, _ = CASES[case]
        self.hooks: list[str] = []
        self.reported: list[type[BaseException] | None] = []
        self.raised: type[BaseException] | None = None
        self.answer: bytes | None = None
        self.left = 0

    def run(self, lib: ModuleType, late: bool = False, **options: Any) -> Program:
        accepted: list[socket.socket] = []
        server = self._server(lib, accepted)(ANY, self._handler(lib), **options)
        with server, Client(server.server_address) as client:
            unsent = [b"hello\n"] if "setup" in self.expected else []

            def send() -> None:
                while unsent:
                    client.send(unsent.pop()).end()

            if late:
                server.service_actions = send  # by then the request has begun, and waits
            else:
                send()
            try:
                server.handle_request()
            except BaseException as error:
                self.raised = type(error)
            if lib is reqtable:
                self.left = sum(entry.state is not reqtable.State.LINGERING for entry in server.table)
                self.answer = client.rest() if "shutdown_request" in self.hooks else None
            for each in accepted:
                each.close()  # there are cases in which no hook is to
        return self

    def _hook(self, base: type, name: str) -> Callable[..., Any]:
        def hook(this: Any, *args: Any) -> Any:
            self.hooks.append(name)
            fault = self.faults.get(name)
            result = getattr(base, name)(this, *args) if fault is None or name in ("handle", "finish") else fault
            if isinstance(fault, BaseException):
                raise fault
            return result

        return hook

    def _server(self, lib: ModuleType, accepted: list[socket.socket]) -> Any:
        program = self

        class Base(lib.TCPServer):  # type: ignore[name-defined,misc]
            def get_request(self) -> Any:
                request, address = super().get_request()
                accepted.append(request)
                return request, address

            def handle_error(self, request: Any, client_address: Any) -> None:
                program.reported.append(sys.exc_info()[0])
                request.sendall(b"sorry\n")

        names = [*BEGUN, *FAILED]
        return type("Server", (Base,), {name: self._hook(Base, name) for name in names})

    def _handler(self, lib: ModuleType) -> Any:
        class Base(lib.StreamRequestHandler):  # type: ignore[name-defined,misc]
            def handle(self) -> None:
                self.wfile.write(self.rfile.readline().upper())

        return type("Handler", (Base,), {name: self._hook(Base, name) for name in ("setup", "handle", "finish")})


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{'-'.join(map(str, options.values()))}")
        for case in CASES
        for options in ({"dispatch": "inline"}, {"dispatch": "greenlet"}, {"dispatch": "greenlet", "late": True})
        if "late" not in options or "handle" in CASES[case][1]
    ],
)
def test_hooks_are_called_as_by_socketserver(case: str, options: dict[str, Any]) -> None:
    faults, hooks, raised = CASES[case]
    ours = Program(case).run(reqtable, **options)
    assert (ours.hooks, ours.raised, ours.left) == (hooks, raised, 0)

    theirs = Program(case).run(socketserver)
    # the one difference: there the request is left to the garbage collector
    assert theirs.hooks == (hooks[:-2] if "handle_error" in faults else hooks)
    assert (theirs.reported, theirs.raised) == (ours.reported, raised)

    if "shutdown_request" in hooks:
        answer = b"HELLO\n" if "handle" in hooks else b""
        apology = b"sorry\n" if "handle_error" in hooks and "handle_error" not in faults else b""
        assert ours.answer == answer + apology


@both
def test_what_propagates_ends_serve_forever_and_no_request_but_its_own(dispatch: str) -> None:
    """The other requests are served when the server serves again. `shutdown` does not wait for the ended loop."""

    class Exits(OneLine):
        def handle(self) -> None:
            super().handle()
            raise SystemExit(3)

    with reqtable.TCPServer(ANY, Exits, dispatch=dispatch) as server, Client(server.server_address) as first:
        second = Client(server.server_address)
        for client in (first, second):
            client.send(b"hello\n").end()
        for client in (first, second):
            with pytest.raises(SystemExit):
                server.serve_forever()
            assert client.rest() == b"HELLO\n"
            assert len(server.table) == 0
        server.shutdown()
        second.close()


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread"])
def test_an_oserror_of_get_request_is_a_line_and_does_not_end_serving(
    dispatch: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reqtable")

    class Refusing(reqtable.TCPServer):
        refusals = 3

        def get_request(self) -> Any:
            request, address = super().get_request()
            if self.refusals:
                self.refusals -= 1
                request.close()
                raise OSError("not this one")
            return request, address

    with serving(Refusing(ANY, OneLine, dispatch=dispatch)) as server:
        for _ in range(Refusing.refusals):
            with Client(server.server_address) as refused:
                assert refused.rest() == b""
        with Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"HELLO\n"
    line = f"127.0.0.1:{server.server_address[1]}: get_request raised OSError: not this one"
    assert [record.getMessage() for record in caplog.records] == [line] * Refusing.refusals


# -- the surface ------------------------------------------------------------------------------------------------------

SERVERS = ["BaseServer", "TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"]
HANDLERS = ["BaseRequestHandler", "StreamRequestHandler", "DatagramRequestHandler"]


def takes_what(ours: Any, theirs: Any) -> bool:
    """Return whether `ours` accepts all arguments that `theirs` accepts, with the same meaning."""
    mine = list(inspect.signature(ours).parameters.values())
    wanted = list(inspect.signature(theirs).parameters.values())
    same = [(p.name, p.kind, p.default) for p in mine[: len(wanted)]] == [(p.name, p.kind, p.default) for p in wanted]
    return same and all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in mine[len(wanted) :])


@pytest.mark.parametrize("name", SERVERS + HANDLERS)
def test_class_has_what_socketserver_has(name: str) -> None:
    ours, theirs = getattr(reqtable, name), getattr(socketserver, name)
    bases = [base.__name__ for base in ours.__mro__]
    assert [base for base in bases if hasattr(socketserver, base)] == [base.__name__ for base in theirs.__mro__[:-1]]
    for attribute, value in inspect.getmembers(theirs):
        if attribute.startswith("__") and attribute not in ("__init__", "__enter__", "__exit__"):
            continue
        if callable(value):
            assert takes_what(getattr(ours, attribute), value), attribute
        else:
            assert getattr(ours, attribute) == value, attribute
    if name in SERVERS:
        bound = {"bind_and_activate": False} if name != "BaseServer" else {}
        their, our = theirs(ANY, Length, **bound), ours(ANY, Length, **bound)
        for server in (their, our):
            assert (server.server_address, server.RequestHandlerClass) == (ANY, Length)
            server.server_close()
        assert {*vars(their)} <= {*vars(our)}


# -- sockets ----------------------------------------------------------------------------------------------------------


@everywhere
def test_closing_and_binding(lib: ModuleType, options: dict[str, str]) -> None:
    """Binds by hand. The context manager closes the server, which then has no descriptor and serves nothing."""

    class Reusing(lib.TCPServer):  # type: ignore[name-defined,misc]
        allow_reuse_address = True
        allow_reuse_port = True

    for cls, reuses in ((lib.TCPServer, 0), (Reusing, 1)):  # the second one has served when it is closed
        with cls(ANY, OneLine, bind_and_activate=False, **options) as server:
            assert server.socket.getsockname()[1] == 0
            assert server.fileno() == server.socket.fileno() > 0
            server.server_bind()
            assert server.server_address == server.socket.getsockname() != ANY
            assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
            server.server_activate()
            assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                assert server.socket.getsockopt(socket.SOL_SOCKET, option) == reuses
            if reuses:
                server.timeout = 0
                server.handle_request()
        assert server.fileno() == -1
        with pytest.raises(ValueError, match=r"."):
            server.handle_request()
        server._BaseServer__shutdown_request = True  # were it to serve, it would end at once
        with pytest.raises(ValueError, match=r"."):
            server.serve_forever()
        server.server_close()


@everywhere
@pytest.mark.parametrize("fails", ["server_bind", "server_activate"])
def test_constructor_that_fails_closes_what_it_opened(lib: ModuleType, options: dict[str, str], fails: str) -> None:
    made = []

    def fail(self: Any) -> None:
        made.append(self)
        raise KeyboardInterrupt

    failing = type("Failing", (lib.TCPServer,), {fails: fail})
    with pytest.raises(KeyboardInterrupt):
        failing(ANY, OneLine, **options)
    assert made[0].fileno() == -1
    with lib.TCPServer(ANY, OneLine, **options) as server, pytest.raises(OSError, match="in use"):
        lib.TCPServer(server.server_address, OneLine, **options)


@pytest.mark.parametrize("named", ["argument", "attribute"])
@pytest.mark.parametrize("base", [reqtable.UnixStreamServer, reqtable.TableUnixStreamServer])
def test_unknown_policy_is_refused_before_anything_is_bound(base: Any, named: str, unix_path: str) -> None:
    attributes = {"dispatch": "quickly"} if named == "attribute" else {}
    options = {"dispatch": "quickly"} if named == "argument" else {}
    with pytest.raises(ConfigurationError, match=r"'quickly'.*greenlet, inline"):
        type("Server", (base,), attributes)(unix_path, OneLine, **options)
    assert not os.path.exists(unix_path)


@pytest.mark.parametrize("base", [reqtable.UnixStreamServer, reqtable.UnixDatagramServer])
def test_a_dead_servers_file_is_replaced_and_nothing_else(base: Any, unix_path: str) -> None:
    base(unix_path, Length).server_close()
    dead = os.stat(unix_path).st_ino
    with base(unix_path, Length) as server:
        assert server.server_address == unix_path
        live = os.stat(unix_path).st_ino
        with pytest.raises(OSError, match="in use"):
            base(unix_path, Length)
        assert os.stat(unix_path).st_ino == live
        # one that is gone because the file was removed and made again is told from the old one by being answered
        with socket.socket(socket.AF_UNIX, server.socket_type) as probe:
            probe.connect(unix_path)
    assert dead
    Path("file").write_text("mine")
    with pytest.raises(OSError, match="in use"):
        base("file", Length)
    assert Path("file").read_text() == "mine"


@everywhere
def test_datagrams(lib: ModuleType, options: dict[str, str], unix_path: str) -> None:
    """A datagram is cut off at `max_packet_size`. A handler that writes nothing still sends an empty datagram."""
    own = unix_path + "c"
    for base, address, family, bound in (
        (lib.UDPServer, ANY, socket.AF_INET, ANY),
        (lib.UnixDatagramServer, unix_path, socket.AF_UNIX, own),
    ):
        with base(address, Length, **options) as server, socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(WAIT_S)
            client.bind(bound)
            client.connect(server.server_address)
            for size, answer in ((5, b"5"), (0, b""), (8192, b"8192"), (9000, b"8192")):
                client.send(bytes(size))
                server.handle_request()
                assert client.recv(100) == answer


@everywhere
def test_unix_streams(lib: ModuleType, options: dict[str, str], unix_path: str) -> None:
    with (
        lib.UnixStreamServer(unix_path, OneLine, **options) as server,
        Client(unix_path, socket.AF_UNIX) as client,
    ):
        client.send(b"hello\n")
        server.handle_request()
        assert client.rest() == b"HELLO\n"


# -- one request ------------------------------------------------------------------------------------------------------


@everywhere
def test_handle_request_serves_exactly_one(lib: ModuleType, options: dict[str, str]) -> None:
    with lib.TCPServer(ANY, OneLine, **options) as server:
        clients = [Client(server.server_address).send(b"%d a\n" % i) for i in range(3)]
        for i, client in enumerate(clients):
            server.handle_request()
            assert client.rest() == b"%d A\n" % i
            for waiting in clients[i + 1 :]:
                assert not is_answered(waiting)
            client.close()


@everywhere
@pytest.mark.parametrize(
    ("of_socket", "own"), [(0.02, None), (None, 0.02), (0.02, 60), (60, 0.02), (0, None), (None, 0), (0, 60)]
)
def test_handle_request_waits_the_shorter_timeout(
    lib: ModuleType,
    options: dict[str, str],
    of_socket: float | None,
    own: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A timeout of 0 polls: a request that has arrived is served."""
    monkeypatch.setattr(Process, "has_forked", False)  # by another test: the socket would not be put back then
    timeouts = []
    with lib.TCPServer(ANY, OneLine, **options) as server:
        server.socket.settimeout(of_socket)
        server.timeout = own
        server.handle_timeout = lambda: timeouts.append(time.perf_counter() - began)
        began = time.perf_counter()
        server.handle_request()
        assert min(t for t in (of_socket, own) if t is not None) <= timeouts[0] < AT_ONCE_S
        assert server.socket.gettimeout() == of_socket

        with Client(server.server_address) as client:
            client.send(b"hello\n")
            server.handle_request()
            assert len(timeouts) == 1
            assert client.rest() == b"HELLO\n"


def test_handle_request_returns_when_its_own_request_is_done() -> None:
    """It does not return when its request has only begun, and it does not wait for another, silent request."""
    with (
        reqtable.TCPServer(ANY, OneLine, dispatch="greenlet") as server,
        Client(server.server_address) as silent,
        Client(server.server_address) as client,
    ):
        server.handle_request = functools.partial(server.handle_request)  # as a program may
        serve_until(server, lambda: len(server.table) == 2)
        rest = [b"a\n", b"b\n"]
        third = Client(server.server_address).send(b"hel")
        # its line ends in a later pass than the one in which it begins
        server.service_actions = lambda: third.send(b"lo\n") if has_read(server, 0, 0, 3)() else None
        server.handle_request()
        assert third.rest() == b"HELLO\n"
        third.close()
        assert [entry.bytes_in for entry in server.table] == [0, 0]
        del server.service_actions
        for each in (silent, client):
            each.send(rest.pop())
        serve_until(server, lambda: not len(server.table))
        assert (silent.rest(), client.rest()) == (b"B\n", b"A\n")


# -- serving and stopping ---------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "how", ["thread", "handler", "handler, twice", "signal in handler", "signal", "flag in handler"]
)
def test_shutdown_is_at_once(dispatch: str, how: str) -> None:
    """The poll interval is a minute."""

    class Server(reqtable.TCPServer):
        commands = {
            b"stop\n": lambda: server.shutdown(),
            b"stop twice\n": lambda: (server.shutdown(), server.shutdown()),
            b"signal\n": lambda: signal.raise_signal(signal.SIGUSR1),
            b"flag\n": lambda: setattr(server, "_BaseServer__shutdown_request", True),
        }

    began = []

    def stop() -> None:
        with Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"HELLO\n"
            began.append(time.perf_counter())
            if how == "thread":
                # inline, the handler is in a read until its client ends
                client.end() if dispatch == "inline" else None
                server.shutdown()
            elif how == "signal":
                client.end() if dispatch == "inline" else None
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                command = {"handler": b"stop", "handler, twice": b"stop twice", "flag in handler": b"flag"}
                client.send(command.get(how, b"signal") + b"\n").end()
                assert client.line()

    previous = signal.signal(signal.SIGUSR1, lambda *_: server.shutdown())
    try:
        with Server(ANY, Lines, dispatch=dispatch) as server:
            thread = threading.Thread(target=stop)
            server.engine.post(thread.start)
            server.serve_forever(poll_interval=60)
            took = time.perf_counter() - began[0]
            thread.join(WAIT_S)
            assert not thread.is_alive()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    print(f"shutdown from {how}, {dispatch}: {took * 1000:.1f} ms")
    assert took < AT_ONCE_S


@everywhere
def test_shutdown_before_serve_forever(lib: ModuleType, options: dict[str, str]) -> None:
    """`shutdown` waits for a `serve_forever`, which ends at once; so does the next one after an idle `shutdown`."""
    waiting = threading.Event()

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    with lib.TCPServer(ANY, OneLine, **options) as server, Client(server.server_address) as client:
        client.send(b"hello\n")
        server._BaseServer__is_shut_down = Watched()
        thread = started(server.shutdown)
        assert waiting.wait(WAIT_S)
        thread.join(0.01)
        assert thread.is_alive()
        server.serve_forever()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        server.shutdown()
        server.serve_forever()
        assert not is_answered(client)
        server.handle_request()
        assert client.rest() == b"HELLO\n"


@everywhere
def test_flag_set_by_hand_is_noticed_within_the_poll_interval(lib: ModuleType, options: dict[str, str]) -> None:
    passed = threading.Event()

    class Server(lib.TCPServer):  # type: ignore[name-defined,misc]
        def service_actions(self) -> None:
            passed.set()

    with Server(ANY, OneLine, **options) as server:
        thread = started(lambda: server.serve_forever(poll_interval=0.02))
        assert passed.wait(WAIT_S)
        server._BaseServer__shutdown_request = True
        thread.join(AT_ONCE_S)
        ended = not thread.is_alive()
        server.shutdown()
        thread.join(WAIT_S)
        assert ended


def test_serving_again_goes_on_with_the_requests_in_the_table() -> None:
    with reqtable.TCPServer(ANY, OneLine, dispatch="greenlet") as server, Client(server.server_address) as client:
        client.send(b"hel")
        serve_until(server, has_read(server, 3))
        late = Client(server.server_address).send(b"late\n")  # nothing is accepted meanwhile
        assert [entry.bytes_in for entry in server.table] == [3]
        client.send(b"lo\n")
        serve_until(server, lambda: not len(server.table))
        assert client.rest() == b"HELLO\n"
        serve_until(server, lambda: server.table.last_id == 2 and not len(server.table))
        assert late.rest() == b"LATE\n"
        late.close()


@both
def test_a_second_loop_is_refused_and_the_first_goes_on(dispatch: str) -> None:
    with serving(reqtable.TCPServer(ANY, OneLine, dispatch=dispatch)) as server:
        try:
            for again in (server.serve_forever, server.handle_request, server.engine.serve_forever):
                with pytest.raises(reqtable.ReqtableError, match="running already"):
                    again()
                with Client(server.server_address) as client:
                    client.socket.settimeout(AT_ONCE_S)
                    assert client.ask(b"hello\n") == b"HELLO\n"
        except BaseException:
            server.engine.post(sys.exit)  # shutdown() may be of no use any more
            raise


# -- draining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["thread", "handler"])
def test_drain_finishes_what_has_begun_and_takes_nothing_new(where: str) -> None:
    server = reqtable.TCPServer(ANY, Lines, dispatch="greenlet")
    server.commands = {b"drain\n": server.drain}
    with serving(server):
        with Client(server.server_address) as begun, Client(server.server_address) as late:
            assert begun.ask(b"hello\n") == b"HELLO\n"
            assert late.ask(b"hello\n") == b"HELLO\n"
            late.end()
            wait_until(server, lambda: len(server.table) == 1)
            if where == "thread":
                thread = started(server.drain)
            else:
                assert begun.ask(b"drain\n") == b"DRAIN\n"
                thread = started(server._BaseServer__is_shut_down.wait)
            wait_until(server, lambda: not len(server.engine.listeners))
            with pytest.raises(ConnectionRefusedError):
                Client(server.server_address)
            assert begun.ask(b"still here\n") == b"STILL HERE\n"
            assert thread.is_alive()
            begun.end()
            thread.join(WAIT_S)
            assert not thread.is_alive()
            assert server.table.last_id == 2


def test_drain_ends_when_someone_ends_the_loop_before_it_is_done() -> None:
    with (
        serving(reqtable.TCPServer(ANY, OneLine, dispatch="greenlet")) as server,
        Client(server.server_address),
    ):
        wait_until(server, lambda: len(server.table) == 1)
        thread = started(server.drain)
        wait_until(server, lambda: not len(server.engine.listeners))
        server.shutdown()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_drain_ends_serving_after_its_timeout() -> None:
    with (
        serving(reqtable.TCPServer(ANY, OneLine, dispatch="greenlet"), poll_interval=5) as server,
        Client(server.server_address) as silent,
    ):
        wait_until(server, lambda: len(server.table) == 1)
        began = time.perf_counter()
        server.drain(timeout=0.02)
        assert 0.02 <= time.perf_counter() - began < AT_ONCE_S
        server.server_close()
        assert silent.rest() == b""


@pytest.mark.parametrize("timeout", [None, 0.02, 60])
def test_drain_with_no_loop_running_runs_it(timeout: float | None) -> None:
    """The server can serve again afterwards."""
    silent = timeout == 0.02
    with reqtable.TCPServer(ANY, OneLine, dispatch="greenlet") as server, Client(server.server_address) as client:
        client.send(b"hel")
        serve_until(server, has_read(server, 3))
        with Client(server.server_address) as new:
            if not silent:
                client.send(b"lo\n")
            began = time.perf_counter()
            server.drain(timeout)
            assert time.perf_counter() - began < AT_ONCE_S
            assert len(server.table) == 0
            assert client.rest() == (b"" if silent else b"HELLO\n")
            assert not is_answered(new)
            with serving(server):
                new.socket.settimeout(AT_ONCE_S)
                assert new.ask(b"new\n") == b"NEW\n"


# -- several servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["engine", "server"])
def test_several_servers_share_one_table_and_one_loop(by: str, unix_path: str) -> None:
    engine = Engine()
    tcp = reqtable.TCPServer(ANY, OneLine, dispatch="greenlet")
    udp = reqtable.UDPServer(ANY, Length)
    unix = reqtable.UnixStreamServer(unix_path, OneLine, dispatch="greenlet")
    for server in (tcp, udp, unix):
        assert engine.add(server) is engine
        assert server.table is engine.table
    whole = engine if by == "engine" else tcp
    running = threading.Event()
    engine.post(running.set)
    thread = started(whole.serve_forever)
    assert running.wait(WAIT_S)
    try:
        with (
            Client(tcp.server_address) as a,
            Client(unix_path, socket.AF_UNIX) as b,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as c,
        ):
            wait_until(tcp, lambda: len(engine.table) == 2)
            assert {row["server"] for row in engine.table.snapshot()} == {"TCPServer", "UnixStreamServer"}
            c.settimeout(WAIT_S)
            c.sendto(b"abc", udp.server_address)
            assert c.recv(10) == b"3"
            unix.shutdown()  # ends its own listening, and not what it has begun
            assert b.ask(b"hello\n") == b"HELLO\n"
            with Client(unix_path, socket.AF_UNIX) as refused:
                wait_until(tcp, lambda: len(engine.table) == 1)
                refused.send(b"hello\n")
                assert a.ask(b"hello\n") == b"HELLO\n"
                assert not is_answered(refused)
    finally:
        began = time.perf_counter()
        whole.shutdown()
        took = time.perf_counter() - began
        thread.join(WAIT_S)
        for server in (tcp, udp, unix):
            server.server_close()
    assert not thread.is_alive()
    assert took < AT_ONCE_S


def test_one_server_of_an_engine_drains_and_the_others_go_on() -> None:
    engine = Engine()
    one, other = (reqtable.TCPServer(ANY, OneLine, dispatch="greenlet") for _ in range(2))
    engine.add(one).add(other)
    running = threading.Event()
    engine.post(running.set)
    thread = started(engine.serve_forever)
    assert running.wait(WAIT_S)
    try:
        with Client(one.server_address) as begun, Client(other.server_address) as client:
            wait_until(one, lambda: len(engine.table) == 2)
            begun.send(b"hello\n")
            one.drain(timeout=WAIT_S)
            assert begun.rest() == b"HELLO\n"
            assert client.ask(b"hello\n") == b"HELLO\n"
    finally:
        engine.shutdown()
        thread.join(WAIT_S)
        one.server_close()
        other.server_close()


@everywhere
def test_a_request_with_a_timeout_ends_at_once(lib: ModuleType, options: dict[str, str]) -> None:
    """The `get_request` of some programs sets a timeout. Nothing waits for it once the handler has returned."""

    class Timing(lib.TCPServer):  # type: ignore[misc,name-defined]
        def get_request(self) -> tuple[Any, Any]:
            request, address = super().get_request()
            request.settimeout(3600)
            return request, address

    with Timing(ANY, OneLine, **options) as server, Client(server.server_address) as client:
        client.send(b"a\n")
        server.handle_request()
        assert client.rest() == b"A\n"


def test_who_sets_no_queue_size_gets_one_that_holds_a_burst() -> None:
    sizes: list[int] = []

    class Counting(socket.socket):
        def listen(self, backlog: int = 0) -> None:
            sizes.append(backlog)
            super().listen(backlog)

    class Five(reqtable.TCPServer):
        request_queue_size = 6

    token = SYSTEM.set(System(socket=Counting))
    try:
        for server in (reqtable.TCPServer, Five, reqtable.TableTCPServer):
            server(ANY, OneLine).server_close()
    finally:
        SYSTEM.reset(token)
    assert sizes == [1024, 6, 1024]
    assert reqtable.TCPServer.request_queue_size == socketserver.TCPServer.request_queue_size


@everywhere
def test_a_closed_server_serves_again_with_another_socket(lib: ModuleType, options: dict[str, str]) -> None:
    """Development servers do so: the child that they start when a file changes inherits the listening socket."""
    with socket.create_server(ANY) as inherited:
        server = lib.TCPServer(ANY, OneLine, bind_and_activate=False, **options)
        server.server_close()
        server.socket = socket.fromfd(inherited.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        with Client(inherited.getsockname()) as client:
            client.send(b"a\n")
            server.handle_request()
            assert client.rest() == b"A\n"
        thread = started(server.serve_forever)
        with Client(inherited.getsockname()) as client:
            assert client.send(b"b\n").rest() == b"B\n"
        server.shutdown()
        thread.join(WAIT_S)
        server.server_close()


MIX_INS = [reqtable.TableMixIn, reqtable.ThreadingMixIn, reqtable.ForkingMixIn]


def public(thing: type) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["ThreadingMixIn", "ForkingMixIn"])
def test_a_mix_in_brings_what_socketservers_brings(name: str) -> None:
    ours, theirs = getattr(reqtable, name), getattr(socketserver, name)
    assert public(ours) == public(theirs) | {"dispatch"}
    stub = type("Stub", (ours,), {})()
    assert hasattr(stub, "_threads") == hasattr(theirs(), "_threads")
    if name == "ForkingMixIn":
        assert stub.collect_children(blocking=True) is theirs().collect_children(blocking=True) is None


@pytest.mark.parametrize("mixin", MIX_INS)
def test_what_is_derived_from_a_mix_in_alone_is_no_server(mixin: type) -> None:
    class Stub(mixin):  # type: ignore[misc]
        def __init__(self, **attributes: Any) -> None:
            vars(self).update(attributes)

    stub = type("Deeper", (Stub,), {})(makefile=7)
    assert stub.makefile == 7
    assert not [name for name in ("shutdown", "table", "serve_forever", "fileno", "stats") if hasattr(stub, name)]


@pytest.mark.parametrize("mixin", MIX_INS)
@pytest.mark.parametrize("base", [HTTPServer, socketserver.ThreadingTCPServer, socketserver.ForkingTCPServer])
@pytest.mark.parametrize("how", ["at once", "step by step", "over theirs", "with a hook of its own"])
def test_a_mix_in_brings_the_loop_to_any_server_behind_it(mixin: type, base: type, how: str) -> None:
    taken: list[Any] = []

    class Hook:
        def process_request(self, request: Any, client_address: Any) -> None:
            taken.append(client_address)
            super().process_request(request, client_address)  # type: ignore[misc]

    bases: tuple[type, ...] = (mixin, base)
    if how == "step by step":
        bases = (type("Own", (mixin,), {}), base)
    elif how == "over theirs":
        theirs = socketserver.ForkingMixIn if base is socketserver.ForkingTCPServer else socketserver.ThreadingMixIn
        bases = (type("Own", (mixin, theirs), {}), base)
    elif how == "with a hook of its own":
        bases = (type("Own", (Hook, mixin), {}), base)
    made = type("Server", bases, {"dispatch": "greenlet"})
    with serving(type("Derived", (made,), {})(ANY, OneLine)) as server:
        assert isinstance(server, (mixin, base))
        with Client(server.server_address) as silent, Client(server.server_address) as client:
            assert client.ask(b"hello\n") == b"HELLO\n"
            wait_until(server, lambda: len(server.table) == 1)
            assert next(iter(server.table)).policy.name == "greenlet"
            assert len(taken) == (2 if how == "with a hook of its own" else 0)
            silent.end()


@pytest.mark.parametrize("mixin", [reqtable.ThreadingMixIn, reqtable.ForkingMixIn])
@pytest.mark.parametrize("base", [HTTPServer, reqtable.TCPServer])
def test_a_hook_may_be_called_by_the_name_of_the_mix_in(mixin: Any, base: Any) -> None:
    calls: list[str] = []

    class Server(mixin, base):  # type: ignore[misc]
        def process_request(self, request: Any, client_address: Any) -> None:
            calls.append("process_request")
            mixin.process_request(self, request, client_address)

        def server_close(self) -> None:
            calls.append("server_close")
            mixin.server_close(self)

    with serving(Server(ANY, OneLine)) as server, Client(server.server_address) as client:
        assert client.ask(b"hello\n") == b"HELLO\n"
    assert calls == ["process_request", "server_close"]


@pytest.mark.parametrize("mixin", MIX_INS)
def test_a_mix_in_that_comes_too_late_is_refused(mixin: type) -> None:
    says = f"Late: {mixin.__name__} comes after BaseServer, whose loop it must replace: put it first"
    with pytest.raises(TypeError, match=says):
        type("Late", (HTTPServer, mixin), {})


def test_a_mix_in_of_a_programs_own_may_come_first_and_run_the_loop() -> None:
    class Control:
        def serve_forever(self, poll_interval: float) -> None:
            ran.append(poll_interval)
            super().serve_forever(poll_interval)  # type: ignore[misc]

    ran: list[float] = []
    server = type("Controlled", (Control, reqtable.TCPServer), {})(ANY, OneLine)
    server.service_actions = server.shutdown
    with server:
        server.engine.post(bool)
        server.serve_forever(0.01)
    assert ran == [0.01]


def test_a_server_whose_constructor_was_not_called_says_so() -> None:
    class Forgetful(reqtable.TCPServer):
        def __init__(self) -> None:
            pass

    with pytest.raises(reqtable.ReqtableError, match=r"Forgetful: .* call super\(\)\.__init__\(…\)"):
        Forgetful().table  # noqa: B018


def first_use(policy: str, handler: str, tls: bool) -> Any:
    marks = [] if tls == (handler == "Blocking") else [pytest.mark.slow]
    return pytest.param(policy, handler, tls, marks=marks, id=f"{policy}-{handler}-{'TLS' if tls else 'plain'}")


FIRST_USES = [
    first_use(policy, handler, tls)
    for handler, policies in (
        ("Blocking", ("inline", "greenlet", "thread", "pool", "fork")),
        ("State", ("inline", "greenlet", "thread", "pool", "fork", "executor")),
    )
    for policy in policies
    for tls in (False, True)
]


@pytest.mark.parametrize(("policy", "handler", "tls"), FIRST_USES)
def test_nothing_is_built_on_what_was_patched_when_it_was_first_used(
    policy: str, handler: str, tls: bool, tmp_path: Path
) -> None:
    certificate = [write_certificate(tmp_path), str(tmp_path / "ca.pem")] if tls else []
    program = [sys.executable, str(Path(__file__).with_name("first_use.py")), policy, handler, *certificate]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=WAIT_S)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n[]\n", "")


# -- over the standard library's classes ------------------------------------------------------------------------------


def test_http_server_of_the_standard_library_serves_past_silent_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server(reqtable.TableMixIn, HTTPServer):
        pass

    (tmp_path / "hello.txt").write_text("hello")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with Server(ANY, handler) as server:
        thread = started(server.serve_forever)
        try:
            with Client(server.server_address) as silent, Client(server.server_address) as half:
                half.send(b"GET /hello.txt HT")
                real = http.client.HTTPConnection(*server.server_address[:2], timeout=WAIT_S)
                real.request("GET", "/hello.txt")
                answer = real.getresponse()
                assert (answer.status, answer.read()) == (200, b"hello")
                real.close()
                wait_until(server, has_read(server, 0, 17))
                half.send(b"TP/1.0\r\n\r\n")
                assert half.rest().endswith(b"\r\n\r\nhello")
                wait_until(server, has_read(server, 0))
                listening = server.socket
                server.server_close()
                assert silent.rest() == b""
                assert listening.fileno() == -1
        finally:
            server.shutdown()
            thread.join(WAIT_S)
            listening.close()
    assert not thread.is_alive()
    assert capsys.readouterr().err.count('"GET /hello.txt HTTP/1') == 2
