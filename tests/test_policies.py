"""Where handlers run: threads, pools, children; handing a request over half-way; that nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import Config, ConfigurationError, Limits, Transition, call, hand_off, line, nothing, state, until
from reqtable.config import ExecutorOptions, ForkOptions, PoolOptions, ThreadOptions
from reqtable.dispatch.policies.thread import RequestThread
from reqtable.loop.loop import TABLES
from tests.support import WAIT_S, Client, served, serving, wait_until

ANY = ("127.0.0.1", 0)


class Where(reqtable.StreamRequestHandler):
    """Answers each line with the process and the thread that it runs in."""

    def handle(self) -> None:
        for _ in self.rfile:
            self.wfile.write(b"%d %d\n" % (os.getpid(), threading.get_ident()))


class StateWhere(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))
        return self.command


class AsyncWhere(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while await self.read(line()):
            await self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))


class Held(reqtable.StateRequestHandler):
    """Holds whatever it runs in until the server's `gate` opens."""

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.server.entered.release()
        assert self.server.gate.wait(WAIT_S)
        self.send(text)
        return self.command


class HeldBlocking(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for text in self.rfile:
            self.server.entered.release()
            assert self.server.gate.wait(WAIT_S)
            self.wfile.write(text)


@contextlib.contextmanager
def held(handler: Any, dispatch: str, **options: Any) -> Iterator[Any]:
    server = reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=Config(**options))
    server.gate, server.entered = threading.Event(), threading.Semaphore(0)  # type: ignore[attr-defined]
    with serving(server):
        try:
            yield server
        finally:
            server.gate.set()  # type: ignore[attr-defined]


def where(client: Client) -> tuple[int, int]:
    pid, thread = client.ask(b"?\n").split()
    return int(pid), int(thread)


def empty(server: Any) -> None:
    wait_until(server, lambda: len(server.table) == 0)


# -- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [Where, StateWhere, AsyncWhere])
def test_thread_gives_each_request_its_own(handler: Any) -> None:
    with served(handler, "thread") as server:
        with Client(server.server_address) as one, Client(server.server_address) as other:
            first, second = where(one), where(other)
            assert where(one) == first, "one thread drives it to its end"
            assert first[0] == second[0] == os.getpid()
            loop = next(ident for ident, table in TABLES.items() if table is server.table)
            assert len({first[1], second[1], loop}) == 3
            wait_until(server, lambda: [row["letter"] for row in server.table.snapshot()] == ["D", "D"])
            assert {row["policy"] for row in server.table.snapshot()} == {"thread"}
        empty(server)
        assert len(server._dispatcher.chosen.threads) == 0


def test_a_thread_is_started_and_not_waited_for() -> None:
    done: list[int] = []
    switched_s = sys.getswitchinterval()
    thread = RequestThread(lambda: done.append(threading.get_ident()), "not-yet", daemon=False)
    try:
        sys.setswitchinterval(60)  # nobody takes the interpreter's lock from us
        thread.start()
        assert not done
        assert thread.is_alive()
    finally:
        sys.setswitchinterval(switched_s)
    thread.join()
    assert done == [thread.ident]
    assert not thread.is_alive()


def test_a_pass_ends_when_its_threads_have_begun() -> None:
    with served(Where, "thread") as server:
        begun: list[bool] = []

        def look() -> None:
            begun.extend(thread.ident is not None for thread in server._dispatcher.chosen.threads)

        server.service_actions = look
        with Client(server.server_address) as client:
            where(client)
            wait_until(server, lambda: bool(begun))
        assert all(begun)


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


def test_pool_steps_run_in_threads_and_the_loop_does_the_io() -> None:
    with served(StateWhere, "pool") as server, Client(server.server_address) as client:
        loop = next(ident for ident, table in TABLES.items() if table is server.table)
        pid, thread = where(client)
        assert (pid == os.getpid(), thread != loop) == (True, True)
        wait_until(server, lambda: [row["state"] for row in server.table.snapshot()] == ["READING"])


def test_ten_slow_clients_share_two_threads() -> None:
    """Only a step whose input is complete takes a thread: half a line takes none."""
    with held(Held, "pool", pool=PoolOptions(size=2)) as server:
        slow = [Client(server.server_address).send(b"half a li") for _ in range(10)]
        wait_until(server, lambda: len(server.table) == 10)
        server.gate.set()
        with Client(server.server_address) as quick:
            assert quick.ask(b"quick\n") == b"quick\n"
        for client in slow:
            assert client.ask(b"ne\n") == b"half a line\n"
            client.close()
        empty(server)


@pytest.mark.parametrize(
    ("dispatch", "handler", "options"),
    [
        ("thread", HeldBlocking, {"thread": ThreadOptions(threads_max=2)}),
        ("thread", Held, {"thread": ThreadOptions(threads_max=2)}),
        ("pool", HeldBlocking, {"pool": PoolOptions(size=2)}),
        ("pool", Held, {"pool": PoolOptions(size=2)}),
    ],
)
def test_no_more_than_so_many_at_a_time(dispatch: str, handler: Any, options: Any) -> None:
    with held(handler, dispatch, **options) as server:
        clients = [Client(server.server_address).send(b"%d\n" % number) for number in range(6)]
        for _ in range(2):
            assert server.entered.acquire(timeout=WAIT_S)
        wait_until(server, lambda: len(server.table) == 6)
        if handler is HeldBlocking or dispatch == "thread":
            wait_until(server, lambda: len(server.table.snapshot(state="DELEGATED")) == 2)
            waiting = server.table.snapshot(state="OFFLOADED")
            assert [row["waits_for"] for row in waiting] == ["vacancy()"] * 4
        assert not server.entered.acquire(blocking=False), "a third one has begun"
        server.gate.set()
        for number, client in enumerate(clients):
            assert client.line() == b"%d\n" % number
            client.close()
            if dispatch == "thread" or handler is HeldBlocking:
                continue
        empty(server)


def test_who_waits_for_a_vacancy_can_be_cancelled() -> None:
    with held(HeldBlocking, "thread", thread=ThreadOptions(threads_max=1)) as server:
        clients = [Client(server.server_address).send(b"%d\n" % number) for number in range(3)]
        assert server.entered.acquire(timeout=WAIT_S)
        wait_until(server, lambda: len(server.table) == 3)
        rows = {row["id"]: row["peer"] for row in server.table.snapshot(state="OFFLOADED")}
        by_peer = {reqtable.table.addresses.address_text(c.socket.getsockname()): c for c in clients}  # type: ignore[attr-defined]
        gone = by_peer[next(iter(rows.values()))]
        assert server.table.cancel(next(iter(rows)))
        assert gone.rest() == b""
        server.gate.set()
        for client in clients:
            if client is not gone:
                assert client.line().strip().isdigit()
            client.close()
        empty(server)


def test_when_no_thread_can_be_started_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refused: list[bool] = []

    with held(HeldBlocking, "thread") as server:
        first = Client(server.server_address).send(b"first\n")
        assert server.entered.acquire(timeout=WAIT_S)

        def refuse(thread: threading.Thread) -> None:
            refused.append(True)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        second = Client(server.server_address).send(b"second\n")
        wait_until(server, lambda: bool(server.table.snapshot(state="OFFLOADED")))
        assert refused
        monkeypatch.setattr(threading.Thread, "start", start)
        server.gate.set()
        assert first.end().rest() == b"first\n"
        assert second.end().rest() == b"second\n"
        first.close()
        second.close()
        empty(server)


def test_when_no_thread_can_be_started_at_all_the_request_fails_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start
    with served(StateWhere, "thread") as server:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with Client(server.server_address) as client:
            assert client.rest() == b""
        monkeypatch.setattr(threading.Thread, "start", start)
        assert "can't start new thread" in caplog.text
        with Client(server.server_address) as client:
            assert where(client)[0] == os.getpid()
        empty(server)


class Overlap(reqtable.StateRequestHandler):
    """Notices a second step of the same request beside the first."""

    steps: int = 0

    @state(line())
    def command(self, text: bytes) -> Transition:
        assert not self.__dict__.get("inside")
        self.inside = True
        time.sleep(0)  # lets another thread in
        self.steps += 1
        self.inside = False
        self.send(b"%d\n" % self.steps)
        return self.command


def test_steps_of_one_request_never_overlap() -> None:
    with served(Overlap, "pool") as server, Client(server.server_address) as client:
        client.send(b"\n" * 500)
        assert [client.line() for _ in range(500)] == [b"%d\n" % number for number in range(1, 501)]


# -- cancelling, and deadlines ----------------------------------------------------------------------------------------


class Stuck(reqtable.StreamRequestHandler):
    """Waits for a line that does not come; says how its wait ended."""

    def handle(self) -> None:
        self.wfile.write(b"%d\n" % os.getpid())
        try:
            self.server.ended.append(self.rfile.readline())  # type: ignore[attr-defined]
        except OSError as error:
            self.server.ended.append(error)  # type: ignore[attr-defined]


class StateStuck(reqtable.StateRequestHandler):
    def start(self) -> Transition:
        self.send(b"%d\n" % os.getpid())
        return self.never

    @state(line())
    def never(self, text: bytes) -> Transition:
        raise AssertionError(text)

    def on_close(self) -> None:
        self.server.ended.append("closed")


@pytest.mark.parametrize("how", ["cancel", "expire"])
@pytest.mark.parametrize("handler", [Stuck, StateStuck])
@pytest.mark.parametrize("dispatch", ["thread", "pool", "fork"])
def test_who_has_the_request_ends_with_it(dispatch: str, handler: Any, how: str) -> None:
    limits = Limits(request_timeout_s=0.3 if how == "expire" else None)
    server = reqtable.TCPServer(ANY, handler, dispatch=dispatch, config=Config(limits=limits))
    server.ended = []  # type: ignore[attr-defined]
    with serving(server):
        client = Client(server.server_address)
        pid = int(client.line())
        if how == "cancel":
            [row] = server.table.snapshot()
            assert server.table.cancel(row["id"])
        with contextlib.suppress(ConnectionResetError):
            assert client.rest() == b""
        client.close()
        empty(server)
        if dispatch == "fork":
            assert pid != os.getpid()
            wait_until(server, lambda: not server.active_children)
        else:
            wait_until(server, lambda: bool(server.ended))
            assert len(server.ended) == 1


class Sleepy(reqtable.StateRequestHandler):
    def start(self) -> Transition:
        self.send(b"asleep\n")
        return self.awake, reqtable.sleep(3600)

    @state()
    def awake(self, _: None) -> None:
        raise AssertionError


@pytest.mark.parametrize("dispatch", ["thread", "fork"])
def test_a_sleep_can_be_cancelled(dispatch: str) -> None:
    with served(Sleepy, dispatch) as server:
        client = Client(server.server_address)
        assert client.line() == b"asleep\n"
        server.table.cancel(server.table.snapshot()[0]["id"])
        assert client.rest() == b""
        client.close()
        empty(server)
        wait_until(server, lambda: server._dispatcher.chosen.busy == 0)


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


# -- what a child holds, and how it leaves ----------------------------------------------------------------------------


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
from tests import test_policies
parent = os.getpid()
atexit.register(lambda: print("atexit in", "the parent" if os.getpid() == parent else "a child", flush=True))
server = reqtable.ForkingTCPServer(("127.0.0.1", 0), getattr(test_policies, {handler!r}))
signal.signal(signal.SIGTERM, lambda *_: server.shutdown())
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("handler", ["Descriptors", "BlockingDescriptors"])
def test_a_child_holds_its_own_socket_and_no_other(handler: str) -> None:
    """In a process of its own: the sockets of a client in the same process would be copied too."""
    script = SERVER.format(root=str(Path(__file__).parent.parent), handler=handler)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
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


def test_server_close_waits_for_children_and_for_threads() -> None:
    for dispatch in ("fork", "thread", "pool"):
        server = reqtable.TCPServer(ANY, Where, dispatch=dispatch)
        loop = threading.Thread(target=server.serve_forever)
        loop.start()
        client = Client(server.server_address)
        where(client)
        server.shutdown()
        loop.join(WAIT_S)
        closed = threading.Event()
        closing = threading.Thread(target=lambda s=server, c=closed: (s.server_close(), c.set()))
        closing.start()
        assert where(client)[1], "it is still served"
        assert not closed.is_set()
        client.hang_up()
        assert closed.wait(WAIT_S)
        closing.join(WAIT_S)
        assert len(server.table) == 0


@pytest.mark.parametrize("dispatch", ["thread", "pool"])
@pytest.mark.parametrize("handler", [Where, StateWhere])
@pytest.mark.parametrize("attributes", [{"daemon_threads": True}, {"block_on_close": False}], ids=str)
def test_server_close_does_not_wait_where_it_is_told_not_to(
    dispatch: str, handler: Any, attributes: dict[str, bool]
) -> None:
    server = type("Hurried", (reqtable.TCPServer,), attributes)(ANY, handler, dispatch=dispatch)
    loop = threading.Thread(target=server.serve_forever)
    loop.start()
    client = Client(server.server_address)
    ident = where(client)[1]
    (thread,) = [each for each in threading.enumerate() if each.ident == ident]
    assert thread.daemon or "daemon_threads" not in attributes
    server.shutdown()
    loop.join(WAIT_S)
    server.server_close()
    if dispatch == "thread" or handler is Where:  # a state machine of a pool is the loop's
        assert where(client)[1] == ident, "it goes on"
    client.hang_up()
    thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("dispatch", ["thread", "pool"])
def test_a_handler_that_closes_its_server_does_not_wait_for_itself(dispatch: str) -> None:
    class Closing(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.server.shutdown()
            self.server.server_close()
            self.wfile.write(b"closed\n")

    with served(Closing, dispatch) as server, Client(server.server_address) as client:
        assert client.line() == b"closed\n"


STAYING = """
import sys, threading, time
import reqtable

class Line(reqtable.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())
        self.rfile.readline()
        print("done", flush=True)

def hold(text):
    print("begun", flush=True)
    release.wait()
    print("done", flush=True)

class Calling(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def first(self, text):
        self.send(text)
        return self.last, reqtable.call(hold, text)

    @reqtable.state()
    def last(self, _):
        return None

release = threading.Event()
handler, dispatch, daemon = sys.argv[1:]
class Server(reqtable.TCPServer):
    daemon_threads = daemon == "daemon"
server = Server(("127.0.0.1", 0), globals()[handler], dispatch=dispatch)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_address[1], flush=True)
sys.stdin.readline()
threading.Thread(target=lambda: (sys.stdin.readline(), release.set()), daemon=True).start()
"""


@pytest.mark.parametrize("daemon", ["daemon", "waited for"])
@pytest.mark.parametrize(("handler", "dispatch"), [("Line", "thread"), ("Line", "pool"), ("Calling", "inline")])
def test_the_interpreters_exit_waits_for_threads_that_are_no_daemons(handler: str, dispatch: str, daemon: str) -> None:
    command = [sys.executable, "-c", STAYING, handler, dispatch, daemon]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with Client(("127.0.0.1", int(process.stdout.readline()))) as client:
            assert client.ask(b"hello\n") == b"hello\n"
            if handler == "Calling":
                assert process.stdout.readline() == "begun\n"
            process.stdin.write("exit\n")
            process.stdin.flush()
            if daemon == "daemon":
                assert process.wait(WAIT_S) == 0
                assert process.stdout.read() == ""
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                process.stdin.write("release\n")
                process.stdin.flush()
                client.send(b"bye\n")
                assert process.wait(WAIT_S) == 0
                assert process.stdout.read() == "done\n"


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


class Leaving(reqtable.StreamRequestHandler):
    """Leaves as its client says."""

    def handle(self) -> None:
        text = self.rfile.readline()
        if text == b"crash\n":
            os._exit(3)
        if text == b"kill\n":
            os.kill(os.getpid(), signal.SIGKILL)
        self.wfile.write(text)


@pytest.mark.parametrize("by", ["handle_request", "_handle_request_noblock"])
@pytest.mark.parametrize("plain_close", [False, True], ids=["shutdown_request", "close_request alone"])
@pytest.mark.parametrize(
    ("base", "text", "answer"),
    [
        (reqtable.ForkingTCPServer, b"crash\n", b""),
        (reqtable.ForkingTCPServer, b"kill\n", b""),
        (reqtable.ForkingTCPServer, b"well\n", b"well\n"),
        (reqtable.ThreadingTCPServer, b"well\n", b"well\n"),
    ],
)
def test_a_client_sees_the_end_though_no_loop_runs(
    by: str, plain_close: bool, base: Any, text: bytes, answer: bytes
) -> None:
    """A program with a loop of its own calls for each request, and then may not call for long."""

    class Server(base):  # type: ignore[misc]
        def shutdown_request(self, request: Any) -> None:
            if plain_close:
                self.close_request(request)
            else:
                super().shutdown_request(request)

    with Server(ANY, Leaving) as server, Client(server.server_address) as client:
        assert select.select([server], [], [], WAIT_S)[0] == [server]
        getattr(server, by)()
        assert client.send(text).rest() == answer


@pytest.mark.parametrize("base", [reqtable.ForkingTCPServer, reqtable.ThreadingTCPServer])
def test_a_request_that_handle_request_took_can_be_cancelled(base: Any) -> None:
    with base(ANY, Where) as server, Client(server.server_address) as client, Client(server.server_address) as next_one:
        server.handle_request()
        where(client)
        (entry,) = server.table
        assert server.table.cancel(entry.id)
        server.handle_request()
        assert client.rest() == b""
        next_one.end()


def test_handle_request_returns_when_a_thread_or_a_child_has_the_request() -> None:
    for made in (reqtable.ThreadingTCPServer, reqtable.ForkingTCPServer):
        with made(ANY, Where) as server:
            clients = []
            for _ in range(3):
                clients.append(Client(server.server_address))
                server.handle_request()
            assert len({where(client) for client in clients}) == 3, "all three are served at once"
            for client in clients:
                client.hang_up()
        assert not (server.active_children if made is reqtable.ForkingTCPServer else server._threads)


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


def test_max_children_make_others_wait_and_delay_no_inline_server() -> None:
    """200 slow clients under `fork` with eight children; an inline server in the same engine answers at once."""

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


# -- handing over half-way --------------------------------------------------------------------------------------------


class StateHandsOff(reqtable.StateRequestHandler):
    """The loop takes lines until one names a policy; that has the rest."""

    lines: int = 0

    @state(line())
    def command(self, text: bytes) -> Transition:
        self.lines += 1
        self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))
        name = text.strip(b"?\n").decode()
        return (self.over, hand_off(name)) if name else self.command

    @state(nothing())
    def over(self, _: None) -> Transition:
        self.send(b"over after %d\n" % self.lines)
        return self.command

    def on_error(self, error: Exception) -> Transition:
        self.send(b"%s\n" % str(error).encode())
        return self.command


class AsyncHandsOff(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        lines = 0
        while text := await self.read(line()):
            lines += 1
            await self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))
            if name := text.strip(b"?\n").decode():
                try:
                    await self.hand_off(name)
                    await self.send(b"over after %d\n" % lines)
                except ConfigurationError as error:
                    await self.send(b"%s\n" % str(error).encode())


@pytest.mark.parametrize("handler", [StateHandsOff, AsyncHandsOff])
@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
@pytest.mark.parametrize("to", ["thread", "fork"])
def test_a_request_is_handed_off_half_way(handler: Any, dispatch: str, to: str) -> None:
    with served(handler, dispatch) as server:
        client = Client(server.server_address)
        before = where(client)
        # the line after the one that hands off is in the table's buffer already: it goes along
        client.send(b"%s\n\n" % to.encode())
        client.line()
        assert client.line() == b"over after 2\n"
        after = tuple(map(int, client.line().split()))
        assert where(client) == after
        if to == "fork":
            assert after[0] != before[0]
        elif dispatch == "inline":
            assert (after[0], after[1] != before[1]) == (before[0], True)
        shown = ("D", "thread" if dispatch == "thread" else to)  # a thread that forks has it, and the child from it
        wait_until(server, lambda: [(row["letter"], row["policy"]) for row in server.table.snapshot()] == [shown])
        client.hang_up()
        empty(server)


@pytest.mark.parametrize("to", ["thread", "fork"])
def test_what_was_handed_off_is_polled_no_more_and_has_taken_its_output_along(to: str) -> None:
    """Once its socket stayed in the selector: a half-closed one spun the loop for as long as the child worked."""

    class Works(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Transition:
            self.send(b"began\n")
            return self.over, hand_off(to)

        @state()
        def over(self, _: None) -> Transition:
            return self.work

        @state(until(b"."))
        def work(self, text: bytes) -> Transition:
            self.send(b"done\n")
            return None

    passes: list[float] = []
    with served(Works, service_actions=lambda server: passes.append(server.table.clock())) as server:
        with Client(server.server_address) as client:
            client.send(b"go\nunfinished")
            wait_until(server, lambda: [row["letter"] for row in server.table.snapshot()] == ["D"])
            [entry] = server.table
            delegated = entry.transport.transport
            assert delegated.watched == 0
            assert delegated.fd not in server.engine.selector.get_map()
            assert entry.output.size == 0
            client.send(b".").end()
            assert client.rest() == b"began\ndone\n"
        empty(server)
    assert len(passes) < 200


@pytest.mark.parametrize("handler", [StateHandsOff, AsyncHandsOff])
def test_what_can_not_be_handed_off_to_is_an_error_of_the_request(handler: Any) -> None:
    with served(handler) as server, Client(server.server_address) as client:
        client.send(b"inline\n")
        client.line()
        assert b"can't take over a request" in client.line()
        client.send(b"nowhere\n")
        client.line()
        assert b"there is no dispatch policy 'nowhere'" in client.line()
        assert where(client)[0] == os.getpid(), "it goes on"


class BlockingHandsOff(reqtable.StreamRequestHandler):
    """A cheap answer in the server, the rest in a child."""

    finished = 0

    def handle(self) -> None:
        text = self.rfile.readline()
        self.wfile.write(b"%d\n" % os.getpid())
        if text == b"hand off\n":
            self.hand_off("fork")
        elif text == b"plain\n":
            if os.fork():
                return
        elif text == b"thread\n":
            self.hand_off("thread")
        for _ in self.rfile:
            self.wfile.write(b"%d\n" % os.getpid())

    def finish(self) -> None:
        self.wfile.write(b"finished by %d\n" % os.getpid() if not self.wfile.closed else b"")
        super().finish()


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("text", [b"hand off\n", b"plain\n"])
def test_a_blocking_handler_forks(dispatch: str, text: bytes) -> None:
    """The table goes on at once, and the client's connection survives the parent's return."""
    with served(BlockingHandsOff, dispatch) as server:
        client = Client(server.server_address)
        assert client.ask(text) == b"%d\n" % os.getpid()
        if text == b"plain\n":
            client.line()  # the parent's finish(), as anyone's who returns after os.fork()
        child = int(client.ask(b"?\n"))
        assert child != os.getpid()
        wait_until(server, lambda: [row["letter"] for row in server.table.snapshot()] == ["D"])
        with Client(server.server_address) as other:
            assert other.ask(b"\n") == b"%d\n" % os.getpid()
            assert int(client.ask(b"?\n")) == child
        client.end()
        assert client.rest() == b"finished by %d\n" % child
        client.close()
        empty(server)
        assert not getattr(server, "active_children", None)
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_a_blocking_handler_can_not_move_to_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    with served(BlockingHandsOff) as server:
        with Client(server.server_address) as client:
            assert client.ask(b"thread\n") == b"%d\n" % os.getpid()
            assert client.rest() == b"finished by %d\n" % os.getpid()
        empty(server)
        assert "is handed off to 'fork' only" in caplog.text


def test_a_fork_by_a_library_is_no_hand_off() -> None:
    """`multiprocessing` forks for itself: the request stays where it is."""
    import multiprocessing

    class Uses(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            process = multiprocessing.get_context("fork").Process(target=int)
            process.start()
            process.join()
            self.wfile.write(b"%d %d\n" % (os.getpid(), process.exitcode or 0))

    with served(Uses) as server, Client(server.server_address) as client:
        assert client.rest() == b"%d 0\n" % os.getpid()


def test_a_cancelled_hand_off_ends_the_child() -> None:
    with served(BlockingHandsOff, "inline") as server:
        client = Client(server.server_address)
        client.ask(b"hand off\n")
        child = int(client.ask(b"?\n"))
        server.table.cancel(server.table.snapshot()[0]["id"])
        assert client.rest() == b""
        client.hang_up()
        empty(server)
        wait_until(server, lambda: not server.active_children)
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


# -- calls ------------------------------------------------------------------------------------------------------------


class Calls(reqtable.StateRequestHandler):
    """Runs what the server's `wanted` says where the line names."""

    @state(line())
    def command(self, text: bytes) -> Transition:
        name = text.strip().decode()
        return self.answer, call(self.server.wanted, on=name or None)

    @state(timeout=5)
    def answer(self, result: Any) -> Transition:
        self.send(b"%r\n" % (result,) if not isinstance(result, bytes) else result)
        return self.command

    def on_error(self, error: Exception) -> Transition:
        self.send(f"{type(error).__name__}: {error}\n".encode())
        return self.command


def fail() -> None:
    raise LookupError("as asked")


def die() -> None:
    os._exit(3)


@contextlib.contextmanager
def calling(wanted: Callable[[], Any], **options: Any) -> Iterator[tuple[Any, Client]]:
    server = reqtable.TCPServer(ANY, Calls, config=Config(**options))
    server.wanted = wanted  # type: ignore[attr-defined]
    with serving(server), Client(server.server_address) as client:
        yield server, client


def test_a_call_runs_where_it_says() -> None:
    with calling(os.getpid) as (_, client):
        assert int(client.ask(b"\n")) == int(client.ask(b"thread\n")) == os.getpid()
        forked = int(client.ask(b"fork\n"))
        assert forked != os.getpid()
        assert int(client.ask(b"fork\n")) not in (forked, os.getpid()), "a child for each call"
        assert int(client.ask(b"process\n")) not in (forked, os.getpid())
        answer = client.ask(b"nowhere\n")
        assert answer.startswith(b"ConfigurationError: there is no executor 'nowhere'; there are \"thread\"")


@pytest.mark.parametrize("on", [b"thread\n", b"fork\n", b"process\n"])
def test_what_a_call_raises_is_raised_in_the_handler(on: bytes) -> None:
    with calling(fail) as (_, client):
        assert client.ask(on) == b"LookupError: as asked\n"


def test_a_call_may_be_of_a_closure_in_a_child_and_its_result_large() -> None:
    big = bytes(10_000_000)
    with calling(lambda: big + b"\n") as (_, client):
        client.send(b"fork\n")
        assert len(client.receive(len(big) + 1)) == len(big) + 1


def test_a_result_that_does_not_pickle_is_a_clear_error() -> None:
    with calling(lambda: threading.Lock()) as (_, client):
        assert client.ask(b"fork\n") == b"HandlerError: a forked call returned a lock, which can't be pickled\n"


def test_a_child_that_dies_fails_its_call_alone() -> None:
    with calling(die) as (_, client):
        assert client.ask(b"fork\n") == b"HandlerError: the child that ran a call exited with status 3\n"
        answer = client.ask(b"process\n")
        assert answer.startswith(b"BrokenProcessPool: ")
        assert client.ask(b"fork\n").startswith(b"HandlerError")


def test_a_lock_of_an_executor_that_is_held_at_a_fork_does_not_hold_up_the_child() -> None:
    """Once it did: the child freed its copy of the executor, which takes that lock."""
    with calling(os.getpid) as (server, client):
        client.ask(b"process\n")
        with server._dispatcher.executor("process")._executor._shutdown_lock:
            assert int(client.ask(b"fork\n")) != os.getpid()


def test_a_forked_call_ends_with_its_request() -> None:
    reader, writer = os.pipe()

    def hang() -> None:
        os.write(writer, b"%d\n" % os.getpid())
        time.sleep(3600)

    with calling(hang) as (server, client):
        client.send(b"fork\n")
        pid = int(os.read(reader, 20))
        server.table.cancel(server.table.snapshot()[0]["id"])
        assert client.rest() == b""
        descriptor = os.pidfd_open(pid) if os.path.exists(f"/proc/{pid}") else -1
        if descriptor >= 0:
            assert select.select([descriptor], [], [], WAIT_S)[0], "the child goes on"
            os.close(descriptor)
        empty(server)
    os.close(reader)
    os.close(writer)


def test_a_call_runs_in_an_executor_of_ones_own() -> None:
    options = ExecutorOptions("concurrent.futures:ThreadPoolExecutor", {"thread_name_prefix": "reqtable-call-mine"})
    with calling(lambda: threading.current_thread().name, executors={"mine": options}, call_on="mine") as (_, client):
        assert client.ask(b"mine\n").startswith(b"'reqtable-call-mine")
        assert client.ask(b"\n").startswith(b"'reqtable-call-mine"), "call_on is where a call runs that does not say"


def test_a_child_has_the_executors_of_the_configuration() -> None:
    options = ExecutorOptions("concurrent.futures:ThreadPoolExecutor", {"thread_name_prefix": "reqtable-call-mine"})
    with calling(os.getpid, executors={"mine": options}, dispatch="fork") as (server, client):
        assert int(client.ask(b"mine\n")) not in (0, os.getpid())
        client.hang_up()
        empty(server)


# -- per state --------------------------------------------------------------------------------------------------------


class Pinned(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        self.send(b"%d %d " % (os.getpid(), threading.get_ident()))
        return self.pooled

    @state(nothing(), dispatch="pool")
    def pooled(self, _: None) -> Transition:
        self.send(b"%d %d " % (os.getpid(), threading.get_ident()))
        return self.forked

    @state(nothing(), dispatch="fork")
    def forked(self, _: None) -> Transition:
        self.send(b"%d %d\n" % (os.getpid(), threading.get_ident()))
        return self.command


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
def test_a_state_says_where_it_runs(dispatch: str) -> None:
    with served(Pinned, dispatch) as server:
        with Client(server.server_address) as client:
            for _ in range(3):
                plain, pooled, forked = zip(*[iter(client.ask(b"?\n").split())] * 2, strict=True)
                assert int(plain[0]) == int(pooled[0]) == os.getpid() != int(forked[0])
                assert plain[1] != pooled[1] or dispatch == "pool"
        empty(server)


def test_a_state_that_is_pinned_to_the_loop_is_refused_by_policies_of_whole_requests() -> None:
    class OnTheLoop(reqtable.StateRequestHandler):
        @state(line(), dispatch="inline")
        def command(self, text: bytes) -> Transition:
            return None

    for dispatch in ("thread", "fork"):
        with pytest.raises(
            ConfigurationError, match=r"OnTheLoop\.command: @state\(dispatch='inline'\) runs on the loop"
        ):
            reqtable.TCPServer(ANY, OnTheLoop, dispatch=dispatch)
    reqtable.TCPServer(ANY, OnTheLoop, dispatch="pool").server_close()

    class Nowhere(reqtable.StateRequestHandler):
        @state(line(), dispatch="nowhere")
        def command(self, text: bytes) -> Transition:
            return None

    with pytest.raises(ConfigurationError, match=r"Nowhere\.command: .*there is no dispatch policy 'nowhere'"):
        reqtable.TCPServer(ANY, Nowhere)


# -- sending to others ------------------------------------------------------------------------------------------------


class Shout(reqtable.StateRequestHandler):
    """Every line goes to everyone."""

    everyone: reqtable.table.table.ClassVar[list[Any]] = []  # type: ignore[attr-defined,name-defined]

    def start(self) -> Transition:
        self.everyone.append(self)
        self.send(b"welcome\n")
        return self.command

    @state(line())
    def command(self, text: bytes) -> Transition:
        for each in list(self.everyone):
            each.send(text)
        return self.command

    def on_close(self) -> None:
        self.everyone.remove(self)


@pytest.mark.parametrize("dispatch", ["inline", "thread", "pool"])
def test_requests_send_to_each_other_from_whatever_thread(dispatch: str) -> None:
    with served(Shout, dispatch) as server:
        clients = [Client(server.server_address) for _ in range(5)]
        for client in clients:
            assert client.line() == b"welcome\n"
        for number, client in enumerate(clients):
            client.send(b"from %d\n" % number)
            for other in clients:
                assert other.line() == b"from %d\n" % number
        for client in clients:
            client.close()
        empty(server)
        wait_until(server, lambda: not Shout.everyone)


# -- the mix-ins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixin", ["Threading", "Forking", "Table"])
def test_twelve_classes_are_predefined(mixin: str) -> None:
    for kind in ("TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"):
        made = getattr(reqtable, mixin + kind)
        assert made.__mro__[1:3] == (getattr(reqtable, mixin + "MixIn"), reqtable.server.mixins._MixIn)  # type: ignore[attr-defined]
        assert issubclass(made, getattr(reqtable, kind))
        assert made.dispatch == {"Threading": "thread", "Forking": "fork", "Table": "greenlet"}[mixin]


@pytest.mark.parametrize("mixin", [reqtable.ThreadingMixIn, reqtable.ForkingMixIn, reqtable.TableMixIn])
def test_a_mix_in_goes_in_front_of_a_standard_server(mixin: Any) -> None:
    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"%d" % os.getpid())

        def log_message(self, *args: Any) -> None:
            pass

    class Server(mixin, http.server.HTTPServer):  # type: ignore[misc]
        pass

    with serving(Server(ANY, Hello)) as server:
        client = Client(server.server_address).send(b"GET / HTTP/1.0\r\n\r\n")
        body = client.rest().rpartition(b"\r\n")[2]
        assert (int(body) == os.getpid()) == (mixin is not reqtable.ForkingMixIn)
        client.hang_up()
        empty(server)


def test_the_hook_of_threads_is_called_where_it_is_overridden() -> None:
    seen: list[Any] = []

    class Hooked(reqtable.ThreadingTCPServer):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            seen.append(threading.current_thread())
            super().process_request_thread(request, client_address)

    with serving(Hooked(ANY, Where)) as server:
        with Client(server.server_address) as client:
            _, ident = where(client)
        empty(server)
    assert [thread.ident for thread in seen] == [ident]


# -- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("dispatch", ["fork", "thread"])
@pytest.mark.usefixtures("unchecked")
def test_ten_thousand_requests_leave_nothing(dispatch: str) -> None:
    count = 10_000
    command = [sys.executable, str(Path(__file__).with_name("thousands_server.py")), dispatch, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        measured = [json.loads(process.stdout.readline())]
        for number in range(count):
            with Client(address) as client:
                assert client.ask(b"%d\n" % number) == b"%d\n" % number
            if number + 1 in (count // 2, count):
                measured.append(json.loads(process.stdout.readline()))
        before, half, after = measured
        active = json.loads(process.stdout.readline())
        assert process.wait(WAIT_S) == 0
    print(f"{count} requests under {dispatch}: {before} before, {half} half-way, {after} at the end")
    assert active == []
    assert (after["descriptors"], after["threads"]) == (before["descriptors"], before["threads"])
    assert after["zombies"] == 0
    assert after["kib"] - half["kib"] < 1024, "memory is level"


# -- bad configuration ------------------------------------------------------------------------------------------------


def test_fork_without_fork_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ConfigurationError, match=r"this platform has no fork\(\)"):
        reqtable.TCPServer(ANY, Where, dispatch="fork")
    with pytest.raises(ConfigurationError, match=r"this platform has no fork\(\)"):
        reqtable.ForkingTCPServer(ANY, Where)


@pytest.mark.parametrize("made", [PoolOptions, ThreadOptions, ForkOptions])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_counts_are_whole_numbers_above_0(made: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a whole number above 0, not"):
        made(value)


def test_nothing_is_bound_when_a_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    monkeypatch.setattr(reqtable.TCPServer, "server_bind", lambda self: bound.append(self))
    monkeypatch.setattr(http.server.HTTPServer, "server_bind", lambda self: bound.append(self))

    class Mixed(reqtable.TableMixIn, http.server.HTTPServer):
        pass

    for made in (reqtable.TCPServer, reqtable.ThreadingTCPServer, Mixed):
        for dispatch in ("nowhere", "executor"):
            with pytest.raises(ConfigurationError) as raised:
                made(ANY, Where, dispatch=dispatch)
            assert "\n" not in str(raised.value)
    assert bound == []
    logging.getLogger("reqtable").debug("nothing was bound")


# -- forking at the end of a pass -------------------------------------------------------------------------------------


@contextlib.contextmanager
def queued(
    count: int, handler: Any = Where, made: Any = reqtable.ForkingTCPServer
) -> Iterator[tuple[Any, list[Client]]]:
    """A server that serves, and clients that had connected before its first pass."""
    server = made(ANY, handler)
    clients = [Client(server.server_address) for _ in range(count)]
    with serving(server):
        try:
            yield server, clients
        finally:
            for client in clients:
                client.hang_up()


class Noted(reqtable.ForkingTCPServer):
    """Notes which hooks are called, here in the parent."""

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
        assert server.active_children == {pid}
        wait_until(server, lambda: server.hooks.count("close") == 2)


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
        wait_until(server, lambda: len(server.table) == 1)
        assert [type(error) for error in server.errors] == [OSError]


# -- regressions ------------------------------------------------------------------------------------------------------


def test_a_forked_call_without_a_descriptor_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with calling(os.getpid) as (_, client):
        pipe = os.pipe

        def exhausted() -> tuple[int, int]:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "pipe", exhausted)
        assert client.ask(b"fork\n").startswith(b"OSError: ")
        monkeypatch.setattr(os, "pipe", pipe)
        assert int(client.ask(b"fork\n")) != os.getpid()


class CallsInChild(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        return self.answer, call(os.getpid, on=text.strip().decode())

    @state()
    def answer(self, pid: int) -> Transition:
        self.send(b"%d %d\n" % (os.getpid(), pid))
        return self.command


@pytest.mark.parametrize("on", [b"fork\n", b"thread\n", b"process\n"])
def test_a_child_can_call(on: bytes) -> None:
    """Its executors are its own: of the parent's it has neither the threads nor the loop."""
    with served(CallsInChild, "fork") as server:
        client = Client(server.server_address)
        child, called = map(int, client.ask(on).split())
        assert (child != os.getpid(), called == child) == (True, on == b"thread\n")
        watched = os.pidfd_open(called if on == b"process\n" else child)
        client.hang_up()
        empty(server)
        wait_until(server, lambda: not server.active_children)
        assert select.select([watched], [], [], WAIT_S)[0], "what it began ends with it"
        os.close(watched)


class HandsOffAndCalls(reqtable.StateRequestHandler):
    @state(line())
    def command(self, text: bytes) -> Transition:
        return self.answer, call(os.getpid)

    @state()
    def answer(self, pid: int) -> Transition:
        self.send(b"%d\n" % pid)
        return self.then

    @state(line())
    def then(self, text: bytes) -> Transition:
        return self.over, hand_off("fork")

    @state()
    def over(self, _: None) -> Transition:
        return self.answer, call(os.getpid)


def test_a_request_of_a_former_configuration_can_be_handed_off() -> None:
    with served(HandsOffAndCalls) as server:
        client = Client(server.server_address)
        assert client.ask(b"\n") == b"%d\n" % os.getpid()
        done = threading.Event()
        server.engine.post(lambda: (server.reconfigure(Config(dispatch="pool")), done.set()))
        assert done.wait(WAIT_S)
        assert int(client.ask(b"\n")) != os.getpid()
        client.hang_up()
        empty(server)


def test_a_former_configuration_goes_with_its_last_request() -> None:
    with served(StateWhere, "pool") as server:
        closed = []
        with Client(server.server_address) as client:
            where(client)
            former = server._dispatcher
            close = former.close
            former.close = lambda wait, calls=False: (closed.append(wait), close(wait, calls))  # type: ignore[method-assign]
            server.engine.post(server.reconfigure, Config())
            where(client)
            assert not closed
            assert server._dispatcher is not former
        empty(server)
        wait_until(server, lambda: bool(closed))
        idle = server._dispatcher
        server.engine.post(server.reconfigure, Config())
        wait_until(server, lambda: server._dispatcher is not idle)
        assert server._former == [], "one without requests goes at once"


def test_call_on_is_checked_when_the_server_is_made() -> None:
    with pytest.raises(ConfigurationError, match=r"^call_on: there is no executor 'nope'; there are \"thread\""):
        reqtable.TCPServer(ANY, Where, config=Config(call_on="nope"))


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_a_child_that_a_thread_has_handed_off_to_ends_with_the_request(how: str) -> None:
    limits = Limits(request_timeout_s=0.3 if how == "expire" else None)
    server = reqtable.TCPServer(ANY, AsyncHandsOff, dispatch="thread", config=Config(limits=limits))
    with serving(server):
        client = Client(server.server_address)
        client.send(b"fork\n").line()
        assert client.line() == b"over after 1\n"
        child, _ = where(client)
        assert child != os.getpid()
        if how == "cancel":
            server.table.cancel(server.table.snapshot()[0]["id"])
        with contextlib.suppress(ConnectionResetError):
            assert client.rest() == b""
        client.hang_up()
        empty(server)
        wait_until(server, lambda: not server.active_children and not server._dispatcher.forking.children)
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_collecting_children_by_hand_disturbs_nobody() -> None:
    """As programs for `socketserver` do, in every pass."""

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


class ForksTwice(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for _ in range(2):
            self.wfile.write(b"%d\n" % os.getpid())
            self.hand_off("fork")
        self.rfile.readline()
        self.wfile.write(b"%d\n" % os.getpid())


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_a_child_may_fork_again(dispatch: str) -> None:
    with served(ForksTwice, dispatch) as server:
        client = Client(server.server_address)
        first, second = int(client.line()), int(client.line())
        last = int(client.ask(b"go on\n"))
        assert len({first, second, last}) == 3
        assert client.rest() == b"", "and that is all"
        client.hang_up()
        empty(server)


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


def test_handle_request_ends_a_connection_that_is_driven() -> None:
    for dispatch in ("thread", "fork"):
        with reqtable.TCPServer(ANY, StateWhere, dispatch=dispatch) as server:
            client = Client(server.server_address).send(b"?\n").end()
            server.handle_request()
            assert len(client.rest().split()) == 2
            client.hang_up()


def test_what_is_sent_from_another_thread_stays_in_order() -> None:
    class Told(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Transition:
            def tell() -> None:
                for number in range(100):
                    self.send(b"%d\n" % number)

            teller = threading.Thread(target=tell)
            teller.start()
            teller.join()  # while its own step runs
            return self.command

    with served(Told) as server, Client(server.server_address) as client:
        client.send(b"\n")
        assert [client.line() for _ in range(100)] == [b"%d\n" % number for number in range(100)]


def test_a_subprocess_is_no_hand_off() -> None:
    class Spawns(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.server.spawned = subprocess.Popen(["sleep", "60"], preexec_fn=os.setsid)
            self.wfile.write(b"done\n")

    with served(Spawns) as server, Client(server.server_address) as client:
        assert client.rest() == b"done\n", "the connection ends though the program goes on"
        server.spawned.kill()
        server.spawned.wait(WAIT_S)


def test_ours_goes_in_front_of_the_standard_librarys() -> None:
    class Both(reqtable.ThreadingMixIn, socketserver.ThreadingTCPServer):
        pass

    with serving(Both(ANY, Where)) as server, Client(server.server_address) as client:
        assert where(client)[0] == os.getpid()


CATCH = """
try:
    server.serve_forever()
except KeyboardInterrupt:
    server.server_close()
"""


def test_ctrl_c_ends_a_forking_server_and_its_children() -> None:
    """As a terminal sends it: to the whole group of processes. The client says nothing."""
    script = SERVER.format(root=str(Path(__file__).parent.parent), handler="StateWhere")
    script = script.replace(
        "signal.signal(signal.SIGTERM", "signal.signal(signal.SIGINT, signal.default_int_handler) #"
    )
    script += "\nserver.server_close()\n"
    script = script.replace("server.serve_forever()", "try: server.serve_forever()\nexcept KeyboardInterrupt: pass")
    with subprocess.Popen(
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


def test_a_parent_that_fails_after_its_fork_leaves_the_child_at_work(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            if os.fork():
                raise ValueError("in the parent")
            self.wfile.write(b"%d\n" % os.getpid())
            self.rfile.readline()

    with served(Fails) as server:
        client = Client(server.server_address)
        child = int(client.line())
        wait_until(server, lambda: [row["policy"] for row in server.table.snapshot()] == ["fork"])
        assert "ValueError: in the parent" in caplog.text
        client.hang_up()
        empty(server)
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


# -- a group of disconnects -------------------------------------------------------------------------------------------


def disconnects(inner: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("two tasks", [ConnectionResetError("gone"), ExceptionGroup("of one", [inner])])


class GroupStream(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        raise disconnects(self.server.inner)  # type: ignore[attr-defined]


class GroupState(reqtable.StateRequestHandler):
    @state(nothing())
    def only(self, _: None) -> Transition:
        raise disconnects(self.server.inner)


class GroupAsync(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        raise disconnects(self.server.inner)


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", [GroupStream, GroupState, GroupAsync])
@pytest.mark.parametrize(("inner", "ending"), [(BrokenPipeError("gone"), "reset"), (ValueError("ours"), "error")])
def test_a_group_of_disconnects_is_a_disconnect(
    dispatch: str, handler: Any, inner: Exception, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reqtable")
    with served(handler, dispatch, inner=inner) as server:
        with Client(server.server_address) as client:
            assert client.rest() == b""
        empty(server)
        assert {name: count for name, count in server.stats()["finished"].items() if count} == {ending: 1}
    (record,) = [each for each in caplog.records if "two tasks" in caplog.handler.format(each)]
    assert ("\n" in caplog.handler.format(record)) == (ending == "error")


# -- Nagle's algorithm ------------------------------------------------------------------------------------------------


class Nagle(reqtable.StreamRequestHandler):
    """Answers whether a second small segment leaves at once (tcp(7), TCP_NODELAY)."""

    def handle(self) -> None:
        if self.connection.family == socket.AF_INET:
            self.wfile.write(b"%d\n" % self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        else:
            self.wfile.write(b"no TCP\n")


class NagleOfItsOwn(Nagle):
    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        super().setup()


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_no_second_segment_of_a_blocking_handler_waits_for_the_first(dispatch: str, tmp_path: Path) -> None:
    for handler, answer in ((Nagle, b"1\n"), (NagleOfItsOwn, b"0\n")):
        with served(handler, dispatch) as server, Client(server.server_address) as client:
            assert client.line() == answer
    path = str(tmp_path / "sock")
    with serving(reqtable.UnixStreamServer(path, Nagle, dispatch=dispatch)):
        with Client(path, socket.AF_UNIX) as client:
            assert client.line() == b"no TCP\n"
