"""Policy `greenlet`: unmodified blocking handlers take turns on one thread, with a socket that seems to block.

The tests compare each call on the socket with the same call on the plain socket that a handler has under `inline`.
"""

from __future__ import annotations

import contextvars
import errno
import functools
import gc
import logging
import os
import queue
import select
import socket
import subprocess
import sys
import threading
import weakref
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet
import pytest

import reqtable
from reqtable import Engine, State, System
from reqtable.dispatch.green.handler import RequestGreenlet
from reqtable.dispatch.green.socket import CooperativeSocket
from reqtable.testing import FakeClock
from tests.support import WAIT_S, Client, serving, wait_until

ANY = ("127.0.0.1", 0)
BIG = bytes(range(256)) * 40_960  # 10 MiB: more than the kernel takes at once
READING, WRITING = State.READING, State.WRITING


class Server(reqtable.TCPServer):
    """Keeps the errors passed to `handle_error`."""

    dispatch = "greenlet"
    request_queue_size = 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failures: list[BaseException | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.failures.append(sys.exc_info()[1])

    def wait_for(self, *states: State, read: int = 0) -> None:
        """Wait until the requests in the table are in these states, and have read so many bytes."""

        def holds() -> bool:
            entries = list(self.table)
            return [entry.state for entry in entries] == [*states] and sum(entry.bytes_in for entry in entries) >= read

        wait_until(self, holds)


class Echo(reqtable.StreamRequestHandler):
    """Echoes one line."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.readline())


def serve_until(server: Any, condition: Callable[[], bool]) -> None:
    """Serve in this thread until `condition()` holds after a pass."""
    server.service_actions = lambda: server.shutdown() if condition() else None
    server.serve_forever()
    del server.service_actions


def perform(
    operation: Callable[[Any], Any], script: Callable[[Client, Callable[..., None]], Any], dispatch: str = "greenlet"
) -> tuple[Any, Any, Any]:
    """Run `operation` on a request's socket. Returns its result or error, the result of `script`, and bytes in and out.

    Calls `script` with a client and with a function that waits until the request is suspended in a state.
    """
    done: queue.Queue[Any] = queue.Queue()

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            assert isinstance(self.request, CooperativeSocket) == (dispatch == "greenlet")
            try:
                result = operation(self.request)
            except Exception as error:
                result = (type(error), str(error))
            entry = next(iter(self.server.table))
            done.put((result, (entry.bytes_in, entry.bytes_out)))

    with serving(Server(ANY, Handler, dispatch=dispatch)) as server, Client(server.server_address) as client:

        def suspended(*states: State, read: int = 0) -> None:
            if dispatch == "greenlet":
                server.wait_for(*states, read=read)

        told = script(client, suspended)
        result, counts = done.get(timeout=WAIT_S)
        assert server.failures == []
    return result, told, counts


def test_writing_to_another_requests_socket_suspends_the_writer_alone() -> None:
    """As in a chat, two members write to a third member that does not read."""
    members: dict[bytes, Any] = {}

    class Member(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            members[self.rfile.readline()] = self.request
            for text in self.rfile:
                if text == b"tell\n":
                    members[b"silent\n"].sendall(BIG)
                self.wfile.write(text)

    with serving(Server(ANY, Member, dispatch="greenlet")) as server:
        address = server.server_address
        with Client(address) as silent, Client(address) as one, Client(address) as two, Client(address) as other:
            # fixes the buffer's size: the kernel would let the buffer grow beyond the data
            silent.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)
            silent.send(b"silent\n")
            wait_until(server, lambda: b"silent\n" in members)
            for teller in (one, two):
                teller.send(b"name\ntell\n")
            wait_until(server, lambda: sum(entry.state is State.WAITING for entry in server.table) == 2)
            assert other.send(b"other\n").ask(b"hello\n") == b"hello\n"
            assert len(silent.receive(2 * len(BIG))) == 2 * len(BIG)
            assert one.line() == two.line() == b"tell\n"
            one.send(b"tell\n")
            wait_until(server, lambda: sum(entry.state is State.WAITING for entry in server.table) == 1)
            silent.reset()
            assert one.rest() == b""
            assert other.ask(b"again\n") == b"again\n"
        assert server.failures  # of who wrote to it, and of its own handler if that was the first to notice
        assert all(isinstance(each, ConnectionError) for each in server.failures)


# -- many on one thread -----------------------------------------------------------------------------------------------


def test_two_hundred_trickling_clients_share_one_thread() -> None:
    text = b"GET /\n"
    begun, done, threads = [], [], set()

    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            begun.append(self)
            line = self.rfile.readline()
            threads.add(threading.get_ident())
            done.append((len(begun), threading.active_count()))
            self.wfile.write(line)

    with serving(Server(ANY, Handler)) as server:
        count = threading.active_count()
        clients = [Client(server.server_address) for _ in range(200)]
        for i in range(len(text)):
            for client in clients:
                client.send(text[i : i + 1])
            if i == 2:
                wait_until(server, lambda: sum(entry.bytes_in for entry in server.table) == 600)
                assert (len(server.table), done) == (200, [])
        for client in reversed(clients):
            assert client.rest() == text
            client.close()
    assert done == [(200, count)] * 200
    assert len(threads) == 1


# -- the socket -------------------------------------------------------------------------------------------------------


def into(method: str, size: int, *args: Any) -> Callable[[Any], Any]:
    """Make an operation that calls a method with a buffer, and returns the method's result and the buffer's content."""

    def operation(own: Any) -> Any:
        buffer = bytearray(size)
        given = [buffer] if method == "recvmsg_into" else buffer
        return getattr(own, method)(given, *args), bytes(buffer)

    return operation


READS: dict[str, Callable[[Any], Any]] = {
    "recv": lambda own: own.recv(100),
    "recv less": lambda own: (own.recv(2), own.recv(100)),
    "recv with flags": lambda own: own.recv(100, socket.MSG_CMSG_CLOEXEC),
    "recv_into": into("recv_into", 8),
    "recv_into so many": lambda own: (into("recv_into", 8, 2)(own), into("recv_into", 8, 0, 0)(own)),
    "recvfrom": lambda own: own.recvfrom(100),
    "recvfrom with flags": lambda own: own.recvfrom(100, 0),
    "recvfrom_into": into("recvfrom_into", 8),
    "recvfrom_into so many": lambda own: (into("recvfrom_into", 8, 2)(own), into("recvfrom_into", 8, 3, 0)(own)),
    "recvmsg": lambda own: own.recvmsg(100),
    "recvmsg with room": lambda own: own.recvmsg(100, 100, 0),
    "recvmsg_into": into("recvmsg_into", 8),
    "recvmsg_into with room": into("recvmsg_into", 8, 100, 0),
    "makefile rb": lambda own: own.makefile("rb").read(5),
    "makefile raw": lambda own: own.makefile("rb", buffering=0).read(100),
    "makefile r": lambda own: own.makefile("r", encoding="ascii", newline="").read(5),
    "makefile rwb": lambda own: own.makefile("rwb").read1(),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_waits_as_a_blocking_one(name: str) -> None:
    def script(client: Client, suspended: Callable[..., None]) -> None:
        suspended(READING)
        client.send(b"hello")

    theirs, _, _ = perform(READS[name], script, "inline")
    ours, _, counts = perform(READS[name], script)
    assert ours == theirs
    assert counts == (5, 0)


@pytest.mark.parametrize(
    ("operation", "sent", "result"),
    [
        (lambda own: (own.recv(2, socket.MSG_PEEK), own.recv(5)), [b"hello"], (b"he", b"hello")),
        (lambda own: own.recv(5, socket.MSG_WAITALL), [b"he", b"llo"], b"hello"),
        (into("recv_into", 5, 0, socket.MSG_WAITALL), [b"he", b"llo"], (5, b"hello")),
        (lambda own: own.recv(5, socket.MSG_WAITALL | socket.MSG_PEEK), [b"he"], b"he"),
        (lambda own: (own.settimeout(WAIT_S), own.recv(5, socket.MSG_WAITALL)), [b"he"], (None, b"he")),
        (into("recv_into", 2, 5), [], (ValueError, "buffer too small for requested bytes")),
        (lambda own: (own.shutdown(socket.SHUT_RD), own.recv(5)), [], (None, b"")),
        (lambda own: own.makefile("rb").readline(), [b"he", b"l", b"lo\n"], b"hello\n"),
    ],
    ids=[
        "MSG_PEEK",
        "MSG_WAITALL",
        "MSG_WAITALL into",
        "MSG_WAITALL of a peek",
        "MSG_WAITALL with a timeout",
        "too small",
        "SHUT_RD",
        "line in pieces",
    ],
)
@pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
def test_flags_mean_what_they_mean(
    dispatch: str, operation: Callable[[Any], Any], sent: list[bytes], result: Any
) -> None:
    def script(client: Client, suspended: Callable[..., None]) -> None:
        for data in sent:
            suspended(READING)
            client.send(data)
        client.end()  # and that ends a wait that there should not be

    assert perform(operation, script, dispatch)[0] == result


@pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
def test_dontwait_does_not_wait(dispatch: str) -> None:
    """Only the call with MSG_DONTWAIT does not wait; other calls on the same socket do."""
    blocked = threading.Event()

    def operation(own: Any) -> Any:
        calls = [
            lambda: own.recv(1, socket.MSG_DONTWAIT),
            lambda: own.recv_into(bytearray(1), 0, socket.MSG_DONTWAIT),
            lambda: repeated(lambda _, view: own.send(view, socket.MSG_DONTWAIT))(own),
        ]
        for call in calls:
            with pytest.raises(BlockingIOError):
                call()
        blocked.set()
        return own.recv(5)

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        start = client.receive(1)  # so it was neither read that waited
        assert blocked.wait(WAIT_S)  # one that reads as fast as the other sends would never let it
        client.send(b"hello").end()
        return start + client.rest()

    result, received, _ = perform(operation, script, dispatch)
    assert result == b"hello"
    assert BIG.startswith(received)


def repeated(call: Callable[[Any, memoryview], int]) -> Callable[[Any], int]:
    """Make an operation that sends BIG by repeated calls, and returns how many bytes were sent in all."""

    def operation(own: Any) -> int:
        view = memoryview(BIG)
        while view:
            sent = call(own, view)
            assert sent > 0
            view = view[sent:]
        return len(BIG)

    return operation


def through_file(mode: str, buffering: int | None) -> Callable[[Any], Any]:
    def operation(own: Any) -> Any:
        with own.makefile(mode, buffering=buffering) as file:
            return file.write(BIG) if buffering != 0 else repeated(lambda _, view: file.write(view))(own)

    return operation


WRITES: dict[str, Callable[[Any], Any]] = {
    "send": repeated(lambda own, view: own.send(view)),
    "send with flags": repeated(lambda own, view: own.send(view, socket.MSG_NOSIGNAL)),
    "sendall": lambda own: own.sendall(BIG),
    "sendall of numbers": lambda own: own.sendall(array("I", BIG), socket.MSG_NOSIGNAL),
    "sendto": repeated(lambda own, view: own.sendto(view, own.getpeername())),
    "sendto with flags": repeated(lambda own, view: own.sendto(view, socket.MSG_NOSIGNAL, own.getpeername())),
    "sendmsg": repeated(lambda own, view: own.sendmsg([view[:1], view[1:]])),
    "makefile wb": through_file("wb", None),
    "makefile raw": through_file("wb", 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_waits_for_a_slow_reader(name: str) -> None:
    def script(client: Client, suspended: Callable[..., None]) -> bytes:
        suspended(WRITING)
        with client.socket.makefile("rb") as file:
            start = file.read(100_000)
            suspended(WRITING)
            return start + file.read()

    theirs, expected, _ = perform(WRITES[name], script, "inline")
    ours, received, counts = perform(WRITES[name], script)
    assert ours == theirs
    assert received == expected == BIG
    assert counts == (0, len(BIG))


@pytest.mark.parametrize(("offset", "count"), [(0, None), (1000, None), (1000, 9_000_000), (0, 2 * len(BIG))])
def test_sendfile(tmp_path: Path, offset: int, count: int | None) -> None:
    path = tmp_path / "big"
    path.write_bytes(BIG)

    def send(own: Any) -> Any:
        with path.open("rb") as file:
            return own.sendfile(file, offset, count), file.tell()

    def script(client: Client, suspended: Callable[..., None]) -> bytes:
        suspended(WRITING)
        with client.socket.makefile("rb") as file:
            return file.read()

    expected = BIG[offset:][:count]
    assert perform(send, script) == ((len(expected), offset + len(expected)), expected, (0, len(expected)))
    assert perform(send, script, "inline")[:2] == ((len(expected), offset + len(expected)), expected)


def silent(client: Client, suspended: Callable[..., None]) -> None:
    """Play a client that neither sends nor reads."""


def timeouts(own: Any) -> list[Any]:
    """Return the timeout after each way to set it."""
    seen: list[Any] = []

    def look() -> None:
        seen.append((own.gettimeout(), own.timeout, own.getblocking()))

    look()
    for value in (5, 0.25, 0, None):
        own.settimeout(value)
        look()
    for flag in (False, True, 0, 1):
        own.setblocking(flag)
        look()
    for bad in (-1, "soon"):
        with pytest.raises((ValueError, TypeError)) as raised:
            own.settimeout(bad)
        seen.append(raised.type)
    with pytest.raises(AttributeError):
        own.timeout = 5
    look()
    return seen


def names(own: Any) -> list[Any]:
    return [own.family, own.type, own.proto, own.getsockname()[0], own.getpeername()[0], own.get_inheritable()]


def too_long(own: Any) -> list[Any]:
    """Return the errors that timeouts raise. The socket is still usable afterwards."""
    seen: list[Any] = []
    own.settimeout(0.02)
    with own.makefile("rb") as file:
        for call in (lambda: own.recv(1), file.readline, file.readline, lambda: own.sendall(BIG)):
            with pytest.raises(OSError, match=r".") as raised:
                call()
            seen.append((raised.type, str(raised.value)))
    own.settimeout(None)
    own.shutdown(socket.SHUT_RD)
    return [*seen, own.recv(1)]


def not_now(own: Any) -> list[Any]:
    """Check that calls raise BlockingIOError with a timeout of 0 if they can't be done at once."""
    own.setblocking(False)
    for call in (lambda: own.recv(1), lambda: own.recv_into(bytearray(1)), lambda: own.recvfrom(1)):
        with pytest.raises(BlockingIOError):
            call()
    with pytest.raises(BlockingIOError):
        own.sendall(BIG)
    with pytest.raises(BlockingIOError):
        own.send(BIG)
    with pytest.raises(ValueError, match="non-blocking"), open(__file__, "rb") as file:
        own.sendfile(file)
    return [own.makefile("rb", 0).read(1)]


@pytest.mark.parametrize("operation", [timeouts, names, too_long, not_now])
def test_it_is_as_a_plain_socket(operation: Callable[[Any], Any]) -> None:
    ours, theirs = (perform(operation, silent, dispatch)[0] for dispatch in ("greenlet", "inline"))
    assert ours == theirs
    if operation is too_long:
        stopped = (OSError, "cannot read from timed out object")
        assert theirs == [
            (TimeoutError, "timed out"),
            (TimeoutError, "timed out"),
            stopped,
            (TimeoutError, "timed out"),
            b"",
        ]


def test_timeout_is_what_get_request_set() -> None:
    class Timing(Server):
        def get_request(self) -> Any:
            request, address = super().get_request()
            request.settimeout(0.02)
            return request, address

    with serving(Timing(ANY, Echo)) as server, Client(server.server_address) as client:
        assert client.rest() == b""
        assert [str(failure) for failure in server.failures] == ["timed out"]


@pytest.mark.parametrize("gone", [False, True], ids=["both open", "original closed"])
def test_duplicate(gone: bool) -> None:
    """A duplicate inherits the timeout, waits as the original does, and works after the original is closed."""

    def operation(own: Any) -> Any:
        own.settimeout(WAIT_S)
        with own.dup() as copy:
            assert copy.fileno() != own.fileno()
            assert copy.gettimeout() == WAIT_S
            copy.settimeout(None)
            assert own.gettimeout() == WAIT_S
            assert os.get_blocking(own.fileno())  # as a subprocess would want it
            first = own.recv(100)
            own.sendall(b".")
            if gone:
                own.close()
            second = copy.recv(100)
            copy.sendall(BIG)
        return first, second, own.fileno() == -1 or own.recv(100)

    def script(client: Client, suspended: Callable[..., None]) -> bytes:
        suspended(READING)
        assert client.send(b"one").receive(1) == b"."
        suspended(READING)
        client.send(b"two")
        suspended(WRITING)
        answer = client.receive(len(BIG))
        client.send(b"three")
        return answer

    result, received, _ = perform(operation, script)
    assert result == (b"one", b"two", gone or b"three")
    assert received == BIG


def test_detached_descriptor_is_blocking_and_its_takers() -> None:
    taken = []

    def operation(own: Any) -> Any:
        own.recv(100)
        number = own.fileno()
        with pytest.raises(OSError, match=r"."):
            taken.append(socket.socket(fileno=own.detach()))
            own.recv(100)
        return own.fileno(), taken[0].fileno() == number, os.get_blocking(number), taken[0].gettimeout()

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        suspended(READING)
        client.send(b"hello")
        suspended()
        with taken[0]:
            taken[0].sendall(b"from its taker")
        return client.rest()

    assert perform(operation, script)[:2] == ((-1, True, True, None), b"from its taker")


def test_shutdown_of_one_side() -> None:
    """The client sees the end of file, and the handler can still read from it."""

    def operation(own: Any) -> Any:
        own.sendall(b"over")
        own.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenPipeError):
            own.sendall(b"more")
        return own.recv(100)

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        answer = client.rest()
        suspended(READING)
        client.send(b"and out")
        return answer

    assert perform(operation, script)[:2] == (b"and out", b"over")


# -- timeouts, by the clock -------------------------------------------------------------------------------------------


def pass_by_pass(clock: FakeClock, operation: Callable[[Any], Any]) -> tuple[Server, list[Any]]:
    """Return a server that the test runs pass by pass on a fake clock, and a list that gets `operation`'s result."""
    given: list[Any] = []

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            try:
                given.append(operation(self.request))
            except Exception as error:
                given.append((type(error), str(error)))

    server = Server(ANY, Handler)
    Engine(system=System(clock=clock)).add(server).loop.open()
    server.engine.listeners.listen(server)
    return server, given


def test_timeout_of_a_read_is_that_of_each_call(clock: FakeClock) -> None:
    def read(own: Any) -> Any:
        own.settimeout(30)
        assert own.recv(1) == b"x"
        return own.recv(1)

    server, given = pass_by_pass(clock, read)
    with server, Client(server.server_address) as client:
        server.engine.loop.run_once(0)
        clock.jump(29)
        server.engine.loop.run_once(0)
        client.send(b"x")
        server.engine.loop.run_once(0)
        clock.jump(29)
        server.engine.loop.run_once(0)
        assert (given, len(server.table)) == ([], 1)
        clock.jump(1)
        server.engine.loop.run_once(0)
        assert given == [(TimeoutError, "timed out")]


def test_timeout_of_sendall_is_that_of_all_of_it(clock: FakeClock) -> None:
    """As `socket` documents, a client that reads a little now and then does not postpone the timeout."""

    def write(own: Any) -> Any:
        own.settimeout(10)
        return own.sendall(BIG)

    server, given = pass_by_pass(clock, write)
    with server, Client(server.server_address) as client:
        server.engine.loop.run_once(0)
        (entry,) = server.table
        while entry.state is not State.WRITING:  # it takes turns until the kernel takes no more
            server.engine.loop.run_once(0)
        sent = entry.bytes_out
        clock.jump(6)
        server.engine.loop.run_once(0)
        taken = 0
        while entry.bytes_out == sent:
            taken += len(client.socket.recv(1_000_000))
            server.engine.loop.run_once(0)
        assert given == []
        clock.jump(6)
        server.engine.loop.run_once(0)
        assert given == [(TimeoutError, "timed out")]


# -- other threads ----------------------------------------------------------------------------------------------------


def test_another_thread_may_use_the_socket() -> None:
    """In another thread the socket really blocks, with the same timeouts."""

    def operation(own: Any) -> Any:
        done: queue.Queue[Any] = queue.Queue()

        def use() -> None:
            own.settimeout(0.02)
            try:
                own.recv(1)
            except TimeoutError as error:
                done.put(str(error))
            own.settimeout(WAIT_S)
            own.sendall(b"go on\n")
            done.put(own.recv(100))
            own.sendall(BIG)
            own.settimeout(0)
            try:
                own.recv(1)
            except BlockingIOError:
                done.put("not now")

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        return [done.get_nowait() for _ in range(3)]

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        assert client.line() == b"go on\n"
        client.send(b"hello")
        return client.receive(len(BIG))

    result, received, _ = perform(operation, script)
    assert result == ["timed out", b"hello", "not now"]
    assert received == BIG


def test_select_sees_what_a_read_would() -> None:
    """`select` blocks all requests, as documented, but its result must be right."""

    def operation(own: Any) -> Any:
        before = select.select([own], [own], [own], 0)
        own.sendall(b"go on\n")
        waited = select.select([own], [], [], WAIT_S)
        return [before == ([], [own], []), waited == ([own], [], []), own.recv(100)]

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        assert client.line() == b"go on\n"
        client.send(b"hello")

    assert perform(operation, script)[0] == [True, True, b"hello"]


@pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
def test_a_subprocess_may_have_the_descriptor(dispatch: str) -> None:
    """The subprocess needs a blocking descriptor, as every program does for its input and output."""

    def operation(own: Any) -> Any:
        line = own.recv(4)
        done = subprocess.run(["cat"], stdin=own.fileno(), stdout=own.fileno(), stderr=subprocess.PIPE)
        return line, done.returncode, done.stderr

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        client.send(b"cat\n")
        sender = threading.Thread(target=lambda: client.send(BIG).end())
        sender.start()
        echoed = client.rest()
        sender.join()
        return echoed

    result, echoed, _ = perform(operation, script, dispatch)
    assert result == (b"cat\n", 0, b"")
    assert echoed == BIG


@pytest.mark.filterwarnings("ignore:unclosed")
@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread"])
def test_a_connection_that_no_hook_closes_is_closed_with_its_last_reference(dispatch: str) -> None:
    class Dropping(Server):
        def shutdown_request(self, request: Any) -> None:
            pass

    gc.collect()
    gc.disable()
    try:
        with serving(Dropping(ANY, Echo, dispatch=dispatch)) as server, Client(server.server_address) as client:
            assert client.send(b"hello\n").rest() == b"hello\n"
    finally:
        gc.enable()


def unblock_by_number(own: Any) -> None:
    os.set_blocking(own.fileno(), False)


def unblock_by_duplicate(own: Any) -> None:
    with socket.socket(fileno=os.dup(own.fileno())) as duplicate:
        duplicate.setblocking(False)


def unblock_by_subprocess(own: Any) -> None:
    subprocess.run([sys.executable, "-c", "import os; os.set_blocking(0, False)"], stdin=own.fileno(), check=True)


@pytest.mark.parametrize("unblock", [unblock_by_number, unblock_by_duplicate, unblock_by_subprocess])
def test_who_makes_the_descriptor_non_blocking_changes_no_call(unblock: Callable[[Any], None]) -> None:
    """O_NONBLOCK belongs to the connection and not to the descriptor (open(2)), so other code may change it."""

    def operation(own: Any) -> Any:
        unblock(own)
        steps = next(iter(server_of(own).table)).steps
        got = [own.recv(10)]
        unblock(own)
        got.append(own.makefile("rb").readline())
        own.settimeout(0.01)
        with pytest.raises(TimeoutError, match="timed out"):
            own.recv(10)
        own.settimeout(None)
        own.sendall(BIG)
        own.settimeout(0)
        with pytest.raises(BlockingIOError):
            own.recv(10)
        return got, os.get_blocking(own.fileno()), next(iter(server_of(own).table)).steps - steps < 1000

    def server_of(own: Any) -> Any:
        return own.transport.entry.server

    def script(client: Client, suspended: Callable[..., None]) -> bytes:
        suspended(READING)
        client.send(b"one")
        suspended(READING, read=3)
        client.send(b"a line\n")
        suspended(WRITING)
        return client.receive(len(BIG))

    result, received, _ = perform(operation, script)
    assert result == ([b"one", b"a line\n"], False, True)
    assert received == BIG


@pytest.mark.parametrize("call", ["send", "sendmsg", "raw file"])
@pytest.mark.parametrize("dispatch", ["inline", "greenlet"])
def test_a_blocking_stream_takes_all_that_one_call_sends(call: str, dispatch: str) -> None:
    """Without a timeout, send(2) blocks until there is room for all data. Some handlers rely on that."""
    data = BIG[:5_000_000]

    def operation(own: Any) -> Any:
        if call == "send":
            return own.send(data)
        if call == "sendmsg":
            return own.sendmsg([data[:100], data[100:]])
        return own.makefile("wb", buffering=0).write(data)

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        suspended(WRITING)
        return client.rest()

    assert perform(operation, script, dispatch)[:2] == (len(data), data)


@pytest.mark.parametrize("by", ["another request", "a thread"])
def test_who_waits_for_a_socket_that_someone_closes_goes_on(by: str) -> None:
    requests: list[Any] = []

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            requests.append(self.request)
            if self.request.recv(10) == b"close":
                requests[0].close()

        def finish(self) -> None:
            requests.remove(self.request)

    with serving(Server(ANY, Handler)) as server:
        with Client(server.server_address) as one:
            wait_until(server, lambda: len(requests) == 1)
            if by == "a thread":
                requests[0].close()
                server.engine.loop.poller.wake()
            else:
                with Client(server.server_address) as two:
                    assert two.send(b"close").rest() == b""
            assert one.rest() == b""
            wait_until(server, lambda: not server.table)
        assert requests == []
        assert [getattr(each, "errno", None) for each in server.failures] == [errno.EBADF]


def test_what_one_thread_left_suspended_ends_when_another_serves() -> None:
    with Server(ANY, Echo) as server, Client(server.server_address) as client:
        serve_until(server, lambda: [entry.state for entry in server.table] == [READING])
        with serving(server):
            assert client.rest() == b""
            with Client(server.server_address) as other:
                assert other.ask(b"hello\n") == b"hello\n"
            wait_until(server, lambda: not server.table)
    greenlet.greenlet(
        bool
    ).switch()  # the stack was left to this thread, which unwinds it when it next has to do with greenlets


def test_a_stack_serves_one_request_after_another_and_keeps_nothing_of_them() -> None:
    """Runs in the main thread: anything that another thread keeps would outlive the test."""
    seen: contextvars.ContextVar[int] = contextvars.ContextVar("seen")
    stacks, contexts, handlers = [], [], []

    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            stacks.append(greenlet.getcurrent())
            contexts.append(seen.get(None))
            seen.set(len(stacks))
            handlers.append(weakref.ref(self))
            self.wfile.write(self.rfile.readline())

    def serve_three(server: Server, serve: Callable[[Callable[[], bool]], None]) -> None:
        del stacks[:], contexts[:], handlers[:]
        for number in range(3):
            with Client(server.server_address) as client:
                client.send(b"hello\n")
                serve(lambda number=number: len(stacks) > number and not server.table)  # type: ignore[misc]
                assert client.rest() == b"hello\n"
        gc.collect()

    def count_stacks() -> int:
        """Count the stacks of requests. A thread's own greenlet doesn't count: another thread frees it later."""
        return sum(type(each) is RequestGreenlet for each in gc.get_objects())

    with Server(ANY, Handler) as server:
        serve_three(server, functools.partial(serve_until, server))
        assert (len({*stacks}), contexts) == (1, [None, None, None])
        assert [each() for each in handlers] == [None, None, None]
        made = count_stacks()
        with serving(server):
            serve_three(server, functools.partial(wait_until, server))
        assert contexts == [None, None, None]
        del stacks[:]
        assert count_stacks() <= made


def test_a_default_timeout_is_each_sockets_own(request: pytest.FixtureRequest) -> None:
    """`socket.setdefaulttimeout` sets the timeout of new sockets, but the real sockets below them still never wait."""
    request.addfinalizer(lambda: socket.setdefaulttimeout(None))

    def operation(own: Any) -> Any:
        with own.dup() as copy:
            return own.gettimeout(), copy.gettimeout(), copy.recv(5), own.recv(5)

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        suspended(READING)
        client.send(b"hello")
        suspended(READING, read=5)
        client.send(b"again")

    socket.setdefaulttimeout(WAIT_S)
    assert perform(operation, script)[0] == (WAIT_S, WAIT_S, b"hello", b"again")


def test_another_thread_writes_while_the_handler_waits_to_read() -> None:
    go, threads = threading.Event(), []

    def operation(own: Any) -> Any:
        threads.append(threading.Thread(target=lambda: go.wait(WAIT_S) and own.sendall(BIG)))
        threads[0].start()
        return own.recv(100)

    def script(client: Client, suspended: Callable[..., None]) -> Any:
        suspended(READING)
        go.set()
        received = client.receive(len(BIG))
        threads[0].join(WAIT_S)
        suspended(READING)
        client.send(b"thanks")
        return received

    assert perform(operation, script)[:2] == (b"thanks", BIG)


# -- requests that end early ------------------------------------------------------------------------------------------


class Careful(reqtable.StreamRequestHandler):
    """Notes how it ends. A line `b"end ..."` ends another request, or the server."""

    def handle(self) -> None:
        try:
            text = self.rfile.readline()
            self.server.ends[text]()
        except BaseException as error:
            self.server.log.append(type(error).__name__)
            raise
        finally:
            self.server.log.append("finally")

    def finish(self) -> None:
        self.server.log.append("finish")
        super().finish()


UNWOUND = ["GreenletExit", "finally", "finish"]


@pytest.mark.parametrize("act", ["cancel", "server_close"])
@pytest.mark.parametrize("where", ["another thread", "another request", "itself", "not serving"])
def test_a_suspended_request_that_is_ended_is_unwound(act: str, where: str) -> None:
    """Its `finally` blocks run, its client sees the end of file, and no error is reported."""
    server = Server(ANY, Careful)
    server.log = []
    end = {"cancel": lambda: server.table.cancel(1), "server_close": server.server_close}[act]
    server.ends = {b"end\n": end}
    with Client(server.server_address) as client:
        if where == "not serving":
            serve_until(server, lambda: len(server.table) == 1)
            end()
            assert client.rest() == b""
            assert (len(server.table), server.log) == (0, UNWOUND)
            server.server_close()
        else:
            with serving(server):
                server.wait_for(READING)
                if where == "another thread":
                    end()
                elif where == "itself":
                    client.send(b"end\n")
                else:
                    with Client(server.server_address) as other:
                        other.send(b"end\n")
                        other.rest()
                assert client.rest() == b""
            wanted = ["finally", "finish"] if where == "itself" else UNWOUND
            others = ["finally", "finish"] if where == "another request" else []
            assert sorted(server.log) == sorted(wanted + others)
            assert len(server.table) == 0
    assert server.failures == []


def test_what_another_threads_loop_leaves_suspended_ends_with_it() -> None:
    """A greenlet can't move to another thread. A request that the main thread's loop leaves suspended goes on later."""
    server = Server(ANY, Careful)
    server.log, server.ends = [], {b"hello\n": bool}
    one_waits = functools.partial(serve_until, server, lambda: len(server.table) == 1)
    with server, Client(server.server_address) as client:
        thread = threading.Thread(target=one_waits)
        thread.start()
        thread.join(WAIT_S)
        assert (len(server.table), server.log) == (0, UNWOUND)
        assert client.rest() == b""
        with Client(server.server_address) as later:
            one_waits()
            later.send(b"hello\n")
            serve_until(server, lambda: not len(server.table))
            assert later.rest() == b""
    assert server.log == [*UNWOUND, "finally", "finish"]
    assert server.failures == []


@pytest.mark.parametrize("manner", ["reads on", "writes a lot", "raises"])
def test_a_handler_that_resists_its_end_does_not_hold_up_the_others(manner: str) -> None:
    class Resisting(Echo):
        def handle(self) -> None:
            try:
                super().handle()
            except BaseException:
                if manner == "reads on":
                    for _ in range(5):
                        try:
                            self.request.recv(1)
                        except BaseException:
                            server.log.append(manner)
                elif manner == "writes a lot":
                    self.wfile.write(BIG)
                else:
                    raise KeyError(manner) from None

    server = Server(ANY, Resisting)
    server.log = []
    with serving(server), Client(server.server_address) as client, Client(server.server_address) as other:
        server.wait_for(READING, READING)
        assert server.table.cancel(min(entry.id for entry in server.table if entry.peer == client.socket.getsockname()))
        server.wait_for(READING)
        assert other.send(b"hello\n").rest() == b"hello\n"
        assert BIG.startswith(client.rest())
    assert server.log == (["reads on"] * 5 if manner == "reads on" else [])
    assert [type(failure) for failure in server.failures] == ([KeyError] if manner == "raises" else [])


@pytest.mark.parametrize("whose", ["own", "another's"])
def test_a_descriptors_number_may_be_another_requests_at_once(whose: str) -> None:
    """A handler closes its own or another request's socket. In the same pass, a new request gets the same number."""
    seen: list[tuple[Any, int]] = []

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            seen.append((self.request, self.request.fileno()))
            text = self.request.recv(100)
            if text == b"close":
                seen[0][0].close()
            else:
                self.request.sendall(text)

    with Server(ANY, Handler) as server, Client(server.server_address) as first:
        serve_until(server, lambda: len(server.table) == 1)
        closer = first if whose == "own" else Client(server.server_address)
        second = Client(server.server_address)
        closer.send(b"close")
        serve_until(server, lambda: seen[-1] != seen[0] and seen[-1][1] == seen[0][1])
        second.send(b"hello")
        assert first.rest() == b""
        serve_until(server, lambda: len(server.table) == 0)
        assert second.rest() == b"hello"
        second.close()
        closer.close()
        # the one that waited for it goes on, and finds it closed
        assert [getattr(each, "errno", None) for each in server.failures] == ([] if whose == "own" else [errno.EBADF])


# -- errors after a wait ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError("a bug"), ConnectionAbortedError("gone")])
def test_an_error_after_a_wait_is_reported_once(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """A bug is logged with a traceback, a peer's fault without one. Output that was sent before still arrives."""

    class Failing(Echo):
        def handle(self) -> None:
            super().handle()
            raise error

    caplog.set_level(logging.INFO, "reqtable")
    with serving(reqtable.TCPServer(ANY, Failing, dispatch="greenlet")) as server:
        with Client(server.server_address) as client:
            wait_until(server, lambda: [entry.state for entry in server.table] == [READING])
            assert client.send(b"hello\n").rest() == b"hello\n"
    (record,) = [each for each in caplog.records if each.name == "reqtable"]
    is_bug = isinstance(error, KeyError)
    assert record.levelno == (logging.ERROR if is_bug else logging.INFO)
    assert bool(record.exc_info) == is_bug
    assert ("in handle" in caplog.text) == is_bug


@pytest.mark.parametrize("state", [READING, WRITING], ids=lambda state: state.name)
def test_a_reset_while_suspended_is_the_handlers_error(state: State) -> None:
    class Handler(Echo):
        def handle(self) -> None:
            super().handle()
            self.wfile.write(BIG if state is WRITING else b"go on\n")
            self.rfile.readline()

    with serving(Server(ANY, Handler)) as server, Client(server.server_address) as other:
        server.wait_for(READING)
        client = Client(server.server_address).send(b"hello\n")
        assert client.line() == b"hello\n"
        server.wait_for(READING, state)
        client.reset()
        server.wait_for(READING)
        assert [isinstance(failure, ConnectionError) for failure in server.failures] == [True]
        assert other.ask(b"hello\n") == b"hello\n"
        other.end()
        assert other.rest().endswith(BIG if state is WRITING else b"go on\n")
