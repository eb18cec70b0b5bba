"""An exception from code outside the engine ends one request, is reported once, and affects no other request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import Event, Limits, call, line, sleep, state
from reqtable.config import Config, ExecutorOptions
from reqtable.dispatch.policies.thread import RequestThread
from reqtable.table.input import MISSING
from reqtable.table.want import Want
from reqtable.testing import exercise
from tests.support import Client, serving, wait_until
from tests.test_handler_classes import line_of as line_of_file

ANY = ("127.0.0.1", 0)
FILE_BYTES = 8_000_000  # more than the kernel's buffers hold


class Bug(Exception):
    """Raised by the handlers of these tests."""


def line_of(text: str) -> str:
    return line_of_file(text, __file__)


class Abandoned(BaseException):
    """Raised as libraries do to unwind a stack: it is not an Exception."""


FAULTS: list[type[BaseException]] = [Bug, Abandoned, asyncio.CancelledError, GeneratorExit]


def fail() -> Any:
    raise Place.error("a fault")  # a fault


class Place:
    """Says where the fault is, and which exception is raised there."""

    name: ClassVar[str] = ""
    error: ClassVar[type[BaseException]] = Bug

    @classmethod
    def reached(cls, name: str) -> None:
        if cls.name == name:
            fail()


class Breaking(io.RawIOBase):
    """Fails when it is read past its middle. The file has no descriptor."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset
        if self.at > FILE_BYTES // 2:
            Place.reached("file.seek")
        return FILE_BYTES

    def read(self, count: int = -1) -> Any:
        if self.at > FILE_BYTES // 2:
            Place.reached("file.read")
            return {"file.read text": "text", "file.read nothing": None, "file.read too much": bytes(count + 1)}[
                self.place
            ]
        return bytes(count)


class Odd(Want[bytes]):
    """Stands for a want that a program defines."""

    __slots__ = ()

    def take(self, entry: Any) -> Any:
        Place.reached("want.take")
        return MISSING

    def __repr__(self) -> str:
        Place.reached("want.repr")
        return "odd()"


class BadEvent(Odd):
    """Names an event that does not exist."""

    awaits: ClassVar[Any] = "whenever"


class State(reqtable.StateRequestHandler):
    @state(line(limit=100), timeout=20)
    def command(self, text: bytes) -> Any:
        name = text.strip().decode()
        if name == "ping":
            self.send(b"pong\n")
            return self.command
        if name == "step":
            fail()
        return getattr(self, "do_" + name.partition(".")[0])(name)

    def do_file(self, name: str) -> Any:
        self.send_file(Breaking(name), 0, FILE_BYTES)
        return self.command

    def do_truncated(self, name: str) -> Any:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # on_close closes it
        self.file.truncate(FILE_BYTES)
        self.send_file(self.file, 0, FILE_BYTES)
        self.file.truncate(1000)
        return self.command

    def do_closed(self, name: str) -> Any:
        self.do_truncated(name)
        self.file.close()
        return self.command

    def do_want(self, name: str) -> Any:
        return self.waited, BadEvent() if name == "want.awaits" else Odd()

    def do_call(self, name: str) -> Any:
        if name == "call.fn":
            return self.waited, call(fail, on="thread")
        return self.waited, call(int, on="broken")

    def do_on_limit(self, name: str) -> Any:
        return self.command

    @state(timeout=0.05)
    def waited(self, item: Any) -> Any:
        return self.command

    def do_close(self, name: str) -> Any:
        return None

    do_on_close = do_verify = do_hook = do_policy = do_close

    def do_on_timeout(self, name: str) -> Any:
        return self.waited, sleep(10)

    def on_timeout(self) -> Any:
        Place.reached("on_timeout")
        return self.command

    def on_eof(self, partial: bytes) -> Any:
        Place.reached("on_eof")
        return None

    def on_error(self, error: Exception) -> Any:
        raise error

    def on_close(self) -> Any:
        Place.reached("on_close")
        if hasattr(self, "file"):
            self.file.close()


class Coroutine(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line(limit=100), timeout=20):
            name = text.strip().decode()
            if name == "ping":
                await self.send(b"pong\n")
                continue
            if name == "step":
                fail()
            await getattr(self, "do_" + name.partition(".")[0])(name)

    async def do_file(self, name: str) -> None:
        self.send_file(Breaking(name), 0, FILE_BYTES)

    async def do_truncated(self, name: str) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # on_close closes it
        self.file.truncate(FILE_BYTES)
        self.send_file(self.file, 0, FILE_BYTES)
        self.file.truncate(1000)

    async def do_closed(self, name: str) -> None:
        await self.do_truncated(name)
        self.file.close()

    async def do_want(self, name: str) -> None:
        await self.read(BadEvent() if name == "want.awaits" else Odd(), timeout=0.05)

    async def do_call(self, name: str) -> None:
        await (self.call(fail, on="thread") if name == "call.fn" else self.call(int, on="broken"))

    def on_close(self) -> Any:
        Place.reached("on_close")
        if hasattr(self, "file"):
            self.file.close()


class Blocking(reqtable.StreamRequestHandler):
    def setup(self) -> None:
        if Place.name == "setup":
            self.request.recv(100)
            fail()
        super().setup()

    def handle(self) -> None:
        for text in self.rfile:
            name = text.strip().decode()
            if name == "ping":
                self.wfile.write(b"pong\n")
            else:
                Place.reached(name)
                return

    def finish(self) -> None:
        super().finish()
        Place.reached("finish")


class Broken(Executor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        Place.reached("call.submit")

        class Stubborn(Future[Any]):
            def cancel(self) -> bool:
                Place.reached("call.cancel")
                return True

        return Stubborn()


class Server(reqtable.TCPServer):
    """Makes hooks fail for one client. `victim` is its address."""

    victim: Any = None

    def get_request(self) -> tuple[Any, Any]:
        request, address = super().get_request()
        if self.victim == "next":
            self.victim = address
            self.descriptor = request.fileno()
            if Place.name == "get_request":
                request.close()
                fail()
        return request, address

    def _reach(self, name: str, address: Any) -> None:
        if address == self.victim:
            Place.reached(name)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self._reach("verify_request", client_address)
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        self._reach("process_request", client_address)
        super().process_request(request, client_address)
        self._reach("process_request at its end", client_address)

    def close_request(self, request: Any) -> None:
        if request.fileno() == getattr(self, "descriptor", None):
            Place.reached("close_request")
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        super().handle_error(request, client_address)
        self._reach("handle_error", client_address)


@pytest.fixture(autouse=True)
def no_fault_is_left() -> Iterator[None]:
    yield
    Place.name, Place.error = "", Bug


CONFIG = Config(
    executors={"broken": ExecutorOptions("tests.test_failures:Broken")}, limits=Limits(linger_timeout_s=0.5)
)


def run(
    handler: Any,
    dispatch: str,
    place: str,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException] = Bug,
    command: str | None = None,
    ending: str = "error",
    entries: int = 1,
    server_class: type[Server] = Server,
) -> list[logging.LogRecord]:
    """Serve two clients, one of which meets the fault. Returns the messages logged at ERROR."""
    caplog.set_level(logging.WARNING, "reqtable")
    with serving(server_class(ANY, handler, dispatch=dispatch, config=CONFIG)) as server:
        with Client(server.server_address) as other:
            assert other.ask(b"ping\n") == b"pong\n"  # it has begun before anything goes wrong
            other.send(b"pi")
            Place.name, Place.error = place, error
            server.victim = "next"
            with Client(server.server_address) as victim:
                with contextlib.suppress(ConnectionError):  # it may be over before the command comes
                    victim.send((command or place).encode() + b"\n")
                    if place == "on_eof":
                        victim.end()
                    victim.rest()
            wait_until(server, lambda: len(server.table) == 1)
            Place.name = ""
            assert other.send(b"ng\n").line() == b"pong\n"
            finished = {name: count for name, count in server.stats()["finished"].items() if count}
            assert finished == ({ending: 1} if entries else {})
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


STEPPED = [(State, "inline"), (State, "pool"), (State, "thread"), (Coroutine, "inline"), (Coroutine, "thread")]


@pytest.mark.parametrize(("handler", "dispatch"), STEPPED)
@pytest.mark.parametrize("error", FAULTS)
def test_what_a_step_raises(
    handler: Any, dispatch: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    [record] = run(handler, dispatch, "step", caplog, error)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], error | reqtable.HandlerError)


@pytest.mark.parametrize(("handler", "dispatch"), STEPPED)
@pytest.mark.parametrize("place", ["file.seek", "file.read"])
def test_what_a_file_raises(handler: Any, dispatch: str, place: str, caplog: pytest.LogCaptureFixture) -> None:
    [record] = run(handler, dispatch, place, caplog, RuntimeError)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], reqtable.SendFileError)
    assert isinstance(record.exc_info[1].__cause__, RuntimeError)


@pytest.mark.parametrize("place", ["file.seek", "file.read"])
@pytest.mark.parametrize("error", FAULTS[1:])
def test_what_a_file_raises_that_is_no_exception(
    place: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    [record] = run(State, "inline", place, caplog, error)
    assert record.exc_info is not None
    assert type(record.exc_info[1]) is error


@pytest.mark.parametrize("place", ["file.read text", "file.read nothing", "file.read too much"])
def test_a_file_that_gives_what_no_file_gives(place: str, caplog: pytest.LogCaptureFixture) -> None:
    [record] = run(State, "inline", place, caplog)
    assert "that is being sent: read(" in record.getMessage()


@pytest.mark.parametrize("place", ["truncated", "closed"])
@pytest.mark.parametrize(("handler", "dispatch"), [*STEPPED[:3], (Coroutine, "inline")])
def test_a_file_that_ends_early_or_is_closed_is_not_the_peers_doing(
    handler: Any, dispatch: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    [record] = run(handler, dispatch, "", caplog, command=place)
    assert ("bytes early" if place == "truncated" else "closed file") in record.getMessage()


@pytest.mark.parametrize(("handler", "dispatch"), STEPPED)
@pytest.mark.parametrize("error", FAULTS[:2])
def test_what_a_want_raises(
    handler: Any, dispatch: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(run(handler, dispatch, "want.take", caplog, error)) == 1


@pytest.mark.parametrize(("handler", "dispatch"), STEPPED)
def test_a_want_that_waits_for_no_event(handler: Any, dispatch: str, caplog: pytest.LogCaptureFixture) -> None:
    assert len(run(handler, dispatch, "", caplog, command="want.awaits")) == 1


def test_a_want_that_can_not_be_shown(caplog: pytest.LogCaptureFixture) -> None:
    """The timeout of such a want still works, and the table can be shown."""
    with serving(Server(ANY, State, config=CONFIG)) as server, Client(server.server_address) as victim:
        Place.name = "want.repr"
        victim.send(b"want\n")
        wait_until(server, lambda: isinstance(next(iter(server.table)).want, Odd) or victim.socket.fileno() < 0)
        assert {row["waits_for"] for row in server.table.snapshot()} <= {
            "<Odd, which fails to describe itself>",
            "line(limit=100)",
        }
        assert victim.ask(b"ping\n") == b"pong\n"


@pytest.mark.parametrize(("handler", "dispatch"), STEPPED)
@pytest.mark.parametrize("place", ["call.fn", "call.submit"])
@pytest.mark.parametrize("error", [Bug, Abandoned])
def test_what_a_call_or_its_executor_raises(
    handler: Any, dispatch: str, place: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(run(handler, dispatch, place, caplog, error)) == 1


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
@pytest.mark.parametrize("error", [Bug, Abandoned])
@pytest.mark.parametrize(
    ("place", "command"), [("on_timeout", "on_timeout"), ("on_eof", "ping"), ("on_close", "close")]
)
def test_what_the_other_hooks_of_a_handler_raise(
    dispatch: str, place: str, command: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(run(State, dispatch, place, caplog, error, command=command)) == 1


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("place", ["step", "setup", "finish"])
@pytest.mark.parametrize("error", FAULTS)
def test_what_a_blocking_handler_raises(
    dispatch: str, place: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    if dispatch == "inline":
        return inline_blocking(place, error, caplog)
    assert len(run(Blocking, dispatch, place, caplog, error)) == 1


def inline_blocking(place: str, error: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    """Run the test under `inline`, where blocking handlers serve clients one after the other."""
    caplog.set_level(logging.WARNING, "reqtable")
    with serving(Server(ANY, Blocking, config=CONFIG)) as server:
        Place.name, Place.error = place, error
        with Client(server.server_address) as victim:
            assert victim.send(place.encode() + b"\n").rest() == b""
        wait_until(server, lambda: not server.table)
        Place.name = ""
        with Client(server.server_address) as other:
            assert other.ask(b"ping\n") == b"pong\n"
        assert server.stats()["finished"]["error"] == 1
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("error", [Bug, Abandoned])
@pytest.mark.parametrize(
    ("place", "entries"),
    [
        ("get_request", 0),
        ("verify_request", 0),
        ("process_request", 0),
        ("process_request at its end", 1),
        ("close_request", 1),
    ],
)
def test_what_a_hook_of_the_server_raises(
    dispatch: str, place: str, entries: int, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(run(State, dispatch, place, caplog, error, command="close", entries=entries)) == 1


@pytest.mark.parametrize(
    ("handler", "command", "ending"),
    [
        (State, "step", "error"),
        (State, "truncated", "error"),
        (State, "x" * 200, "limit"),
        (State, "close", "done"),
        (Coroutine, "step", "error"),
        (Coroutine, "want", "timeout"),
        (Blocking, "step", "error"),
        (Blocking, "ping", "done"),
    ],
)
def test_a_forked_request_counts_by_how_it_ended_in_its_child(
    handler: Any, command: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The child logs the error. The parent logs nothing."""
    Place.name = command
    with serving(Server(ANY, handler, dispatch="fork", config=CONFIG)) as server:
        with Client(server.server_address) as client:
            client.send(command.encode() + b"\n")
            if ending != "timeout":
                client.end()
            client.rest()
        wait_until(server, lambda: not server.table)
        finished = {name: count for name, count in server.stats()["finished"].items() if count}
        assert finished == {ending: 1}
    assert not caplog.records


@pytest.mark.parametrize("dispatch", ["greenlet", "thread", "pool"])
@pytest.mark.parametrize("error", [Bug, Abandoned])
def test_what_a_hook_raises_once_a_blocking_handler_has_begun(
    dispatch: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    assert len(run(Blocking, dispatch, "process_request at its end", caplog, error, command="ping")) == 1


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
@pytest.mark.parametrize("error", [Bug, Abandoned])
def test_what_handle_error_raises(dispatch: str, error: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    first, second = run(State, dispatch, "handle_error", caplog, error, command="no_such_method")
    assert "request 2: AttributeError: 'State' object has no attribute" in first.getMessage()
    assert f"handle_error raised {error.__name__}" in second.getMessage()


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
def test_what_a_logger_raises(dispatch: str, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """The program's logging handler raises for an error and for each line of the access log."""

    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            Place.reached("logger")

    failing = Failing()
    loggers = [logging.getLogger("reqtable"), logging.getLogger("reqtable.access")]
    level = loggers[1].level
    loggers[0].addHandler(failing)
    loggers[1].setLevel(logging.INFO)
    try:
        run(State, dispatch, "logger", caplog, command="no_such_method")
    finally:
        loggers[0].removeHandler(failing)
        loggers[1].setLevel(level)
    assert "a fault" in capfd.readouterr().err


def test_a_request_that_was_given_up_ends_though_its_call_can_not_be_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(run(State, "inline", "call.cancel", caplog, command="call.cancel")) == 1


def test_a_sockets_failure_that_is_not_the_peers_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    class Exhausted(socket.socket):
        def send(self, *args: Any) -> int:
            raise OSError(errno.ENOBUFS, "the kernel has no memory")

    class Exhausting(Server):
        def get_request(self) -> tuple[Any, Any]:
            request, address = super().get_request()
            if self.victim == address:
                request = Exhausted(fileno=request.detach())
            return request, address

    [record] = run(State, "inline", "", caplog, command="ping", server_class=Exhausting)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OSError)


class Datagrams(reqtable.StateRequestHandler):
    @state(reqtable.datagram(), timeout=20)
    def command(self, data: bytes) -> Any:
        if data == b"file":
            self.send_file(Breaking("file.read"), FILE_BYTES - 1, 1)
        elif data == b"large":
            self.send(bytes(70_000))
        else:
            self.send(data)
        return None if data == b"bye" else self.command


@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
@pytest.mark.parametrize("command", [b"file", b"large"])
def test_a_datagram_that_can_not_be_sent_ends_its_session_alone(
    dispatch: str, command: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "reqtable")
    Place.name = "file.read"
    with serving(reqtable.UDPServer(ANY, Datagrams, dispatch=dispatch)) as server:
        peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        for peer in peers:
            peer.settimeout(20)
            peer.connect(server.server_address)
            peer.send(b"hello")
            assert peer.recv(100) == b"hello"
        peers[0].send(command)
        wait_until(server, lambda: len(server.table) == 1)
        peers[1].send(b"hello again")
        assert peers[1].recv(100) == b"hello again"
        assert server.stats()["finished"]["error"] == 1
        peers[1].send(b"bye")
        assert peers[1].recv(100) == b"bye"
        for peer in peers:
            peer.close()
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OSError if command == b"large" else reqtable.SendFileError)


def test_a_connection_that_a_handler_was_refused_is_not_its_peers_doing(caplog: pytest.LogCaptureFixture) -> None:
    class Asking(State):
        @state(line())
        def command(self, text: bytes) -> Any:
            if text == b"ping\n":
                self.send(b"pong\n")
                return self.command
            raise ConnectionRefusedError("the database is down")

    run(Asking, "inline", "", caplog, command="ask", ending="reset")
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("error", FAULTS)
def test_a_get_request_that_always_fails_is_not_called_at_once_again_and_holds_up_no_drain(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Never(reqtable.TCPServer):
        def get_request(self) -> tuple[Any, Any]:
            raise error("never")  # never

    limits = Limits(accept_pause_s=3600)
    with serving(Never(ANY, State, config=Config(limits=limits))) as server, Client(server.server_address):
        wait_until(server, lambda: bool(caplog.records))
        passes = server.stats()["loop"]["passes"]
        wait_until(server, lambda: server.stats()["loop"]["passes"] >= passes + 3)
        assert len(caplog.records) == 1
        server.drain(0.1)
    assert [record.getMessage() for record in caplog.records] == [
        f"outside of any request: {error.__name__}: never, in Never.get_request ({line_of('# never')})"
    ] * 2


@pytest.mark.parametrize("kind", ["proc", "pipe", "empty"])
def test_a_file_without_a_size_takes_a_count(kind: str) -> None:
    reader, writer = os.pipe()
    path = {"proc": "/proc/self/status", "pipe": f"/dev/fd/{reader}", "empty": os.devnull}[kind]
    sizes = []

    class Sends(reqtable.StateRequestHandler):
        def start(self) -> Any:
            with open(path, "rb") if kind != "empty" else tempfile.TemporaryFile() as file:
                self.send_file(file)
                sizes.append(self.entry.output.size)
            return None

    if kind == "empty":
        exercise(Sends).expect_end()
        assert sizes == [0]
    else:
        with pytest.raises(ValueError, match=r"send_file\(\) can't tell the size of .*: give a count"):
            exercise(Sends)
    os.close(reader)
    os.close(writer)


def test_a_file_that_says_not_now_of_its_descriptor_is_read() -> None:
    class Busy(io.BytesIO):
        def fileno(self) -> int:
            raise BlockingIOError

    class Sends(State):
        def start(self) -> Any:
            self.send_file(Busy(b"all of it"), 0, 9)
            return None

    with serving(Server(ANY, Sends)) as server, Client(server.server_address) as client:
        assert client.rest() == b"all of it"


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # as in `socketserver`, no hook closes it
@pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
def test_what_handle_request_raises_keeps_no_connection_open(dispatch: str) -> None:
    """The connection closes once the caller has dropped the exception, without a garbage collection."""

    class Refusing(reqtable.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            raise Bug

    gc.disable()
    try:
        with Refusing(ANY, Blocking, dispatch=dispatch) as server, Client(server.server_address) as client:
            with contextlib.suppress(Bug):
                server.handle_request()
            assert client.rest() == b""
    finally:
        gc.enable()


def test_a_request_for_which_there_is_no_thread_waits_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    start = RequestThread.start

    def start_one(self: RequestThread) -> None:
        attempts.append(self)
        if len(attempts) > 1:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(RequestThread, "start", start_one)
    with serving(Server(ANY, Blocking, dispatch="thread")) as server:
        clients = [Client(server.server_address) for _ in range(3)]
        wait_until(server, lambda: len(attempts) == 3)
        clients[0].close()  # the one thread that there was is over, and none can be begun in its place
        wait_until(server, lambda: not server.table)
        assert [client.rest() for client in clients[1:]] == [b"", b""]
        assert len(attempts) == 5
        for client in clients[1:]:
            client.close()


def test_a_hook_that_fails_after_a_proxys_header_ends_the_request(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(reqtable.TableTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            super().process_request(request, client_address)
            raise Bug

    config = Config(proxy=reqtable.ProxyOptions(trusted=("127.0.0.1",)))
    with serving(Failing(ANY, Blocking, config=config)) as server, Client(server.server_address) as client:
        client.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
        assert client.rest() == b""
        wait_until(server, lambda: not server.table)
        assert server.stats()["finished"]["error"] == 1
    assert len(caplog.records) == 1


def test_a_datagram_that_waited_for_a_session_and_can_not_be_served_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = []

    class Once(reqtable.StateRequestHandler):
        """Reads nothing, so each later datagram begins a new request."""

        def __init__(self, entry: Any) -> None:
            super().__init__(entry)
            made.append(self)
            if len(made) > 1:
                raise Bug

        @state(sleep(0.05))
        def wait(self, _: None) -> Any:
            return None

    with serving(reqtable.UDPServer(ANY, Once)) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.connect(server.server_address)
            peer.send(b"1")
            peer.send(b"2")
            wait_until(server, lambda: bool(caplog.records))
            address = peer.getsockname()
    [record] = caplog.records
    assert record.getMessage().startswith(f"{address[0]}:{address[1]}: Bug, in Once.__init__ ({__file__}:")


def test_a_post_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Server(ANY, State)) as server:
        server.engine.post(fail)
        timed = threading.Event()
        server.engine.post(server.engine.loop.mailbox.call_later, fail)
        server.engine.post(server.engine.loop.mailbox.call_later, timed.set)
        assert timed.wait(20)
        with Client(server.server_address) as client:
            assert client.ask(b"ping\n") == b"pong\n"
    said = f"outside of any request: Bug: a fault, in fail ({line_of('# a fault')})"
    assert [record.getMessage() for record in caplog.records] == [said] * 2


def test_a_transition_that_the_trace_does_not_take(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Server(ANY, State)) as server:

        def trace(entry: Any, before: Any, event: Event) -> None:
            if event is Event.FINISHED and entry.peer == server.victim:
                fail()

        server.table.on_transition = trace
        server.victim = "next"
        with Client(server.server_address) as victim:
            victim.send(b"close\n").rest()
        wait_until(server, lambda: not server.table)
        with Client(server.server_address) as client:
            assert client.ask(b"ping\n") == b"pong\n"
        assert server.stats()["finished"]["error"] == 1
