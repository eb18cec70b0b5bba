"""Serving a server class, or a function that makes a server: binds, hooks, workers, drain, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import http.server
import logging
import os
import signal
import socket
import socketserver
import ssl
import threading
import time
import wsgiref.simple_server
import xmlrpc.client
import xmlrpc.server
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ConfigurationError
from reqtable.config import TLSOptions
from reqtable.server.configured import reconfigure
from reqtable.server.engine import Engine
from tests.certificates import client_context, write_certificate
from tests.pages import titled
from tests.service import Service, wait_gone
from tests.support import WAIT_S, open_descriptors
from tests.test_cli import run

ANY = "tcp://127.0.0.1:0"
PROGRAM = "tests/programs/server_classes.py"
GET = b"GET / HTTP/1.0\r\n\r\n"


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        own = self.server
        assert isinstance(own, http.server.HTTPServer)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{own.server_name} {own.server_port > 0} {self.client_address[0]}".encode())


class Upper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


class UpperDatagram(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())


class Echo(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def one(self, text: bytes) -> None:
        self.send(text)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{environ['SERVER_NAME']} {environ['SERVER_PORT']} {environ['REMOTE_ADDR']}".encode()]


def site(address: Any) -> wsgiref.simple_server.WSGIServer:
    server = wsgiref.simple_server.WSGIServer(
        address, wsgiref.simple_server.WSGIRequestHandler, bind_and_activate=False
    )
    server.set_app(application)
    return server


class Calculator(xmlrpc.server.SimpleXMLRPCServer):
    def __init__(self, address: Any) -> None:
        super().__init__(address, logRequests=False)
        self.register_function(pow)


@contextlib.contextmanager
def serving(served: Any, *binds: str, **options: Any) -> Iterator[tuple[Engine, list[Any]]]:
    """Run `serve()` in a thread during the block. Yields its engine, and the addresses of its servers."""
    engines: list[Engine] = []
    listening, began, raised = threading.Event(), threading.Event(), []

    def on_engine(engine: Engine) -> None:
        engines.append(engine)
        engine.post(began.set)

    def serve() -> None:
        try:
            reqtable.serve(served, *binds, on_engine=on_engine, on_listening=lambda _: listening.set(), **options)
        except BaseException as error:
            raised.append(error)
            listening.set()
            began.set()

    thread = threading.Thread(target=serve)
    before = open_descriptors()
    thread.start()
    try:
        assert listening.wait(WAIT_S)
        assert began.wait(WAIT_S)
        if raised:
            raise raised[0]
        yield engines[0], [each.server_address for each in engines[0].servers]
    finally:
        if engines:
            engines[0].stop()
        thread.join(WAIT_S)
    assert not thread.is_alive()
    until = time.monotonic() + WAIT_S
    while open_descriptors() > before:  # a thread of `pool` is a daemon, and may end a moment later
        assert time.monotonic() < until


def ask(address: Any, request: bytes = GET, context: ssl.SSLContext | None = None) -> bytes:
    """Send a request to a stream server, and return the answer without the headers of HTTP."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    own = socket.socket(family)
    own.settimeout(WAIT_S)
    own.connect(address)
    if context is not None:
        own = context.wrap_socket(own, server_hostname="127.0.0.1")
    with own:
        own.sendall(request)
        with own.makefile("rb") as answer:
            return answer.read().rpartition(b"\r\n\r\n")[2]


# -- what may be served -----------------------------------------------------------------------------------------------


class OwnServer(http.server.HTTPServer):
    def __init__(self, address: Any) -> None:
        super().__init__(address, Hello)
        self.port_seen = self.server_port  # the constructor binds, as it does without serve()


class Forwarding(reqtable.TableMixIn, http.server.HTTPServer):
    def __init__(self, address: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(address, Hello, *arguments, **named)


@pytest.mark.parametrize(
    ("served", "options"),
    [
        (http.server.HTTPServer, {"handler": Hello}),
        (http.server.ThreadingHTTPServer, {"handler": Hello}),
        (partial(http.server.HTTPServer, RequestHandlerClass=Hello), {}),
        (OwnServer, {}),
        (Forwarding, {}),
        (lambda address: http.server.HTTPServer(address, Hello, bind_and_activate=False), {}),
        (lambda address, handler: http.server.HTTPServer(address, handler, False), {"handler": Hello}),
        (lambda address: Forwarding(address, False), {}),
    ],
    ids=["class", "threading class", "partial", "no handler", "mixed in", "function", "function of two",
         "function, mixed in"],
)  # fmt: skip
def test_what_makes_an_http_server_is_served_on_each_kind_of_bind(served: Any, options: Any, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    path, abstract = f"unix://{tmp_path}/x.sock?mode=600", f"unix://@{tmp_path}"
    binds = [ANY, path, f"tls://127.0.0.1:0?cert={certificate}", abstract]
    with serving(served, *binds, **options) as (engine, [tcp, path, tls, abstract]):
        assert [each._policies.chosen.name for each in engine.servers] == ["greenlet"] * 4
        assert path == f"{tmp_path}/x.sock"
        assert os.stat(path).st_mode & 0o777 == 0o600
        with socket.create_connection(tcp) as silent:  # it holds nobody up
            silent.sendall(b"GET ")
            assert ask(tcp) == b"localhost True 127.0.0.1"
            assert ask(tls, context=client_context()) == b"localhost True 127.0.0.1"
            assert ask(path) == b"localhost False "
            assert ask(abstract) == b"localhost False "
        if served is OwnServer:
            assert engine.servers[0].port_seen == tcp[1]
    assert os.listdir(tmp_path).count("x.sock") == 0


def bound(address: Any) -> wsgiref.simple_server.WSGIServer:
    return wsgiref.simple_server.make_server(*address, application)


def test_a_function_may_bind_its_server_where_it_should_be(unused_port: int) -> None:
    before = open_descriptors()
    with serving(bound, ANY, "tcp://127.0.0.2:0") as (_, [first, second]):
        assert ask(first) == b"localhost %d 127.0.0.1" % first[1]
        assert ask(second).endswith(b"%d 127.0.0.1" % second[1])
    with serving(bound, f"tcp://127.0.0.1:{unused_port}") as (_, [address]):
        assert address[1] == unused_port
        assert ask(address) == b"localhost %d 127.0.0.1" % unused_port
        bind = f"tcp://127.0.0.1:{unused_port}"
        said = f"^\\[Errno {errno.EADDRINUSE}\\] bind '{bind}': address already in use by this process itself"
        for each in (bound, site):
            with pytest.raises(OSError, match=said):
                reqtable.serve(each, bind)
    assert open_descriptors() == before


def test_a_wsgi_server_has_its_application_and_its_environment(tmp_path: Path) -> None:
    with serving(site, ANY, f"unix://{tmp_path}/x.sock") as (engine, [tcp, path]):
        assert ask(tcp) == f"localhost {tcp[1]} 127.0.0.1".encode()
        assert ask(path) == b"localhost 0 "
        assert isinstance(engine.servers[0], wsgiref.simple_server.WSGIServer)


def test_an_xml_rpc_server_has_its_functions() -> None:
    with (
        serving(Calculator, ANY) as (_, [(host, port)]),
        xmlrpc.client.ServerProxy(f"http://{host}:{port}/") as proxy,
    ):
        assert proxy.pow(2, 10) == 1024


def test_a_class_for_datagrams_is_served() -> None:
    class Small(socketserver.UDPServer):
        max_packet_size = 4

    for served, expected in ((socketserver.UDPServer, b"DATAGRAM"), (Small, b"DATA")):
        with (
            serving(served, "udp://127.0.0.1:0", handler=UpperDatagram) as (_, [address]),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
        ):
            peer.settimeout(WAIT_S)
            peer.sendto(b"datagram", address)
            assert peer.recv(100) == expected


def test_a_passed_socket_is_served_without_binding_it_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        with serving(http.server.HTTPServer, f"fd://{passed.fileno()}", handler=Hello) as (_, [address]):
            assert address == passed.getsockname()
            assert ask(address) == b"localhost True 127.0.0.1"


def test_the_file_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/x.sock")
    with serving(http.server.HTTPServer, f"unix://{tmp_path}/x.sock", handler=Hello) as (_, [path]):
        assert ask(path) == b"localhost False "


# -- policies and configuration ---------------------------------------------------------------------------------------


class Chosen(reqtable.ThreadingMixIn, socketserver.TCPServer):
    pass


class Argued(reqtable.TCPServer):
    def __init__(self, address: Any) -> None:
        super().__init__(address, Upper, dispatch="pool")


@pytest.mark.parametrize(
    ("served", "options", "policy"),
    [
        (reqtable.TCPServer, {"handler": Upper}, "greenlet"),
        (reqtable.TCPServer, {"handler": Echo}, "inline"),
        (socketserver.TCPServer, {"handler": Echo}, "inline"),
        (lambda address: reqtable.TCPServer(address, Echo, False), {}, "inline"),
        (lambda address: reqtable.TCPServer(address, Upper, False), {}, "greenlet"),
        (lambda address: reqtable.TCPServer(address, Upper, False, dispatch="pool"), {}, "pool"),
        (lambda address: reqtable.TCPServer(address, Upper, False), {"dispatch": "thread"}, "thread"),
        (Chosen, {"handler": Upper}, "thread"),
        (Chosen, {"handler": Upper, "config": Config(dispatch="pool")}, "pool"),
        (Argued, {}, "pool"),
        (Argued, {"dispatch": "thread"}, "thread"),
        (socketserver.ThreadingTCPServer, {"handler": Upper, "dispatch": "pool"}, "pool"),
    ],
)
def test_the_policy_is_what_was_asked_for_or_what_the_class_names(served: Any, options: Any, policy: str) -> None:
    with serving(served, ANY, **options) as (engine, [address]):
        assert engine.servers[0]._policies.chosen.name == policy
        assert ask(address, b"LINE\n") == b"LINE\n"


def test_the_configuration_is_that_of_serve(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class Configured(reqtable.TCPServer):
        def __init__(self, address: Any) -> None:
            super().__init__(address, Echo, config=Config(dispatch="pool"))

    config = Config(limits=reqtable.Limits(entries_max=7), tls=TLSOptions(cert=write_certificate(tmp_path)))
    with serving(Configured, "tls://127.0.0.1:0", config=config) as (engine, [address]):
        assert engine.table.limits.entries_max == 7
        assert engine.servers[0]._policies.chosen.name == "inline"
        assert ask(address, b"line\n", client_context()) == b"line\n"
    warnings = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert warnings == ["Configured: serve() has the configuration; the one in its constructor is not used"]


@pytest.mark.parametrize("served", [OwnServer, site])
def test_a_new_configuration_is_applied(served: Any) -> None:
    with serving(served, ANY) as (engine, [address]):
        done = threading.Event()

        def apply() -> None:
            reconfigure(engine.servers, Config(dispatch="pool", limits=reqtable.Limits(entries_max=7)))
            done.set()

        engine.post(apply)
        assert done.wait(WAIT_S)
        assert engine.servers[0]._policies.chosen.name == "pool"
        assert engine.table.limits.entries_max == 7
        assert ask(address).endswith(b"127.0.0.1")


def test_a_class_keeps_the_names_that_it_uses_for_itself() -> None:
    class Named(socketserver.TCPServer):
        table = "mine"
        request_queue_size = 77

        def dispatch(self) -> str:
            return "mine"

        def stats(self) -> str:
            return "mine"

    with serving(Named, ANY, handler=Upper) as (engine, [address]):
        own: Any = engine.servers[0]
        assert (own.table, own.dispatch(), own.stats(), own.request_queue_size) == ("mine", "mine", "mine", 77)
        assert own._policies.chosen.name == "greenlet"
        assert ask(address, b"line\n") == b"LINE\n"


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_the_hooks_of_the_class_are_called() -> None:
    called: list[str] = []

    class Hooked(socketserver.TCPServer):
        pass

    def hook(name: str) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any) -> Any:
            called.append(name)
            return getattr(socketserver.TCPServer, name)(self, *arguments)

        return method

    names = ["server_bind", "server_activate", "service_actions", "get_request", "verify_request", "finish_request",
             "shutdown_request", "close_request", "server_close", "handle_error"]  # fmt: skip
    for name in names:
        setattr(Hooked, name, hook(name))

    class Failing(Upper):
        def handle(self) -> None:
            super().handle()
            raise ValueError

    with serving(Hooked, ANY, handler=Failing) as (_, [address]):
        assert ask(address, b"line\n") == b"LINE\n"
    assert set(called) == set(names)
    often = {"service_actions", "server_close", "get_request"}
    assert [name for name in called if name not in often] == [
        "server_bind", "server_activate", "verify_request", "finish_request", "handle_error", "shutdown_request",
        "close_request",
    ]  # fmt: skip


def test_the_hooks_of_a_class_with_a_mix_in_begin_and_end_with_serving() -> None:
    called: list[str] = []

    class Started(reqtable.TableMixIn, socketserver.TCPServer):
        def on_start(self) -> None:
            called.append("start")

        def on_stop(self) -> None:
            called.append("stop")

    with serving(Started, ANY, ANY, handler=Upper) as (_, [address, _]):
        assert ask(address, b"line\n") == b"LINE\n"
        assert called == ["start", "start"]
    assert called == ["start", "start", "stop", "stop"]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", ["Server", "site"])
@pytest.mark.parametrize("workers", [None, 2])
def test_the_command_serves_and_drains(served: str, workers: int | None, tmp_path: Path) -> None:
    (tmp_path / "reqtable.toml").write_text('dispatch = "thread"\n[limits]\ndrain_idle_s = 60\n')
    own = f"{PROGRAM}:{served}"
    with Service("--config", f"{tmp_path}/reqtable.toml", handler=own, workers=workers) as service:
        if workers:
            service.wait_for("2 of 2 workers are ready")
        assert service.served.startswith(f"serving {'Server' if served == 'Server' else 'WSGIServer'} on tcp://")
        assert b"thread" in ask(service.address)
        pids = service.workers()
        with socket.create_connection(service.address, WAIT_S) as begun:
            begun.sendall(b"GET / HTTP/1.0\r\n")
            service.wait_for("begun", 2)
            service.signal(signal.SIGTERM)
            service.wait_for(r"ending when \d requests? (is|are) done")
            begun.sendall(b"\r\n")
            with begun.makefile("rb") as answer:
                assert answer.read().endswith(b"thread")
        assert service.wait() == 0
        wait_gone(pids)


def test_the_command_takes_the_handler_of_a_server_class_from_the_same_file() -> None:
    with Service("--handler", f"{PROGRAM}:Handler", handler=f"{PROGRAM}:Server", workers=None) as service:
        assert b"greenlet" in ask(service.address)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
    assert [line for line in service.lines if "imported" in line] == ["imported"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["http.server:HTTPServer"], 78, ["HTTPServer needs a handler class", "--handler module:Class"]),
        ([f"{PROGRAM}:made"], 2, ["made is a server that was made for an address", "give its class"]),
        ([f"{PROGRAM}:Handler", "--handler", f"{PROGRAM}:Handler"], 78, ["no server class", "leave one out"]),
        (["http.server:HTTPServer", "--handler", "http.server:HTTPServer"], 2, ["HTTPServer is not a handler class"]),
        ([f"{PROGRAM}:Server", "--bind", "udp://127.0.0.1:0"], 78, ["'udp://", "Server serves connections", "tcp://"]),
        ([f"{PROGRAM}:Server", "--bind", "tls://127.0.0.1:0"], 78, ["'tls://127.0.0.1:0'", "name a certificate"]),
        ([f"{PROGRAM}:bound", "--bind", "tcp://127.0.0.2:0"], 78,
         ["bound has bound its server to 127.0.0.1:", "not to the address that it was", "bind_and_activate=False"]),
        ([f"{PROGRAM}:application"], 2, ["called with two arguments", f"run reqtable wsgi {PROGRAM}:application"]),
        ([f"{PROGRAM}:nothing"], 78, ["nothing has returned NoneType, not a server"]),
        ([f"{PROGRAM}:Nothing"], 2, ["has no Nothing", "servers there: Broken, Handler, Server, SiteHandler\n"]),
        (["socketserver:BaseServer", "--handler", f"{PROGRAM}:Handler"], 78, ["BaseServer has no socket", "TCPServer"]),
        ([f"{PROGRAM}:site", "--dispatch", "executor"], 78, ["SiteHandler", "executor"]),
        ([f"{PROGRAM}:Server", "--dispatch", "executor"], 78, ["Handler", "executor"]),
    ],
)  # fmt: skip
def test_what_the_command_refuses_is_one_line(arguments: list[str], code: int, words: list[str]) -> None:
    binds = [] if "--bind" in arguments else ["--bind", ANY]
    result = run("serve", *arguments, *binds)
    lines = [line for line in result.stderr.splitlines() if line != "imported"]
    assert (result.returncode, result.stdout, len(lines)) == (code, "", 1), result.stderr
    for word in words:
        assert word in lines[0] + "\n"


def test_an_error_of_the_server_class_is_told_with_its_traceback() -> None:
    result = run("serve", f"{PROGRAM}:Broken", "--bind", ANY)
    first, *rest = [line for line in result.stderr.splitlines() if line != "imported"]
    assert (result.returncode, result.stdout) == (78, "")
    assert "Broken can't be made: LookupError: no such thing, in Broken.__init__" in first
    assert [line.split(", line")[0].strip() for line in rest if "File" in line] == [f'File "{Path(PROGRAM).resolve()}"']


class Wanting(socketserver.TCPServer):
    def __init__(self, address: Any, handler: Any, title: str) -> None:
        super().__init__(address, handler)
        self.title = title


class Unmade(reqtable.TCPServer):
    def __init__(self, address: Any) -> None:
        self.address = address


def bind_elsewhere(address: Any) -> http.server.HTTPServer:
    return http.server.HTTPServer(address, Hello)


class Coroutine(reqtable.BaseRequestHandler):
    async def handle(self) -> None:  # type: ignore[override]
        """Never run."""


ONE = http.server.HTTPServer(("127.0.0.1", 0), Hello, bind_and_activate=False)


@pytest.mark.parametrize(
    ("served", "options", "words"),
    [
        (ONE, {}, "HTTPServer is a server that was made for an address of its own: give its class"),
        (Upper, {"handler": http.server.HTTPServer}, "HTTPServer is a server class, not a handler class"),
        (partial(http.server.HTTPServer, ("", 80)), {}, "its partial gives arguments by position"),
        (Wanting, {"handler": Upper}, "missing a required argument: 'title': give serve() a function that makes it"),
        (Wanting, {}, "can't be made from an address: "),
        (partial(Wanting, title="x"), {}, "Wanting needs a handler class"),
        (Unmade, {}, "Unmade: its constructor does not call super"),
        (bind_elsewhere, {}, "serve() binds it: pass bind_and_activate=False"),
        (lambda _: ONE, {}, "one server for two binds"),
        (socketserver.TCPServer, {"handler": Coroutine}, "is not awaited"),
    ],
)  # fmt: skip
def test_what_serve_refuses_leaves_nothing_behind(served: Any, options: Any, words: str, tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(ConfigurationError) as caught:
        reqtable.serve(served, f"unix://{tmp_path}/x.sock", ANY, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    del caught
    ONE.socket.close()
    assert open_descriptors() <= before
    assert os.listdir(tmp_path) == []


def test_an_address_in_use_is_named_and_the_servers_before_it_are_closed(tmp_path: Path) -> None:
    before = open_descriptors()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        for served, options in ((OwnServer, {}), (site, {}), (socketserver.TCPServer, {"handler": Upper})):
            with pytest.raises(OSError, match="in use by this process itself: choose another one") as caught:
                reqtable.serve(served, f"unix://{tmp_path}/x.sock", taken, **options)
            assert str(caught.value.strerror).startswith(f"bind {taken!r}: ")
            del caught
            assert os.listdir(tmp_path) == []
    assert open_descriptors() == before


def test_a_constructor_that_fails_after_it_has_bound_leaves_no_file(tmp_path: Path) -> None:
    class Failing(http.server.HTTPServer):
        def __init__(self, address: Any) -> None:
            super().__init__(address, Hello)
            assert os.listdir(tmp_path) == ["x.sock"]
            raise LookupError("no such thing")

    with pytest.raises(ConfigurationError, match="Failing can't be made: LookupError: no such thing"):
        reqtable.serve(Failing, f"unix://{tmp_path}/x.sock")
    assert os.listdir(tmp_path) == []


def test_a_function_that_may_make_handlers_still_makes_handlers() -> None:
    with serving(lambda *arguments: Upper(*arguments), ANY) as (_, [address]):
        assert ask(address, b"line\n") == b"LINE\n"


# -- docs/how-to/serve-a-server-class.md -----------------------------------------------------------------------------


def test_the_function_of_the_page_makes_a_site() -> None:
    found: dict[str, Any] = {}
    exec(titled("docs/how-to/serve-a-server-class.md", "website.py"), found)
    with serving(found["make_site"], ANY) as (_, [address]):
        assert ask(address) == b"hello\n"
