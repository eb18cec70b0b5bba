"""Policy `fork`: a child for each request, the descriptors that it holds, how it exits, and who reaps it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import Config, Transition, line, state
from reqtable.config import ForkOptions
from tests.policies import ANY, AsyncHandsOff, AsyncWhere, StateWhere, Where, empty, where
from tests.support import WAIT_S, Client, Started, served, serving, wait_until


@pytest.mark.parametrize("handler", [Where, StateWhere, AsyncWhere])
def test_fork_gives_each_request_a_child(handler: Any) -> None:
    with served(handler, "fork") as server:
        one, other = Client(server.server_address), Client(server.server_address)
        pids = [where(one)[0], where(other)[0]]
        assert len({*pids, os.getpid()}) == 3
        assert where(one)[0] == pids[0]
        wait_until(server, lambda: server.active_children == set(pids))
        one.hang_up()
        other.hang_up()
        empty(server)
        assert server.active_children == set()
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_child_that_is_killed_fails_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    with served(Where, "fork") as server:
        client, other = Client(server.server_address), Client(server.server_address)
        pid, _ = where(client)
        assert where(other)[0] != pid
        os.kill(pid, signal.SIGKILL)
        assert client.rest() == b""
        client.hang_up()
        wait_until(server, lambda: len(server.table) == 1)
        assert "its child was killed by SIGKILL" in caplog.text
        assert where(other)[0] not in (pid, os.getpid())
        other.hang_up()
        empty(server)


# -- what a child holds -----------------------------------------------------------------------------------------------


class Descriptors(reqtable.StateRequestHandler):
    """Answers with the sockets and event descriptors that its process has open."""

    def start(self) -> Transition:
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        kinds = ("socket:", "anon_inode:[eventp", "anon_inode:[pidfd", "anon_inode:[eventf")
        own = os.readlink(f"/proc/self/fd/{self.entry.transport.request.fileno()}")
        others = sorted(each for each in found if each.startswith(kinds) and each != own)
        self.send(repr(others).encode() + b"\n")
        return self.wait

    @state(line())
    def wait(self, text: bytes) -> None:
        return None


class BlockingDescriptors(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        own = os.readlink(f"/proc/self/fd/{self.request.fileno()}")
        kinds = ("socket:", "anon_inode:[eventp", "anon_inode:[pidfd", "anon_inode:[eventf")
        blocking = self.request.getblocking() and os.get_blocking(self.request.fileno())
        self.wfile.write(repr(sorted(each for each in found if each.startswith(kinds) and each != own)).encode())
        self.wfile.write(b" blocking\n" if blocking else b" not blocking\n")
        self.rfile.readline()


SERVER = """
import sys
sys.path[:0] = [{root!r}]
import atexit, os, reqtable, signal
from tests import test_fork_policy
parent = os.getpid()
atexit.register(lambda: print("atexit in", "the parent" if os.getpid() == parent else "a child", flush=True))
server = reqtable.ForkingTCPServer(("127.0.0.1", 0), getattr(test_fork_policy, {handler!r}))
signal.signal(signal.SIGTERM, lambda *_: server.shutdown())
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("handler", ["Descriptors", "BlockingDescriptors"])
def test_a_child_holds_its_own_socket_and_no_other(handler: str) -> None:
    """The server runs in its own process: otherwise the child would also inherit the client's socket."""
    script = SERVER.format(root=str(Path(__file__).parent.parent), handler=handler)
    with Started([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        try:
            with Client(address) as one, Client(address) as two, Client(address) as three:
                answers = [client.line() for client in (one, two, three)]
                driver = b"2 of its own"  # the wake-up of the driver's loop
                for answer in answers:
                    others = eval(answer.removesuffix(b"\n").removesuffix(b" blocking"))
                    assert len(others) == (2 if handler == "Descriptors" else 0), (others, driver)
                    assert not [each for each in others if each.startswith("anon_inode")]
                    assert handler == "Descriptors" or answer.endswith(b" blocking\n")
                if handler == "Descriptors":
                    shown = [set(eval(answer)) for answer in answers]
                    assert not shown[0] & shown[1] & shown[2], "they share a socket"
        finally:
            process.terminate()
            out, _ = process.communicate(timeout=WAIT_S)
    assert out.splitlines() == ["atexit in the parent"]


# -- how it leaves ----------------------------------------------------------------------------------------------------


def test_an_error_in_a_child_is_reported_there_and_its_output_delivered() -> None:
    class Fails(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"half\n")
            raise ValueError("half-way")

    class Reporting(reqtable.ForkingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            request.sendall(b"reported by a child\n" if os.getpid() != parent else b"reported by the parent\n")

    parent = os.getpid()
    with serving(Reporting(ANY, Fails)) as server:
        client = Client(server.server_address)
        assert client.rest() == b"half\nreported by a child\n"
        client.hang_up()
        empty(server)


def test_the_parents_hooks_under_fork_are_socketservers() -> None:
    calls: list[str] = []

    class Recording(reqtable.ForkingTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            calls.append("process_request")
            super().process_request(request, client_address)

        def finish_request(self, request: Any, client_address: Any) -> None:
            calls.append("finish_request")
            super().finish_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            calls.append("shutdown_request")
            super().shutdown_request(request)

        def close_request(self, request: Any) -> None:
            calls.append("close_request")
            super().close_request(request)

    with serving(Recording(ANY, Where)) as server:
        client = Client(server.server_address)
        assert where(client)[0] != os.getpid()
        client.hang_up()
        empty(server)
    assert calls == ["process_request", "close_request"]


def test_ctrl_c_ends_a_forking_server_and_its_children() -> None:
    """A terminal sends the signal to the whole process group. The client is silent."""
    script = SERVER.format(root=str(Path(__file__).parent.parent), handler="StateWhere")
    script = script.replace(
        "signal.signal(signal.SIGTERM", "signal.signal(signal.SIGINT, signal.default_int_handler) #"
    )
    script += "\nserver.server_close()\n"
    script = script.replace("server.serve_forever()", "try: server.serve_forever()\nexcept KeyboardInterrupt: pass")
    with Started(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        with Client(("127.0.0.1", int(process.stdout.readline()))) as client:
            where(client)
            os.killpg(process.pid, signal.SIGINT)
            out, _ = process.communicate(timeout=WAIT_S)
    assert out == "atexit in the parent\n"


# -- who collects it --------------------------------------------------------------------------------------------------


def test_children_that_are_not_waited_for_leave_no_zombie() -> None:
    class Hurried(reqtable.ForkingTCPServer):
        block_on_close = False

    server = Hurried(ANY, Where)
    loop = threading.Thread(target=server.serve_forever)
    loop.start()
    client = Client(server.server_address)
    pid, _ = where(client)
    server.shutdown()
    loop.join(WAIT_S)
    server.server_close()
    assert where(client)[0] == pid, "it goes on"
    [waiter] = [each for each in threading.enumerate() if each.name == "reqtable-children"]
    client.hang_up()
    waiter.join(WAIT_S)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@pytest.mark.parametrize("without", ["pidfd_open", None])
def test_children_are_collected_with_and_without_pidfd(without: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if without:
        monkeypatch.delattr(os, without)
    with served(Where, "fork") as server:
        clients = [Client(server.server_address) for _ in range(5)]
        pids = {where(client)[0] for client in clients}
        wait_until(server, lambda: server.active_children == pids)
        for client in clients:
            client.hang_up()
        empty(server)
        assert server.active_children == set()


def test_collecting_children_by_hand_disturbs_nobody() -> None:
    """Some programs for `socketserver` collect children in every pass."""

    class Collecting(reqtable.ForkingTCPServer):
        def service_actions(self) -> None:
            self.collect_children()

    for dispatch in ("fork", "thread"):
        with serving(Collecting(ANY, AsyncHandsOff, dispatch=dispatch)) as server:
            for _ in range(20):
                client = Client(server.server_address)
                if dispatch == "thread":
                    client.send(b"fork\n").line()
                    assert client.line() == b"over after 1\n"
                assert where(client)[0] != os.getpid()
                client.hang_up()
            empty(server)
            assert not server.active_children


# -- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_max_children_make_others_wait_and_delay_no_inline_server() -> None:
    """200 slow clients share eight children; meanwhile an inline server in the same engine answers at once."""

    class Few(reqtable.ForkingTCPServer):
        max_children = 8
        request_queue_size = 256

    engine = reqtable.Engine()
    forking = Few(ANY, Where)
    inline = reqtable.TCPServer(ANY, Where)
    engine.add(forking)
    engine.add(inline)
    try:
        with serving(forking):
            slow = [Client(forking.server_address) for _ in range(200)]
            wait_until(forking, lambda: len(engine.table) == 200)
            wait_until(forking, lambda: len(forking.active_children or ()) == 8)
            began = time.perf_counter()
            with Client(inline.server_address) as quick:
                assert where(quick)[0] == os.getpid()
            took = time.perf_counter() - began
            assert len(forking.active_children or ()) == 8
            assert took < 1.0, "children that nobody waits for must not hold the loop up"
            print(f"200 slow clients, 8 children: an inline request took {took * 1000:.1f} ms")
            for client in slow:
                client.hang_up()
            empty(forking)
            assert forking.active_children == set()
    finally:
        inline.server_close()


def test_datagrams_that_waited_for_a_child_are_answered_once() -> None:
    class Numbered(reqtable.StateRequestHandler):
        count: int = 0

        @state(reqtable.datagram(), timeout=WAIT_S)
        def each(self, data: bytes) -> Transition:
            self.count += 1
            self.send(b"%d:%b" % (self.count, data))
            return None if data == b"end" else self.each

    server = reqtable.UDPServer(ANY, Numbered, dispatch="fork", config=Config(fork=ForkOptions(max_children=1)))
    with serving(server):
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
        ):
            for each in (one, other):
                each.settimeout(WAIT_S)
                each.connect(server.server_address)
            one.send(b"a")
            assert one.recv(100) == b"1:a"
            for data in (b"x", b"y", b"end"):
                other.send(data)
            wait_until(server, lambda: len(server.table) == 2)
            one.send(b"end")
            assert one.recv(100) == b"2:end"
            assert [other.recv(100) for _ in range(3)] == [b"1:x", b"2:y", b"3:end"]
            other.send(b"end")
            assert other.recv(100) == b"1:end", "nothing of it was answered twice"
        empty(server)


# -- forking at the end of a pass -------------------------------------------------------------------------------------


@contextlib.contextmanager
def queued(
    count: int, handler: Any = Where, made: Any = reqtable.ForkingTCPServer
) -> Iterator[tuple[Any, list[Client]]]:
    """Serve clients that connected before the server's first pass. Yields the server and the clients."""
    server = made(ANY, handler)
    clients = [Client(server.server_address) for _ in range(count)]
    with serving(server):
        try:
            yield server, clients
        finally:
            for client in clients:
                client.hang_up()


class Noted(reqtable.ForkingTCPServer):
    """Notes which hooks are called in the parent."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hooks: list[str] = []

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.hooks.append("verify")
        return super().verify_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self.hooks.append("close")
        super().close_request(request)


@pytest.mark.parametrize("handler", [Where, StateWhere, AsyncWhere])
def test_all_that_a_pass_takes_over_are_forked_at_its_end(handler: Any) -> None:
    with queued(5, handler, Noted) as (server, clients):
        assert len({where(client)[0] for client in clients} - {os.getpid()}) == 5
        assert server.hooks[:5] == ["verify"] * 5
        for client in clients:
            client.hang_up()
        empty(server)
        assert server.hooks == ["verify"] * 5 + ["close"] * 5


def test_a_request_that_ends_before_it_is_forked_has_no_child() -> None:
    class Fickle(Noted):
        def process_request(self, request: Any, client_address: Any) -> None:
            super().process_request(request, client_address)
            if len(self.hooks) == 1:
                self.table.cancel(1)

    with queued(2, Where, Fickle) as (server, (ended, served)):
        pid, _ = where(served)
        assert ended.socket.recv(1) == b""
        wait_until(server, lambda: server.active_children == {pid} and server.hooks.count("close") == 2)


def test_where_no_process_is_left_forking_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork
    calls: list[None] = []

    def scarce() -> int:
        calls.append(None)
        if 2 <= len(calls) <= 4:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", scarce)
    with queued(3) as (server, clients):
        pids = {where(client)[0] for client in clients}
        assert len(calls) == 6
        wait_until(server, lambda: server.active_children == pids)


class Sorry(StateWhere):
    def on_error(self, error: Exception) -> Transition:
        self.send(b"%b\n" % type(error).__name__.encode())
        return super().on_error(error)


@pytest.mark.parametrize(("handler", "said"), [(Where, b""), (Sorry, b"OSError\n")])
def test_a_request_that_can_not_be_forked_fails_alone(
    handler: Any, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = os.fork
    calls: list[None] = []

    def fails_once() -> int:
        calls.append(None)
        if len(calls) == 1:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    class Told(reqtable.ForkingTCPServer):
        errors: ClassVar[list[Any]] = []

        def handle_error(self, request: Any, client_address: Any) -> None:
            self.errors.append(sys.exc_info()[1])

    monkeypatch.setattr(os, "fork", fails_once)
    with queued(2, handler, Told) as (server, (failed, served)):
        assert where(served)[0] != os.getpid()
        assert failed.line() == said
        failed.hang_up()  # nobody has to linger
        wait_until(server, lambda: len(server.table) == 1)
        assert [type(error) for error in server.errors] == [OSError]
