"""`[greenlet] suspend_all_sockets`: whatever a blocking handler waits for suspends its own request, and no other.

Each call is made twice, under policy `thread`, where nothing is replaced, and under `greenlet`, and gives the same.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import functools
import gc
import os
import queue
import select
import selectors
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ConfigurationError, Engine, GreenletOptions, State
from reqtable.dispatch.green.all_sockets import REPLACEMENTS
from reqtable.dispatch.green.waiting import Watch
from reqtable.testing import SimNetwork
from tests.certificates import client_context, server_context
from tests.support import WAIT_S, Client, serving, wait_until

ANY = ("127.0.0.1", 0)
ON = Config(dispatch="greenlet", greenlet=GreenletOptions(suspend_all_sockets=True))
BIG = bytes(range(256)) * 16_384  # 4 MiB: more than the kernel takes at once
WAITING, SLEEPING, OFFLOADED = State.WAITING, State.SLEEPING, State.OFFLOADED
TIMEOUTS = pytest.mark.parametrize("timeout", [None, WAIT_S], ids=["blocking", "with a timeout"])

Operation = Callable[[], Any]


class Server(reqtable.TCPServer):
    """Keeps the errors passed to `handle_error`."""

    request_queue_size = 1024

    def __init__(self, handler: Any, config: Config = ON, **options: Any) -> None:
        super().__init__(ANY, handler, config=config, **options)
        self.failures: list[BaseException | None] = []
        self.seen: list[tuple[State, str]] = []  # the states that requests have been in, and what they waited for
        self.table.on_transition = lambda entry, *_: self.seen.append((entry.state, repr(entry.want)))

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.failures.append(sys.exc_info()[1])

    def waits(self, state: State, shown: str = "") -> None:
        """Wait until a request is in that state, or was, and says what it waits for."""

        def holds() -> bool:
            now = [(each.state, repr(each.want)) for each in self.table]
            return any(each is state and shown in text for each, text in (*now, *self.seen))

        wait_until(self, holds)

    def wait_for_no_request(self) -> None:
        wait_until(self, lambda: not len(self.table))


class Commands(reqtable.StreamRequestHandler):
    """Does for each line what the test says, and answers `done`; `ping` is answered at once."""

    operation: Operation
    results: queue.Queue[Any]

    def handle(self) -> None:
        for text in self.rfile:
            if text == b"ping\n":
                self.wfile.write(b"pong\n")
                continue
            try:
                result = type(self).operation()
            except Exception as error:
                result = (type(error), str(error))
            type(self).results.put(result)
            self.wfile.write(b"done\n")


@contextlib.contextmanager
def commanded(operation: Operation, config: Config = ON) -> Iterator[tuple[Server, Client, queue.Queue[Any]]]:
    """Serve `Commands`. Yields the server, a client, and the queue of results."""
    results: queue.Queue[Any] = queue.Queue()
    handler = type("Handler", (Commands,), {"operation": staticmethod(operation), "results": results})
    with serving(Server(handler, config)) as server, Client(server.server_address) as client:
        yield server, client, results
        assert server.failures == []


def perform(operation: Operation, state: State, shown: str, meanwhile: Operation | None = None) -> Any:
    """Return the result of `operation` in a handler. While it waits, another client is answered; then `meanwhile` runs.

    `state` is the state in which the request waits, and `shown` is part of what its row says. If `meanwhile` is None,
    the wait ends by itself.
    """
    with commanded(operation) as (server, client, results):
        client.send(b"go\n")
        if meanwhile is not None:
            server.waits(state, shown)
            with Client(server.server_address) as other:
                assert other.ask(b"ping\n") == b"pong\n"
            meanwhile()
        assert client.line() == b"done\n"
        assert meanwhile or any(each is state and shown in text for each, text in server.seen)
        assert client.ask(b"ping\n") == b"pong\n"  # its own socket works as before
        assert not Watch.by_number
        return results.get(timeout=WAIT_S)


def at_once(operation: Operation) -> Any:
    """Return the result of `operation` in a handler, which does not wait."""
    with commanded(operation) as (server, client, results):
        assert client.ask(b"go\n") == b"done\n"
        assert not {WAITING, SLEEPING, OFFLOADED} & {state for state, _ in server.seen}
        return results.get(timeout=WAIT_S)


def plainly(operation: Operation, meanwhile: Operation = bool) -> Any:
    """Return the result of `operation` in a handler under policy `thread`."""
    with commanded(operation, Config(dispatch="thread")) as (_, client, results):
        client.send(b"go\n")
        meanwhile()
        return results.get(timeout=WAIT_S)


# -- sockets ----------------------------------------------------------------------------------------------------------


def into(receive: str, *arguments: Any) -> Callable[[Any], Any]:
    def operation(sock: Any) -> Any:
        buffer = bytearray(8)
        target = [buffer] if receive == "recvmsg_into" else buffer
        return getattr(sock, receive)(target, *arguments), bytes(buffer)

    return operation


def file_line(sock: Any) -> bytes:
    with sock.makefile("rb") as file:
        return file.readline()  # type: ignore[no-any-return]


READS: dict[str, Callable[[Any], Any]] = {
    "recv": lambda sock: sock.recv(100),
    "recv, peeking": lambda sock: (sock.recv(100, socket.MSG_PEEK), sock.recv(100)),
    "recv, all": lambda sock: sock.recv(6, socket.MSG_WAITALL)[:6],
    "recv_into": into("recv_into"),
    "recv_into, some": into("recv_into", 3),
    "recv_into, all": into("recv_into", 6, socket.MSG_WAITALL),
    "recvfrom": lambda sock: sock.recvfrom(100),
    "recvfrom_into": into("recvfrom_into"),
    "recvmsg": lambda sock: sock.recvmsg(100),
    "recvmsg_into": into("recvmsg_into"),
    "a file": file_line,
}


@TIMEOUTS
@pytest.mark.parametrize("name", READS)
def test_reading_suspends_the_request_alone(name: str, timeout: float | None) -> None:
    told = []
    for run in (plainly, lambda *args: perform(args[0], WAITING, "socket readable", args[1])):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.settimeout(timeout)
            told.append(run(lambda theirs=theirs: READS[name](theirs), lambda ours=ours: ours.sendall(b"hello\n")))
            assert theirs.gettimeout() == timeout
            assert os.get_blocking(theirs.fileno()) is (timeout is None)
    assert told[0] == told[1]


WRITES: dict[str, Callable[[Any], Any]] = {
    "sendall": lambda sock: sock.sendall(BIG),
    "sendall, an array": lambda sock: sock.sendall(memoryview(BIG).cast("I")),
    "send": lambda sock: sock.send(BIG) > 0,
    "sendmsg": lambda sock: sock.sendmsg([BIG[:100], BIG[100:]]) > 0,
    "a file": lambda sock: sock.makefile("wb").write(BIG),
}


@TIMEOUTS
@pytest.mark.parametrize("name", WRITES)
def test_writing_suspends_the_request_alone(name: str, timeout: float | None) -> None:
    told = []
    for run in (plainly, lambda *args: perform(args[0], WAITING, "socket writable", args[1])):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.settimeout(timeout)
            ours.settimeout(WAIT_S)
            filled = fill(theirs)
            received: list[bytes] = []

            def read_all(ours: Any = ours, filled: int = filled, received: list[bytes] = received) -> None:
                count = filled + (len(BIG) if timeout is None or "all" in name or "file" in name else 1)
                while count > 0:
                    received.append(ours.recv(1 << 20))
                    count -= len(received[-1])

            told.append(run(lambda theirs=theirs: WRITES[name](theirs), read_all))
            data = b"".join(received)[filled:]
            assert data == BIG[: len(data)]
            told[-1] = told[-1], len(data) == len(BIG)
    if timeout is not None and name in ("send", "sendmsg"):  # how much is sent at once depends on the kernel
        assert told[0][0] is told[1][0] is True
    else:
        assert told[0] == told[1]


def fill(sock: socket.socket) -> int:
    """Send until the kernel takes no more. Returns the number of bytes."""
    timeout, count = sock.gettimeout(), 0
    sock.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while True:
            count += sock.send(b"\0" * 65_536)
    sock.settimeout(timeout)
    return count


def test_a_file_is_sent(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(BIG)
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "big").open("rb") as file:

        def read_all() -> None:
            left = len(BIG)
            while left:
                left -= len(ours.recv(1 << 20))

        assert perform(lambda: theirs.sendfile(file), WAITING, "socket writable", read_all) == len(BIG)


def test_a_timeout_is_that_of_the_socket_module() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0.02)
        assert perform(lambda: theirs.recv(1), WAITING, "") == (TimeoutError, "timed out")
        fill(theirs)
        assert perform(lambda: theirs.sendall(BIG), WAITING, "") == (TimeoutError, "timed out")
        theirs.settimeout(0)
        assert at_once(lambda: theirs.recv(1))[0] is BlockingIOError
        theirs.settimeout(None)
        assert at_once(lambda: theirs.recv(1, socket.MSG_DONTWAIT))[0] is BlockingIOError


def test_a_timeout_begins_with_the_call() -> None:
    """Not with the pass of the loop, which the handler has made long before."""
    ours, theirs = socket.socketpair()

    def receive() -> bool:
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass
        with contextlib.suppress(TimeoutError):
            theirs.recv(1)
        return time.monotonic() >= until + 0.05

    with ours, theirs:
        theirs.settimeout(0.05)
        assert perform(receive, WAITING, "") is True


def test_a_default_timeout_is_that_of_the_handlers_sockets() -> None:
    def recv_by_duplicate() -> bytes:
        with theirs.dup() as copy:
            return copy.recv(5)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.setdefaulttimeout(0.02)
        try:
            assert (
                perform(lambda: theirs.recv(5), WAITING, "socket readable", lambda: ours.sendall(b"hello")) == b"hello"
            )
            assert os.get_blocking(theirs.fileno())
            assert perform(recv_by_duplicate, WAITING, "", lambda: ours.sendall(b"hello")) == b"hello"
            theirs.settimeout(0.02)
            assert perform(lambda: theirs.recv(1), WAITING, "") == (TimeoutError, "timed out")
        finally:
            socket.setdefaulttimeout(None)


CALLS: dict[str, Callable[[Any], Any]] = {
    **READS,
    **WRITES,
    "sendto": lambda sock: sock.sendto(b"x", ("127.0.0.1", 9)),
    "accept": lambda sock: sock.accept(),
    "connect": lambda sock: sock.connect(("127.0.0.1", 9)),
    "connect_ex": lambda sock: sock.connect_ex(("127.0.0.1", 9)),
}


@pytest.mark.parametrize("timeout", [None, 1])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_on_a_closed_socket_fails_as_ever(name: str, timeout: float | None) -> None:
    with socket.socket() as closed:
        closed.settimeout(timeout)
    assert at_once(lambda: CALLS[name](closed)) == plainly(lambda: CALLS[name](closed))


@TIMEOUTS
def test_accepting_suspends_the_request_alone(timeout: float | None) -> None:
    with socket.create_server(ANY) as listening:
        listening.settimeout(timeout)

        def accept() -> tuple[bytes, float | None]:
            own, _ = listening.accept()
            with own:
                return own.recv(1), own.gettimeout()

        def connect() -> None:
            Client(listening.getsockname()).send(b"x").close()

        assert perform(accept, WAITING, "socket readable (fd", connect) == (b"x", None)
        assert os.get_blocking(listening.fileno()) is (timeout is None)


@TIMEOUTS
def test_connecting_to_a_full_unix_socket_suspends_the_request_alone(timeout: float | None, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(path)
        listening.listen(0)
        stack.enter_context(Client(path, socket.AF_UNIX))  # fills the queue

        def connect() -> float | None:
            with socket.socket(socket.AF_UNIX) as own:
                own.settimeout(timeout)
                own.connect(path)
                assert os.get_blocking(own.fileno()) is (timeout is None)
                return own.gettimeout()

        assert perform(connect, SLEEPING, "", lambda: listening.accept()[0].close()) == timeout


def full_listener(stack: contextlib.ExitStack) -> Any:
    """Return the address of a listening TCP socket that accepts no more connections."""
    listening = stack.enter_context(socket.create_server(ANY, backlog=0))
    stack.enter_context(socket.create_connection(listening.getsockname()))
    return listening.getsockname()


def test_connecting_to_a_full_tcp_socket_times_out() -> None:
    with contextlib.ExitStack() as stack:
        address = full_listener(stack)

        def connect() -> None:
            with socket.socket() as own:
                own.settimeout(0.05)
                own.connect(address)

        def connect_ex() -> int:
            with socket.socket() as own:
                own.settimeout(0.05)
                return own.connect_ex(address)

        assert perform(connect, WAITING, "socket writable") == (TimeoutError, "timed out")
        assert perform(connect_ex, WAITING, "") == plainly(connect_ex) == errno.EAGAIN


def test_connecting_to_nobody_is_refused() -> None:
    with socket.socket() as bound:
        bound.bind(ANY)
        address = bound.getsockname()

        def connect_ex() -> int:
            with socket.socket() as own:
                return own.connect_ex(address)

        for operation in (lambda: socket.create_connection(address), connect_ex):
            assert perform(operation, WAITING, "") == plainly(operation)


def test_datagrams_suspend_the_request_alone() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as ours, socket.socket(type=socket.SOCK_DGRAM) as theirs:
        ours.bind(ANY)
        theirs.bind(ANY)
        ours.settimeout(WAIT_S)

        def exchange() -> tuple[int, Any]:
            port = ours.getsockname()[1]
            return theirs.sendto(b"ask", ("localhost", port)), theirs.recvfrom(10)

        def answer() -> None:
            data, address = ours.recvfrom(10)
            ours.sendto(data, address)

        assert perform(exchange, WAITING, "socket readable", answer) == (3, (b"ask", ours.getsockname()))


def test_a_full_unix_datagram_socket_suspends_the_request_alone(tmp_path: Path) -> None:
    """The kernel says that one can write to it, and refuses the datagram."""
    path = str(tmp_path / "s")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs,
    ):
        ours.bind(path)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.sendto(b"x", socket.MSG_DONTWAIT, path)

        assert perform(lambda: theirs.sendto(b"ask", path), SLEEPING, "", lambda: ours.recv(10)) == 3


# -- TLS --------------------------------------------------------------------------------------------------------------


@TIMEOUTS
@pytest.mark.parametrize("wrapped_first", [False, True], ids=["connected, then wrapped", "wrapped, then connected"])
def test_a_tls_client_suspends_the_request_alone(timeout: float | None, wrapped_first: bool) -> None:
    with socket.create_server(ANY) as listening:
        address = listening.getsockname()
        accepted: list[Any] = []

        def talk() -> Any:
            sock = socket.socket()
            sock.settimeout(timeout)
            if not wrapped_first:
                sock.connect(address)
            with client_context().wrap_socket(sock, server_hostname="127.0.0.1") as own:
                if wrapped_first:
                    own.connect(address)
                own.sendall(BIG)
                lines = own.makefile("rb").readline()
                assert own.gettimeout() == timeout
                own.unwrap()
                return lines

        def serve() -> None:
            sock, _ = listening.accept()
            sock.settimeout(WAIT_S)
            accepted.append(server_context().wrap_socket(sock, server_side=True))
            left = len(BIG)
            while left:
                left -= len(accepted[0].recv(65_536))
            accepted[0].sendall(b"hello\n")
            with contextlib.suppress(OSError):
                accepted[0].unwrap()

        assert perform(talk, WAITING, "socket readable", serve) == b"hello\n"
        accepted[0].close()


def receive_big(sock: Any) -> None:
    left = len(BIG)
    while left:
        left -= len(sock.recv(65_536))


TLS_CALLS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "recv": (lambda sock: sock.recv(10), lambda ours: ours.sendall(b"hello")),
    "recv_into": (into("recv_into"), lambda ours: ours.sendall(b"hello")),
    "read": (lambda sock: sock.read(10), lambda ours: ours.sendall(b"hello")),
    "write": (lambda sock: sock.write(BIG), receive_big),
    "send": (lambda sock: sock.send(BIG), receive_big),
    "sendall": (lambda sock: sock.sendall(BIG), receive_big),
    "unwrap": (lambda sock: sock.unwrap().recv(1), lambda ours: ours.unwrap().send(b"x")),
}


@TIMEOUTS
@pytest.mark.parametrize("name", TLS_CALLS)
def test_a_call_by_tls_suspends_the_request_alone(name: str, timeout: float | None) -> None:
    operation, meanwhile = TLS_CALLS[name]
    told = []
    for run in (plainly, lambda *args: perform(args[0], WAITING, "socket", args[1])):
        with contextlib.ExitStack() as stack:
            ours, theirs = tls_pair(stack)
            theirs.settimeout(timeout)
            told.append(run(lambda theirs=theirs: operation(theirs), lambda ours=ours: meanwhile(ours)))
    assert told[0] == told[1]


def tls_pair(stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """Return the server's and the client's end of an encrypted connection."""
    pair = socket.socketpair()
    secured: list[Any] = []
    wrap = functools.partial(server_context().wrap_socket, pair[0], server_side=True)
    thread = threading.Thread(target=lambda: secured.append(wrap()))
    thread.start()
    theirs = stack.enter_context(client_context().wrap_socket(pair[1], server_hostname="127.0.0.1"))
    thread.join(WAIT_S)
    ours = stack.enter_context(secured[0])
    ours.settimeout(WAIT_S)
    return ours, theirs


def test_a_tls_handshake_times_out() -> None:
    with socket.create_server(ANY) as listening:

        def talk() -> None:
            with socket.create_connection(listening.getsockname(), 0.05) as sock:
                client_context().wrap_socket(sock, server_hostname="127.0.0.1")

        assert perform(talk, WAITING, "") == (TimeoutError, "timed out")


def test_a_non_blocking_tls_socket_does_not_wait() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0)

        def talk() -> None:
            with client_context().wrap_socket(
                theirs, server_hostname="127.0.0.1", do_handshake_on_connect=False
            ) as own:
                own.do_handshake()

        assert at_once(talk)[0] is ssl.SSLWantReadError


# -- time, select, names ----------------------------------------------------------------------------------------------


def test_sleeping_suspends_the_request_alone() -> None:
    def sleep() -> bool:
        begun = time.monotonic()
        time.sleep(0.1)
        return time.monotonic() - begun >= 0.1

    assert perform(sleep, SLEEPING, "sleep(seconds=0.1)") is True


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1", None, 1e300])
def test_what_is_no_time_to_sleep_is_refused_as_ever(seconds: Any) -> None:
    assert at_once(lambda: time.sleep(seconds)) == plainly(lambda: time.sleep(seconds))


def polled(sock: Any, timeout: float | None) -> Any:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    poll.modify(sock, select.POLLIN)
    poll.register(0, select.POLLIN)
    poll.unregister(0)
    return [events for _, events in poll.poll(None if timeout is None else timeout * 1000)]


def epolled(sock: Any, timeout: float | None) -> Any:
    with select.epoll() as epoll:
        assert isinstance(epoll, select.epoll)
        assert not epoll.closed
        epoll.register(sock, select.EPOLLIN)
        return [events for _, events in epoll.poll(timeout)]


def selected_by(kind: type[selectors.BaseSelector]) -> Callable[[Any, float | None], Any]:
    def operation(sock: Any, timeout: float | None) -> Any:
        with kind() as selector:
            selector.register(sock, selectors.EVENT_READ, "data")
            return [(key.data, mask) for key, mask in selector.select(timeout)]

    return operation


SELECTS: dict[str, Callable[[Any, float | None], Any]] = {
    "select": lambda sock, timeout: [len(each) for each in select.select([sock], [], [sock], timeout)],
    "poll": polled,
    "epoll": epolled,
    "SelectSelector": selected_by(selectors.SelectSelector),
    "PollSelector": selected_by(selectors.PollSelector),
    "EpollSelector": selected_by(selectors.EpollSelector),
}


@TIMEOUTS
@pytest.mark.parametrize("name", SELECTS)
def test_selecting_suspends_the_request_alone(name: str, timeout: float | None) -> None:
    told = []
    for run in (plainly, lambda *args: perform(args[0], WAITING, "(fd ", args[1])):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            wait = lambda theirs=theirs: SELECTS[name](theirs, timeout)  # noqa: E731
            told.append(run(wait, lambda ours=ours: ours.send(b"x")))
            assert at_once(wait) == told[0]  # it is ready at once
    assert told[0] == told[1]


@pytest.mark.parametrize("timeout", [0, 0.05])
@pytest.mark.parametrize("name", SELECTS)
def test_selecting_times_out(name: str, timeout: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        operation = lambda: SELECTS[name](theirs, timeout)  # noqa: E731
        assert (perform(operation, WAITING, "") if timeout else at_once(operation)) == plainly(operation)


def test_selecting_from_nothing_sleeps() -> None:
    assert perform(lambda: select.select([], [], [], 0.1), SLEEPING, "") == ([], [], [])


@pytest.mark.parametrize(
    "operation",
    [
        lambda: select.select([], [], [], -1),
        lambda: select.select([], [], [], "1"),
        lambda: select.select([-1], [], []),
        lambda: select.poll().poll("1"),
        lambda: select.epoll().poll("1"),
        lambda: select.epoll.fromfd(-1).closed,
    ],
)
def test_what_can_not_be_selected_is_refused_as_ever(operation: Operation) -> None:
    assert at_once(operation) == plainly(operation)


def test_many_descriptors_and_a_file_on_a_disk_can_be_selected(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(6)]
        for each in pairs:
            stack.enter_context(each[0])
            stack.enter_context(each[1])
        file = stack.enter_context((tmp_path / "file").open("w"))
        reads = [theirs for _, theirs in pairs]
        shown = ", ".join(str(each.fileno()) for each in reads[:4])

        def operation() -> int:
            return reads.index(select.select(reads, [], [file])[0][0])

        assert perform(operation, WAITING, f"select (fd {shown}, …)", lambda: pairs[4][0].send(b"x")) == 4


def test_the_output_of_a_subprocess_suspends_the_request_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", "import os; print(os.read(0, 1), flush=True)"]

        def run() -> bytes:
            return subprocess.run(command, stdin=theirs, stdout=subprocess.PIPE, timeout=WAIT_S, check=True).stdout

        assert perform(run, WAITING, "select", lambda: ours.send(b"x")) == b"b'x'\n"


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make look-ups wait until the event is set."""
    answered = threading.Event()

    def waiting(before: Any, numeric: int = 0) -> Any:
        def look_up(*args: Any) -> Any:
            assert (numeric and args[-1] & numeric) or answered.wait(WAIT_S)
            return before(*args)

        return look_up

    monkeypatch.setattr(_socket, "getaddrinfo", waiting(_socket.getaddrinfo, socket.AI_NUMERICHOST))
    monkeypatch.setattr(socket, "getnameinfo", waiting(socket.getnameinfo, socket.NI_NUMERICHOST))
    for name in ("gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, waiting(getattr(socket, name)))
    return answered


NAMES: dict[str, Operation] = {
    "getaddrinfo": lambda: socket.getaddrinfo("localhost", 80, socket.AF_INET, socket.SOCK_STREAM),
    "gethostbyname": lambda: socket.gethostbyname("localhost"),
    "gethostbyname_ex": lambda: socket.gethostbyname_ex("localhost"),
    "gethostbyaddr": lambda: socket.gethostbyaddr("127.0.0.1"),
    "getnameinfo": lambda: socket.getnameinfo(("127.0.0.1", 80), 0),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_look_up_runs_in_a_thread(name: str, slow_names: threading.Event) -> None:
    assert perform(NAMES[name], OFFLOADED, "look_up(", slow_names.set) == NAMES[name]()


def test_connecting_to_a_name_looks_it_up_in_a_thread(slow_names: threading.Event) -> None:
    with socket.create_server(ANY) as listening:

        def connect() -> int:
            with socket.socket() as own:
                own.connect(("localhost", listening.getsockname()[1]))
                return int(own.getpeername()[1])

        assert perform(connect, OFFLOADED, "localhost", slow_names.set) == listening.getsockname()[1]


def test_sending_a_datagram_to_a_name_looks_it_up_in_a_thread(slow_names: threading.Event) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as ours, socket.socket(type=socket.SOCK_DGRAM) as theirs:
        ours.bind(ANY)
        to = ("localhost", ours.getsockname()[1])
        assert perform(lambda: theirs.sendto(b"ask", 0, to), OFFLOADED, "localhost", slow_names.set) == 3
        ours.settimeout(WAIT_S)
        assert ours.recv(10) == b"ask"


def test_a_number_is_not_looked_up(slow_names: threading.Event) -> None:
    """The look-ups never answer, and are not needed."""
    with socket.create_server(ANY) as listening:

        def connect() -> int:
            assert socket.getnameinfo(listening.getsockname(), socket.NI_NUMERICHOST)[0] == "127.0.0.1"
            with socket.create_connection(listening.getsockname()) as own:
                return int(own.getpeername()[1])

        assert perform(connect, WAITING, "socket writable") == listening.getsockname()[1]


def test_a_name_that_does_not_resolve_is_an_error_of_its_handler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(_socket, "getaddrinfo", unknown)
    connect = lambda: socket.create_connection(("nowhere.invalid", 80))  # noqa: E731
    assert perform(connect, OFFLOADED, "unknown('nowhere.invalid')") == plainly(connect)
    assert plainly(connect)[0] is socket.gaierror


# -- the end of a request ---------------------------------------------------------------------------------------------


WAITS: dict[str, tuple[Callable[[Any], Any], State]] = {
    "recv": (lambda sock: sock.recv(1), WAITING),
    "select": (lambda sock: select.select([sock], [], []), WAITING),
    "epoll": (lambda sock: epolled(sock, None), WAITING),
    "sleep": (lambda _: time.sleep(1000), SLEEPING),
}


def ending_how(name: str, end: Callable[[Server, Client], Any], config: Config = ON) -> list[str]:
    """Run a handler that waits, and have it end. Returns what its `finally` block has seen."""
    seen: list[str] = []
    wait, state = WAITS[name]
    ours, theirs = socket.socketpair()

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            try:
                wait(theirs)
            except BaseException as error:
                seen.append(type(error).__name__)
                raise

    with ours, theirs, serving(Server(Handler, config)) as server:
        registered = len(server.engine.loop.poller.selector.get_map())
        with Client(server.server_address) as client:
            server.waits(state)
            end(server, client)
            server.wait_for_no_request()
            assert len(server.engine.loop.poller.selector.get_map()) == registered
        assert not Watch.by_number
        assert server.failures == []
        assert not server.engine.steps.give_ups
    return seen


def cancel_all(server: Server, client: Client) -> None:
    for entry in server.table:
        server.table.cancel(entry.id)


@pytest.mark.parametrize("name", WAITS)
def test_a_cancelled_request_is_unwound(name: str) -> None:
    assert ending_how(name, cancel_all) == ["GreenletExit"]


@pytest.mark.parametrize("name", WAITS)
def test_a_request_whose_client_resets_its_connection_is_unwound(name: str) -> None:
    assert ending_how(name, lambda _, client: client.reset()) == ["GreenletExit"]


@pytest.mark.parametrize("closes", ["the client its output", "the handler its socket", "the handler a duplicate"])
def test_a_request_whose_connection_has_ended_goes_on(closes: str) -> None:
    ours, theirs = socket.socketpair()
    told: queue.Queue[bytes] = queue.Queue()

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            if closes == "the handler its socket":
                assert self.request.recv(1) == b"x"  # with unread input, closing resets the connection
                self.request.close()
            elif closes == "the handler a duplicate":
                with self.request.dup() as copy:
                    assert copy.recv(1) == b"x"
            told.put(theirs.recv(10))

    with ours, theirs, serving(Server(Handler)) as server, Client(server.server_address) as client:
        client.send(b"x").end()
        server.waits(WAITING)
        ours.send(b"on")
        assert told.get(timeout=WAIT_S) == b"on"
        server.wait_for_no_request()
        assert server.failures == []


def test_a_request_that_takes_too_long_is_unwound() -> None:
    config = Config(ON.dispatch, greenlet=ON.greenlet, limits=reqtable.Limits(request_timeout_s=0.1))
    assert ending_how("recv", lambda *_: None, config) == ["GreenletExit"]


def test_the_requests_of_a_server_that_stops_are_unwound() -> None:
    seen: list[str] = []
    ours, theirs = socket.socketpair()

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            try:
                theirs.recv(1)
            finally:
                try:
                    time.sleep(1000)  # a wait while the stack is unwound fails at once
                finally:
                    try:
                        theirs.recv(1)
                    finally:
                        seen.append("unwound")

    with ours, theirs, serving(Server(Handler)) as server, Client(server.server_address) as client:
        server.waits(WAITING)
        server.shutdown()
        server.server_close()
        assert client.rest() == b""
    assert seen == ["unwound"]
    assert not Watch.by_number


@pytest.mark.parametrize("by", ["a request", "a thread", "detaching it"])
def test_a_socket_that_is_closed_during_a_wait_is_a_bad_descriptor(by: str) -> None:
    told: queue.Queue[Any] = queue.Queue()
    ours, theirs = socket.socketpair()

    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            if self.rfile.readline() == b"close\n":
                theirs.close()
                return
            try:
                told.put(theirs.recv(1))
            except OSError as error:
                told.put(error.errno)

    with ours, serving(Server(Handler)) as server:
        with Client(server.server_address) as waiting, Client(server.server_address) as closing:
            waiting.send(b"wait\n")
            server.waits(WAITING)
            if by == "a request":
                closing.send(b"close\n")
            elif by == "a thread":
                theirs.close()
            else:
                os.close(theirs.detach())
            assert told.get(timeout=WAIT_S) == errno.EBADF
            assert waiting.rest() == b""


def test_two_requests_may_wait_for_one_socket() -> None:
    told: queue.Queue[Any] = queue.Queue()
    ours, theirs = socket.socketpair()

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            told.put(theirs.recv(1))

    with ours, theirs, serving(Server(Handler)) as server:
        with Client(server.server_address), Client(server.server_address):
            wait_until(server, lambda: [entry.state for entry in server.table] == [WAITING, WAITING])
            ours.send(b"ab")
            assert sorted(told.get(timeout=WAIT_S) for _ in range(2)) == [b"a", b"b"]


def test_a_handler_whose_socket_is_always_ready_takes_turns() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def feed() -> None:
        with contextlib.suppress(OSError):
            while True:
                ours.sendall(b"x" * 65_536)

    def read() -> str:
        while not stop.is_set():
            theirs.recv(65_536)
        return "stopped"

    feeder = threading.Thread(target=feed)
    with ours, theirs, commanded(read) as (server, client, results):
        feeder.start()
        client.send(b"go\n")
        with Client(server.server_address) as other:
            assert other.ask(b"ping\n") == b"pong\n"
        stop.set()
        assert results.get(timeout=WAIT_S) == "stopped"
        theirs.shutdown(socket.SHUT_RDWR)
        feeder.join(WAIT_S)


def test_a_handler_that_reads_the_end_for_ever_takes_turns() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def read() -> str:
        while not stop.is_set():
            assert theirs.recv(1) == b""
        return "stopped"

    ours.close()
    with theirs, commanded(read) as (server, client, results):
        client.send(b"go\n")
        with Client(server.server_address) as other:
            assert other.ask(b"ping\n") == b"pong\n"
        stop.set()
        assert results.get(timeout=WAIT_S) == "stopped"


def open_numbers() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_a_forked_child_waits_as_a_program_does() -> None:
    ours, theirs = socket.socketpair()

    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            if self.rfile.readline() == b"wait\n":
                theirs.recv(1)
                return
            self.hand_off("fork")
            assert sum(os.path.sameopenfile(theirs.fileno(), int(fd)) for fd in open_numbers()) == 1
            time.sleep(0.01)
            with socket.create_connection(("localhost", port)) as own:
                self.wfile.write(own.recv(10) + b"%d" % bool(select.select([own], [], [], 1)[0]))

    with ours, theirs, socket.create_server(ANY) as listening, serving(Server(Handler)) as server:
        port = listening.getsockname()[1]
        with Client(server.server_address) as waiting, Client(server.server_address) as forking:
            waiting.send(b"wait\n")
            server.waits(WAITING)
            forking.send(b"fork\n")
            accepted, _ = listening.accept()
            accepted.sendall(b"hello")
            accepted.close()
            assert forking.rest() == b"hello1"
            ours.send(b"x")
            assert waiting.rest() == b""
        assert server.failures == []


# -- other code -------------------------------------------------------------------------------------------------------


ORIGINALS: dict[tuple[Any, str], Any] = {(owner, name): getattr(owner, name) for owner, name, _ in REPLACEMENTS._made}


def are_in_place() -> bool:
    """Return whether everything is replaced. Fails if only some of it is."""
    replaced = {getattr(owner, name) is not before for (owner, name), before in ORIGINALS.items()}
    assert len(replaced) == 1
    if replaced != {True}:
        assert not {"recv", "connect", "_accept"} & vars(socket.socket).keys()
        return False
    return True


def test_everything_is_put_back_when_the_last_server_closes() -> None:
    assert not are_in_place()
    for order in ((0, 1), (1, 0)):
        servers = [Server(Commands), Server(Commands)]
        assert are_in_place()
        servers[order[0]].server_close()
        servers[order[0]].server_close()
        assert are_in_place()
        servers[order[1]].server_close()
        assert not are_in_place()


def test_everything_is_put_back_when_a_server_is_garbage() -> None:
    server = Server(Commands)
    known = weakref.ref(server)
    assert are_in_place()
    server.socket.close()
    del server
    gc.collect()
    assert known() is None
    assert not are_in_place()


def test_a_server_that_serves_again_suspends_again() -> None:
    with Server(Commands) as server:
        server.server_close()
        assert not are_in_place()
        server.socket = socket.create_server(ANY)
        with serving(server):
            assert are_in_place()
    assert not are_in_place()


def test_what_somebody_else_has_replaced_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    with Server(Commands):
        own = time.sleep
        monkeypatch.setattr(time, "sleep", slept.append)
        assert socket.socket.recv is not ORIGINALS[socket.socket, "recv"]
    time.sleep(5)
    assert slept == [5]
    monkeypatch.undo()
    assert time.sleep is own  # the other's doing: it is put back, and does nothing
    own(0)
    time.sleep = ORIGINALS[time, "sleep"]
    assert not are_in_place()


@pytest.mark.parametrize("dispatch", ["inline", "thread", "pool", "fork"])
def test_other_policies_ignore_the_option(dispatch: str) -> None:
    with Server(Commands, Config(dispatch, greenlet=ON.greenlet)):
        assert not are_in_place()


def test_the_option_is_off_by_default() -> None:
    assert Config().greenlet.suspend_all_sockets is False
    with Server(Commands, Config("greenlet")):
        assert not are_in_place()


def test_a_configuration_can_turn_it_on_and_off() -> None:
    with Server(Commands, Config("greenlet")) as server:
        server.reconfigure(ON)
        assert are_in_place()
        server.reconfigure(Config("greenlet"))
        assert not are_in_place()


def test_without_the_package_greenlet_the_error_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reqtable.dispatch.policies.greenlet.has_greenlet", False)
    with pytest.raises(ConfigurationError, match="needs the package greenlet"):
        Server(Commands)
    assert not are_in_place()


def test_a_value_that_is_no_truth_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reqtable.toml"
    path.write_text("[greenlet]\nsuspend_all_sockets = 1\n")
    with pytest.raises(ConfigurationError, match=r"toml:2: greenlet.suspend_all_sockets must be true or false, not 1"):
        Config.load(path)
    path.write_text("[greenlet]\nsuspend_all_sockets = true\n")
    assert Config.load(path).greenlet == ON.greenlet


def test_other_threads_and_the_loop_are_not_affected() -> None:
    """They wait as ever, although a server has the option: a thread in a socket, and the loop itself in a hook."""
    ours, theirs = socket.socketpair()
    told: list[Any] = []

    class Hooked(Server):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            begun = time.monotonic()
            time.sleep(0.01)
            told.append((time.monotonic() - begun >= 0.01, len(self.table), select.select([], [], [], 0.001)))
            return True

    reader = threading.Thread(target=lambda: told.append(theirs.recv(10)))
    with ours, theirs, serving(Hooked(Commands)) as server:
        reader.start()
        with Client(server.server_address) as client:
            assert client.ask(b"ping\n") == b"pong\n"
        ours.send(b"x")
        reader.join(WAIT_S)
        assert isinstance(select.epoll, object)
        with select.epoll() as epoll:
            assert type(epoll) is ORIGINALS[select, "epoll"]
    assert told == [(True, 0, ([], [], [])), b"x"]


def test_a_server_without_the_option_beside_one_that_has_it_blocks_as_ever() -> None:
    engine = Engine()
    made: dict[Any, str] = {}

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            made[self.server] = type(select.poll()).__name__

    with Server(Handler) as with_option, Server(Handler, Config("greenlet")) as without:
        engine.add(with_option)
        engine.add(without)
        with serving(without):
            for server in (with_option, without):
                with Client(server.server_address) as client:
                    assert client.rest() == b""
    assert made == {with_option: "Poll", without: "poll"}


def test_a_simulated_network_ignores_the_option() -> None:
    """A handler's own sockets are real ones, which a simulated selector can't watch."""
    with SimNetwork().installed(), Server(Commands):
        assert not are_in_place()
