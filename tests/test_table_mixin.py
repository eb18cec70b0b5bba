"""`TableMixIn` in front of servers that derive from the standard library's classes.

Here `socketserver` is the standard library's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import struct
import sys
import threading
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from logging.handlers import SocketHandler
from pathlib import Path
from socketserver import BaseRequestHandler, ForkingTCPServer, StreamRequestHandler, TCPServer, ThreadingTCPServer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from xmlrpc.server import DocXMLRPCServer, SimpleXMLRPCServer

import django.core.servers.basehttp
import dns.message
import dns.query
import dnslib.server
import pytest
import werkzeug.serving

import reqtable
from tests.support import WAIT_S, Client, open_descriptors, serving, wait_until

ANY = ("127.0.0.1", 0)
HOOKS = [
    "get_request",
    "verify_request",
    "process_request",
    "process_request_thread",
    "finish_request",
    "handle_error",
    "shutdown_request",
    "close_request",
]
SERVED = ["get_request", "verify_request", "process_request", "finish_request", "shutdown_request", "close_request"]
SERVED_AS_BY_A_THREAD = [*SERVED[:3], "process_request_thread", *SERVED[3:]]


def recording(base: type) -> Any:
    """Return a class with the mix-in in front of `base`, whose hooks note that they are called."""

    def hook(name: str) -> Callable[..., Any]:
        def noting(self: Any, *args: Any) -> Any:
            if name != "get_request":
                self.calls.append(name)
                return getattr(super(made, self), name)(*args)
            request = super(made, self).get_request()  # a loop that took one looks whether there is another
            self.calls.append(name)
            return request

        return noting

    def service_actions(self: Any) -> None:
        self.passes += 1
        super(made, self).service_actions()

    hooks = {name: hook(name) for name in HOOKS if hasattr(base, name)}
    mixed = type("Mixed", (reqtable.TableMixIn, base), {})
    made: Any = type("Recording", (mixed,), {**hooks, "calls": [], "passes": 0, "service_actions": service_actions})
    return made


def fetch(server: Any, path: str, data: bytes | None = None) -> bytes:
    address = f"http://127.0.0.1:{server.server_address[1]}/{path}"
    with urllib.request.urlopen(address, data, timeout=WAIT_S) as answer:
        return bytes(answer.read())


def files(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    (folder / "a").write_bytes(b"content")
    handler = functools.partial(Quiet, directory=str(folder))
    return recording(base)(ANY, handler), lambda server: _is(fetch(server, "a"), b"content")


def _is(found: object, expected: object) -> None:
    assert found == expected


def calls(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    server = recording(base)(ANY, logRequests=False)
    server.register_function(pow)

    def ask(server: Any) -> None:
        with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
            assert proxy.pow(3, 4) == 81

    return server, ask


def application(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).upper()]


def wsgi(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    class Quiet(WSGIRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = recording(base)(ANY, Quiet)
    server.set_app(application)
    return server, lambda server: _is(fetch(server, "", b"words"), b"WORDS")


def by_werkzeug(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    class Quiet(werkzeug.serving.WSGIRequestHandler):
        def log(self, *args: Any) -> None:
            pass

    server = recording(base)("127.0.0.1", 0, application, handler=Quiet)
    return server, lambda server: _is(fetch(server, "", b"words"), b"WORDS")


def by_django(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    from django.conf import settings

    if not settings.configured:
        settings.configure()

    class Quiet(django.core.servers.basehttp.WSGIRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = recording(base)(ANY, Quiet, allow_reuse_address=True)
    server.set_app(application)
    return server, lambda server: _is(fetch(server, "", b"words"), b"WORDS")


def names(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    class Resolver(dnslib.server.BaseResolver):  # type: ignore[misc]
        def resolve(self, request: Any, handler: Any) -> Any:
            reply = request.reply()
            reply.add_answer(*dnslib.RR.fromZone("name.example. 60 A 192.0.2.7"))
            return reply

    server = recording(base)(ANY, dnslib.server.DNSHandler)
    server.resolver = Resolver()
    server.logger = dnslib.server.DNSLogger(log="-request,-reply,-truncated,-error,-recv,-send")
    ask = dns.query.udp if issubclass(base, dnslib.server.UDPServer) else dns.query.tcp

    def asking(server: Any) -> None:
        query = dns.message.make_query("name.example", "A")
        reply = ask(query, "127.0.0.1", port=server.server_address[1], timeout=WAIT_S)
        assert [str(record) for rrset in reply.answer for record in rrset] == ["192.0.2.7"]

    return server, asking


def records(base: Any, folder: Path) -> tuple[Any, Callable[[Any], None]]:
    """Make a receiver of log records. Returns it, and a function that sends it a record and waits for the arrival."""
    heard: list[str] = []

    class Receiver(StreamRequestHandler):
        def handle(self) -> None:
            while len(header := self.rfile.read(4)) == 4:
                heard.append(pickle.loads(self.rfile.read(*struct.unpack(">L", header)))["msg"])

    def ask(server: Any) -> None:
        before = len(heard)
        handler = SocketHandler(*server.server_address)
        handler.emit(logging.LogRecord("remote", logging.WARNING, "", 0, "heard", (), None))
        wait_until(server, lambda: len(heard) > before)
        handler.close()

    return recording(base)(ANY, Receiver), ask


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (files, HTTPServer),
        (files, ThreadingHTTPServer),
        (calls, SimpleXMLRPCServer),
        (calls, DocXMLRPCServer),
        (wsgi, WSGIServer),
        (by_werkzeug, werkzeug.serving.BaseWSGIServer),
        (by_werkzeug, werkzeug.serving.ThreadedWSGIServer),
        (by_django, django.core.servers.basehttp.WSGIServer),
        (by_django, django.core.servers.basehttp.ThreadedWSGIServer),
        (names, dnslib.server.TCPServer),
        (names, dnslib.server.UDPServer),
        (records, ThreadingTCPServer),
        (records, ForkingTCPServer),
    ],
    ids=lambda each: f"{each.__module__}.{each.__name__}" if isinstance(each, type) else "",
)
def test_it_serves_past_silent_clients_and_calls_every_hook(make: Any, base: Any, tmp_path: Path) -> None:
    server, ask = make(base, tmp_path)
    expected = SERVED_AS_BY_A_THREAD if hasattr(base, "process_request_thread") else SERVED
    before = threading.active_count()
    with serving(server):
        ask(server)
        wait_until(server, lambda: not server.table)
        assert server.calls == expected
        with contextlib.ExitStack() as stack:
            is_stream = base is not dnslib.server.UDPServer
            for _ in range(20 if is_stream else 0):
                stack.enter_context(Client(server.server_address))
            wait_until(server, lambda: len(server.table) == (20 if is_stream else 0))
            passes = server.passes
            ask(server)
            ask(server)
            assert threading.active_count() == before + 1  # the one that this test serves in
            wait_until(server, lambda: server.passes > passes)
    assert sorted(set(server.calls)) == sorted(expected)
    assert server.calls.count("shutdown_request") == server.calls.count("get_request") == (23 if is_stream else 3)


@contextlib.contextmanager
def mixed(base: Any, handler: Any, **hooks: Any) -> Iterator[Any]:
    server = type("Server", (reqtable.TableMixIn, base), hooks)(ANY, handler)
    with serving(server):
        yield server


class Upper(StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            if text == b"fail\n":
                raise ValueError("as asked")
            if text == b"exit\n":
                sys.exit(3)
            self.wfile.write(text.upper())


def test_a_hook_may_refuse_and_replace_a_request() -> None:
    def get_request(self: Any) -> tuple[Any, Any]:
        request, address = self.socket.accept()
        request.settimeout(WAIT_S)
        return request, ("renamed", *address)

    refused = []

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        refused.append(client_address[0])
        return len(refused) > 1

    with mixed(TCPServer, Upper, get_request=get_request, verify_request=verify_request) as server:
        with Client(server.server_address) as first:
            assert first.rest() == b""
        with Client(server.server_address) as second:
            assert second.ask(b"a\n") == b"A\n"
            assert [entry.peer[0] for entry in server.table] == ["renamed"]
    assert refused == ["renamed", "renamed"]


def test_what_a_thread_would_do_around_a_request_is_done() -> None:
    """Django, for example, closes its database connections in `process_request_thread`, which may suspend meanwhile."""
    around: list[str] = []

    class Threaded(ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            around.append(f"begun {request.recv(1).decode()}")
            super().process_request_thread(request, client_address)
            around.append(f"ended {request.fileno()}")

    with mixed(Threaded, Upper) as server:
        before = open_descriptors()
        with Client(server.server_address) as silent, Client(server.server_address) as client:
            client.send(b"ab\nc\n").end()
            assert client.rest() == b"B\nC\n"
            wait_until(server, lambda: len(server.table) == 1)
            assert around == ["begun a", "ended -1"]
            silent.send(b"xunread").end()
            assert silent.rest() == b"UNREAD"
        wait_until(server, lambda: not server.table)
        wait_until(server, lambda: open_descriptors() == before)


@pytest.mark.parametrize("act", ["cancel", "close"])
def test_a_request_that_is_ended_in_mid_hook_is_ended_by_the_hook(act: str) -> None:
    ended = []

    class Threaded(ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                ended.append(request.fileno())

    with mixed(Threaded, Upper) as server, Client(server.server_address) as client:
        assert client.ask(b"a\n") == b"A\n"
        (entry,) = server.table
        if act == "cancel":
            server.table.cancel(entry.id)
        else:
            server.shutdown()
            server.server_close()
        assert client.rest() == b""
    assert ended == [-1]


@pytest.mark.parametrize("base", [ThreadingTCPServer, ForkingTCPServer, reqtable.ThreadingTCPServer])
def test_sys_exit_ends_a_request_alone_where_it_would_end_a_thread_or_a_child(base: Any) -> None:
    seen = []
    hook, threading.excepthook = threading.excepthook, lambda args: seen.append(args.exc_type)
    server = type("Server", (base,) if base is reqtable.ThreadingTCPServer else (reqtable.TableMixIn, base), {})
    try:
        with serving(server(ANY, Upper, dispatch="greenlet")) as serving_it:
            address = serving_it.server_address
            with Client(address) as stays, Client(address) as exits:
                assert stays.ask(b"a\n") == b"A\n"
                assert exits.send(b"exit\n").rest() == b""
                assert stays.ask(b"b\n") == b"B\n"
    finally:
        threading.excepthook = hook
    assert seen == ([] if base is ForkingTCPServer else [SystemExit])


def test_sys_exit_ends_a_server_that_has_no_threads_in_the_main_thread_alone() -> None:
    server = type("Server", (reqtable.TableMixIn, TCPServer), {})(ANY, Upper)
    with server, Client(server.server_address) as client:
        client.send(b"exit\n")
        with pytest.raises(SystemExit):
            server.serve_forever()
        assert client.rest() == b""
    with mixed(TCPServer, Upper) as server, Client(server.server_address) as exits:
        assert exits.send(b"exit\n").rest() == b""
        with Client(server.server_address) as other:
            assert other.ask(b"a\n") == b"A\n"


def test_an_error_goes_to_the_servers_own_hook(capsys: pytest.CaptureFixture[str]) -> None:
    with mixed(TCPServer, Upper) as server:
        with Client(server.server_address) as client:
            assert client.send(b"fail\n").rest() == b""
            peer = client.socket.getsockname()
    assert f"Exception occurred during processing of request from {peer}" in capsys.readouterr().err
    assert server.table is not None


# -- one request at a time --------------------------------------------------------------------------------------------


class Slow(BaseRequestHandler):
    """Answers each byte, until the peer's end of file."""

    def handle(self) -> None:
        while data := self.request.recv(1):
            self.request.sendall(data)


def test_handle_request_of_a_threading_server_goes_on_with_all_that_have_begun() -> None:
    """The loop of `logging.config.listen` needs this: a silent client must not keep the next client waiting."""

    class Server(reqtable.TableMixIn, ThreadingTCPServer):
        pass

    with Server(ANY, Slow) as server:
        calls = []

        def serve() -> None:
            for number in range(4):
                server.handle_request()
                calls.append(number)

        thread = threading.Thread(target=serve)
        with Client(server.server_address) as first, Client(server.server_address) as second:
            thread.start()
            assert first.send(b"1").receive(1) == b"1"
            assert second.send(b"2").receive(1) == b"2"
            with Client(server.server_address) as third:
                assert third.send(b"3").receive(1) == b"3"
            assert calls == []
            assert first.end().rest() == b""
            assert second.send(b"4").receive(1) == b"4"
        with Client(server.server_address) as fourth:  # three calls are done, one for each that was served
            assert fourth.send(b"5").end().rest() == b"5"
        thread.join(WAIT_S)
        assert calls == [0, 1, 2, 3]


def test_handle_request_of_a_plain_server_takes_one() -> None:
    class Server(reqtable.TableMixIn, TCPServer):
        pass

    with Server(ANY, Slow) as server:
        thread = threading.Thread(target=server.handle_request)
        with Client(server.server_address) as first, Client(server.server_address) as second:
            second.send(b"2")
            thread.start()
            assert first.send(b"1").end().rest() == b"1"
            thread.join(WAIT_S)
            assert not thread.is_alive()
            assert server.table.last_id == 1
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            assert second.receive(1) == b"2"
            second.end()
            thread.join(WAIT_S)


def test_one_that_reads_the_end_of_file_for_ever_lets_others_have_their_turn() -> None:
    class Heedless(BaseRequestHandler):
        def handle(self) -> None:
            while b"stop" not in self.request.recv(10):
                pass

    with mixed(TCPServer, Heedless) as server:
        with Client(server.server_address) as client, Client(server.server_address) as other:
            client.end()
            wait_until(server, lambda: any(entry.state is reqtable.State.READY for entry in server.table))
            assert other.send(b"stop").rest() == b""
            wait_until(server, lambda: len(server.table) == 1)
            (entry,) = server.table
            server.table.cancel(entry.id)
