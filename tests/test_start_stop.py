"""`on_start` and `on_stop`: what a program does when serving begins and when it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import reqtable
from reqtable import Config, Engine, HandlerError, line, state
from tests.support import WAIT_S, Client, Started, serving, wait_until
from tests.test_cli import ROOT
from tests.test_handler_classes import line_of

ANY = ("127.0.0.1", 0)


class Machine(reqtable.StateRequestHandler):
    @state(line())
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


class Coroutine(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line()):
            await self.send(text)


class Blocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(text)


class Foreign(socketserver.StreamRequestHandler):
    """A handler class that knows nothing of reqtable. It has methods of these names for itself."""

    def handle(self) -> None:
        for text in self.rfile:
            self.wfile.write(b"".join(self.called) + text)

    called: list[bytes] = []

    @classmethod
    def on_start(cls, server: Any) -> None:  # noqa: ARG003
        cls.called.append(b"called as a hook ")


def recording(
    log: list[str], handler: Any, base: Any = reqtable.TCPServer, name: str = "server", is_open_at_end: bool = True
) -> Any:
    """Return a server on a free port that logs its hooks, and those of a subclass of `handler`."""

    class Handler(handler):
        @classmethod
        def on_start(cls, server: Any) -> None:
            assert (cls, server) == (Handler, made)
            super().on_start(server)
            log.append(f"{name}: handler starts")

        @classmethod
        def on_stop(cls, server: Any) -> None:
            assert (cls, server) == (Handler, made)
            super().on_stop(server)
            log.append(f"{name}: handler stops")

    class Server(base):
        def on_start(self) -> None:
            assert self.socket.getsockname()[1]
            assert self.table.thread == threading.get_ident()
            assert not len(self.engine.listeners)
            log.append(f"{name} starts")

        def on_stop(self) -> None:
            assert (self.fileno() >= 0) == is_open_at_end
            assert self.table.thread == threading.get_ident()
            assert self not in [each.server for each in self.engine.listeners]
            log.append(f"{name} stops")

    made = Server(ANY, Handler)
    return made


STARTS = ["server starts", "server: handler starts"]
STOPS = ["server: handler stops", "server stops"]


def shut_down_soon(server: Any) -> None:
    server.engine.post(server.shutdown)


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "base"),
    [
        (Machine, reqtable.TCPServer),
        (Coroutine, reqtable.TCPServer),
        (Blocking, reqtable.TCPServer),
        (Blocking, reqtable.TableTCPServer),
        (Blocking, reqtable.ThreadingTCPServer),
        (Blocking, reqtable.ForkingTCPServer),
        (Machine, reqtable.ForkingTCPServer),
    ],
)
def test_they_are_called_around_the_requests(handler: Any, base: Any) -> None:
    log: list[str] = []
    with serving(recording(log, handler, base)) as server, Client(server.server_address) as client:
        assert client.ask(b"hello\n") == b"hello\n"
        assert log == STARTS
        client.end().rest()
    assert log == STARTS + STOPS


def test_a_client_is_accepted_only_after_on_start() -> None:
    """The client connects during `on_start`, to the socket that is bound already."""
    clients: list[Client] = []

    class Server(reqtable.TCPServer):
        def on_start(self) -> None:
            clients.append(Client(self.server_address).send(b"hi\n"))
            assert not list(self.table)

    with serving(Server(ANY, Machine)), clients[0]:
        assert clients[0].line() == b"hi\n"


def test_each_call_of_serve_forever_starts_and_stops() -> None:
    log: list[str] = []
    with recording(log, Machine) as server:
        for _ in range(2):
            shut_down_soon(server)
            server.serve_forever()
    assert log == 2 * (STARTS + STOPS)


def test_shutdown_before_serve_forever_still_starts_and_stops() -> None:
    log: list[str] = []
    with recording(log, Machine) as server:
        server._BaseServer__shutdown_request = True
        server.serve_forever()
    assert log == STARTS + STOPS


def test_all_servers_of_an_engine_start_and_stop_in_reverse_order() -> None:
    log: list[str] = []
    first, second = recording(log, Machine, name="first"), recording(log, Blocking, name="second")
    Engine().add(first).add(second)
    shut_down_soon(second)
    second.serve_forever()
    starts = ["first starts", "first: handler starts", "second starts", "second: handler starts"]
    stops = ["second: handler stops", "second stops", "first: handler stops", "first stops"]
    assert log == starts + stops
    log.clear()
    engine = first.engine
    engine.post(engine.shutdown)
    engine.serve_forever()
    assert log == starts + stops
    for server in (first, second):
        server.server_close()


def test_one_handler_class_starts_once_for_each_server() -> None:
    started: list[Any] = []

    class Handler(Machine):
        @classmethod
        def on_start(cls, server: Any) -> None:
            started.append(server)

    engine = Engine()
    servers = [reqtable.TCPServer(ANY, Handler) for _ in range(2)]
    for each in servers:
        engine.add(each)
    engine.post(engine.shutdown)
    engine.serve_forever()
    for each in servers:
        each.server_close()
    assert started == servers


def test_handle_request_and_a_drain_without_serve_forever_call_none() -> None:
    log: list[str] = []
    with recording(log, Machine) as server, Client(server.server_address) as client:
        client.send(b"hi\n").end()
        server.handle_request()
        assert client.rest() == b"hi\n"
        server.drain()
    assert log == []


def test_a_drain_ends_with_on_stop() -> None:
    log: list[str] = []
    with (
        serving(recording(log, Machine, is_open_at_end=False)) as server,
        Client(server.server_address) as client,
    ):
        client.ask(b"hello\n")
        server.drain(timeout=WAIT_S)
        assert client.rest() == b""
        assert log == STARTS + STOPS
    assert log == STARTS + STOPS


def test_on_stop_comes_after_the_last_request() -> None:
    """Outside the main thread, the requests of blocking handlers end with `serve_forever`."""
    log: list[str] = []

    class Closing(Blocking):
        def finish(self) -> None:
            log.append("request ends")
            super().finish()

    with serving(recording(log, Closing, reqtable.TableTCPServer)) as server, Client(server.server_address) as client:
        client.ask(b"hello\n")
    assert log == [*STARTS, "request ends", *STOPS]


def test_a_server_that_is_closed_while_others_are_served_stops_then() -> None:
    log: list[str] = []
    closed = recording(log, Machine, name="closed", is_open_at_end=False)
    other = reqtable.TCPServer(ANY, Machine)
    Engine().add(closed).add(other)
    with serving(other), Client(closed.server_address) as client:
        client.ask(b"hello\n")
        closed.server_close()
        wait_until(other, lambda: len(log) == 4)
        assert log[2:] == ["closed: handler stops", "closed stops"]
        with Client(other.server_address) as another:
            assert another.ask(b"hello\n") == b"hello\n"
    assert len(log) == 4


def test_reloading_the_configuration_calls_none() -> None:
    log: list[str] = []
    with serving(recording(log, Machine)) as server:
        server.engine.post(server.reconfigure, Config(dispatch="pool"))
        with Client(server.server_address) as client:
            wait_until(server, lambda: server._policies.chosen.name == "pool")
            assert client.ask(b"hello\n") == b"hello\n"
        assert log == STARTS


WORKERS = """
import os, reqtable
from reqtable import line, state

class Pid(reqtable.StateRequestHandler):
    @state(line())
    def pid(self, _):
        self.send(b"%d\\n" % os.getpid())
        return self.pid

    @classmethod
    def on_start(cls, server):
        os.write(1, b"start %d\\n" % os.getpid())  # one write: the workers share the pipe

    @classmethod
    def on_stop(cls, server):
        os.write(1, b"stop %d\\n" % os.getpid())

reqtable.serve(Pid, "tcp://127.0.0.1:0", workers=WORKERS)
print("ended", os.getpid())
"""


@pytest.mark.parametrize("workers", [None, 2])
def test_each_worker_starts_and_stops(workers: int | None) -> None:
    program = WORKERS.replace("WORKERS", str(workers))
    with Started([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = [process.stdout.readline().split() for _ in range(workers or 1)]
        process.send_signal(signal.SIGTERM)
        rest = [text.split() for text in process.stdout]
        assert process.wait(WAIT_S) == 0
    pids = {pid for _, pid in started}
    assert (str(process.pid) in pids) == (workers is None)
    assert len(pids) == (workers or 1)
    assert sorted(rest[:-1]) == sorted(["stop", pid] for pid in pids)
    assert rest[-1] == ["ended", str(process.pid)]


# -- what they may do -------------------------------------------------------------------------------------------------


def test_on_start_may_set_timers_and_on_stop_may_cancel_them() -> None:
    class Server(reqtable.TCPServer):
        def on_start(self) -> None:
            self.ticks = threading.Semaphore(0)
            self.tick = self.engine.every(0.001, self.ticks.release)

        def on_stop(self) -> None:
            self.tick.cancel()

    with serving(Server(ANY, Machine)) as server:
        assert server.ticks.acquire(timeout=WAIT_S)
    assert not server.tick.active


@pytest.mark.parametrize("hook", ["on_start", "on_stop"])
def test_a_hook_may_shut_down(hook: str) -> None:
    server: Any = type("Server", (reqtable.TCPServer,), {hook: lambda self: self.shutdown()})(ANY, Machine)
    if hook == "on_stop":
        shut_down_soon(server)
    server.serve_forever()
    server.server_close()


def test_no_hook_may_serve() -> None:
    class Server(reqtable.TCPServer):
        def on_start(self) -> None:
            self.serve_forever()

    with Server(ANY, Machine) as server, pytest.raises(reqtable.ReqtableError, match="running already"):
        server.serve_forever()


def test_on_start_may_add_a_server_and_close_one() -> None:
    log: list[str] = []
    added = recording(log, Machine, name="added")

    class Server(reqtable.TCPServer):
        def on_start(self) -> None:
            self.engine.add(added)
            log.append("first starts")
            self.server_close()

        def on_stop(self) -> None:
            log.append("first stops")

    first = Server(ANY, Machine)
    engine = first.engine
    engine.post(engine.shutdown)
    engine.serve_forever()
    added.server_close()
    ended = ["added: handler stops", "added stops", "first stops"]
    assert log == ["first starts", "added starts", "added: handler starts", *ended]


def test_what_on_stop_sends_leaves() -> None:
    class Server(reqtable.TCPServer):
        def on_stop(self) -> None:
            for entry in self.table:
                entry.handler.send(b"bye\n")

    with serving(Server(ANY, Machine)) as server, Client(server.server_address) as client:
        client.ask(b"hello\n")
        server.shutdown()
        assert client.line() == b"bye\n"


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["server", "handler"])
def test_what_on_start_raises_ends_serve_forever(owner: str) -> None:
    """What has started is stopped. What has failed to start is not."""
    log: list[str] = []
    bug = ValueError("a bug")

    def fail(*_: Any) -> None:
        raise bug

    first, second = recording(log, Machine, name="first"), recording(log, Machine, name="second")
    if owner == "server":
        type(second).on_start = fail
    else:
        second.RequestHandlerClass.on_start = classmethod(fail)
    Engine().add(first).add(second)
    with pytest.raises(ValueError, match="a bug") as caught:
        first.serve_forever()
    assert caught.value is bug
    begun = [] if owner == "server" else ["second starts"]
    ended = [] if owner == "server" else ["second stops"]
    assert log == ["first starts", "first: handler starts", *begun, *ended, "first: handler stops", "first stops"]
    assert len(first.engine.listeners) == 0
    assert not first.engine.steps.running
    assert first._BaseServer__is_shut_down.is_set()
    first.shutdown()  # does not wait
    for server in (first, second):
        server.server_close()


@pytest.mark.parametrize("problem", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_on_stop_raises_is_logged_unless_it_ends_the_program(
    problem: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []
    server = recording(log, Machine)

    def fail(*_: Any) -> None:
        raise problem  # on_stop

    fail.__qualname__ = "Handler.on_stop"
    server.RequestHandlerClass.on_stop = classmethod(fail)
    shut_down_soon(server)
    with contextlib.nullcontext() if problem is ValueError else pytest.raises(problem):
        server.serve_forever()
    assert log == [*STARTS, "server stops"]
    messages = [record.getMessage() for record in caplog.records]
    said = f"Handler.on_stop raised ValueError, in fail ({line_of('# on_stop', __file__)})"
    assert messages == ([said] if problem is ValueError else [])
    server.server_close()


def test_on_stop_is_called_if_an_exception_ends_the_loop() -> None:
    log: list[str] = []

    def leave() -> None:
        raise KeyboardInterrupt

    with recording(log, Machine) as server:
        server.engine.post(leave)
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
    assert log == STARTS + STOPS


@pytest.mark.parametrize("hook", ["on_start", "on_stop"])
def test_a_child_that_returns_from_a_hook_ends_there(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    process = os.getpid()
    statuses: list[int] = []

    def fork(self: Any) -> None:
        child = os.fork()
        if child:
            statuses.append(os.waitpid(child, 0)[1])

    server: Any = type("Server", (reqtable.TCPServer,), {hook: fork})(ANY, Machine)
    shut_down_soon(server)
    try:
        server.serve_forever()
    finally:
        if os.getpid() != process:
            os._exit(1)  # the hook did not end the child
    server.server_close()
    assert statuses == [0]


def test_a_child_whose_exception_runs_through_the_serving_call_calls_no_on_stop(
    capfd: pytest.CaptureFixture[str],
) -> None:
    children: list[int] = []

    class Server(reqtable.TCPServer):
        def service_actions(self) -> None:
            if not children:
                children.append(os.fork())
                if not children[0]:
                    raise SystemExit(0)
                assert os.waitpid(children[0], 0)[1] == 0
                self.shutdown()

    class Handler(Machine):
        @classmethod
        def on_stop(cls, server: Any) -> None:  # noqa: ARG003  # the first to be called
            os.write(1, b"stops\n")

    with Server(ANY, Handler) as server:
        server.engine.post(int)
        server.serve_forever()
    assert capfd.readouterr().out == "stops\n"


# -- whose names they are ---------------------------------------------------------------------------------------------


def test_a_foreign_handler_class_has_no_hooks() -> None:
    with serving(reqtable.TableTCPServer(ANY, Foreign)) as server, Client(server.server_address) as client:
        assert client.ask(b"hello\n") == b"hello\n"


def test_a_blocking_handler_may_have_methods_of_these_names() -> None:
    class Handler(Blocking):
        def on_start(self) -> None:  # type: ignore[override]
            self.wfile.write(b"1\n")

        def handle(self) -> None:
            self.on_start()

    with serving(reqtable.TableTCPServer(ANY, Handler)) as server, Client(server.server_address) as client:
        assert client.rest() == b"1\n"


def test_a_partial_of_a_handler_class_has_the_hooks_of_the_class() -> None:
    started: list[Any] = []

    class Handler(Blocking):
        @classmethod
        def on_start(cls, server: Any) -> None:
            started.append(server)

    with serving(reqtable.TableTCPServer(ANY, partial(Handler))) as server:
        assert started == [server]


class Base(socketserver.TCPServer):
    """A server class that knows nothing of reqtable, and has methods of these names for itself."""

    def on_start(self, event: str) -> str:
        return f"own {event}"

    def on_stop(self) -> None:
        raise AssertionError("called as a hook")


def test_names_of_a_class_behind_the_mix_in_are_its_own(caplog: pytest.LogCaptureFixture) -> None:
    class Server(reqtable.TableMixIn, Base):
        pass

    with serving(Server(ANY, Blocking)) as server:
        assert server.on_start("event") == "own event"
    assert caplog.records == []


def test_methods_in_front_of_the_mix_in_are_hooks() -> None:
    log: list[str] = []

    class Logs:
        def on_start(self) -> None:
            log.append("starts")

    class Server(Logs, reqtable.TableMixIn, socketserver.TCPServer):
        def on_stop(self) -> None:
            log.append("stops")

    with serving(Server(ANY, Blocking)):
        assert log == ["starts"]
    assert log == ["starts", "stops"]


@pytest.mark.parametrize("value", [None, 3, [], lambda: pytest.fail("called")])
def test_attributes_of_these_names_are_the_programs(value: Any) -> None:
    class Server(reqtable.TCPServer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.on_start = value

    class Other(reqtable.TCPServer):
        on_stop: Any = 3

    for kind in (Server, Other):
        with serving(kind(ANY, Machine)):
            pass


def test_a_method_that_takes_arguments_is_the_programs_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Server(reqtable.TCPServer):
        def on_start(self, event: str) -> None: ...  # type: ignore[override]

    with serving(Server(ANY, Machine)):
        pass
    (record,) = caplog.records
    assert "Server.on_start is not called as a hook, because it takes other arguments" in record.getMessage()


def test_a_hook_that_is_async_is_refused() -> None:
    class Server(reqtable.TCPServer):
        async def on_start(self) -> None: ...

    with Server(ANY, Machine) as server, pytest.raises(HandlerError, match=r"Server\.on_start is async def"):
        server.serve_forever()


def define(**methods: Any) -> Callable[[Any], None]:
    return lambda base: type("Wrong", (base,), methods) and None


@pytest.mark.parametrize("base", [Machine, Coroutine])
def test_hooks_of_a_handler_that_can_not_be_called_are_refused(base: Any) -> None:
    def plain(self: Any) -> None: ...

    def other(cls: Any) -> None: ...

    async def coroutine(cls: Any, server: Any) -> None: ...

    with pytest.raises(HandlerError, match=r"Wrong\.on_start must be a class method"):
        define(on_start=plain)(base)
    with pytest.raises(HandlerError, match=r"is called with \(cls, server\), but takes other arguments"):
        define(on_stop=classmethod(other))(base)
    with pytest.raises(HandlerError, match="is async def"):
        define(on_stop=classmethod(coroutine))(base)


@pytest.mark.parametrize("name", ["on_start", "on_stop"])
def test_no_state_may_have_the_name_of_a_hook(name: str) -> None:
    def method(self: Any, text: bytes) -> Any: ...

    method.__name__ = name
    with pytest.raises(HandlerError, match=f"StateRequestHandler has a {name} of its own: rename the state"):
        type("Wrong", (reqtable.StateRequestHandler,), {name: state(line())(method)})
