"""A forked child does its own work and never runs the parent's loop. Signals to a child reach only the child."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import line, state
from reqtable.loop.process import Process
from tests.support import WAIT_S, Client, served, serving, wait_until

ANY = ("127.0.0.1", 0)
FORK = multiprocessing.get_context("fork")


def answer(connection: Any, server: int) -> None:
    """Read from the request's own socket and answer. A child runs this."""
    asked = connection.recv(100)
    connection.sendall(b"%s by a child: %s\n" % (asked.strip(), b"no" if os.getpid() == server else b"yes"))


class Starts(reqtable.StreamRequestHandler):
    """On the line `fork`, has a child of `multiprocessing` answer the next line. Answers any other line itself."""

    def handle(self) -> None:
        if self.rfile.readline() == b"fork\n":
            self.wfile.write(b"ready\n")
            child = FORK.Process(target=answer, args=(self.request, os.getpid()))
            child.start()
            child.join(WAIT_S)
            child.close()
        else:
            self.wfile.write(b"%d\n" % os.getpid())


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool", "fork"])
def test_a_child_of_a_library_runs_nothing_of_the_loop(dispatch: str) -> None:
    with served(Starts, dispatch) as server, Client(server.server_address) as first:
        assert first.ask(b"fork\n") == b"ready\n"
        with Client(server.server_address) as second:
            second.send(b"here\n")  # while the child waits for its input
            assert first.ask(b"hello\n") == b"hello by a child: yes\n"
            assert first.rest() == b""
            pid = int(second.line())
        assert (pid == os.getpid()) == (dispatch != "fork")


class ForksInAStep(reqtable.StateRequestHandler):
    """Forks in a step, and returns from the step in the parent and in the child."""

    @state(line())
    def command(self, text: bytes) -> Any:
        if text == b"fork\n":
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.close(reader)
                self.writer = writer  # its end says that the child has left
                return self.command
            os.close(writer)
            assert os.read(reader, 1) == b""
            os.close(reader)
            os.waitpid(child, 0)
        self.send(b"%d\n" % os.getpid())
        return self.command


class ForksInACoroutine(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        machine: Any = ForksInAStep
        while text := await self.read(line()):
            machine.command(self, text)

    command = None


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
@pytest.mark.parametrize("handler", [ForksInAStep, ForksInACoroutine])
def test_a_child_that_returns_from_a_step_ends_there(handler: Any, dispatch: str) -> None:
    """The child answers nobody: neither its own client for a second time, nor another client."""
    with (
        served(handler, dispatch) as server,
        Client(server.server_address) as other,
        Client(server.server_address) as own,
    ):
        other.send(b"wa")
        assert own.ask(b"fork\n") == b"%d\n" % os.getpid()
        assert own.ask(b"again\n") == b"%d\n" % os.getpid()
        assert other.ask(b"it\n") == b"%d\n" % os.getpid()
        assert own.end().rest() == b""


HOOKS = ["get_request", "verify_request", "process_request", "close_request", "handle_error", "on_close"]


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_child_that_returns_from_a_hook_ends_there(hook: str, dispatch: str) -> None:
    """Other requests are ready in the same pass. Only the server answers them, once."""
    children: list[int] = []

    def fork() -> None:
        if not children:
            reader, writer = os.pipe()
            child = os.fork()
            children.append(child)
            os.close(writer if child else reader)
            if child:
                assert os.read(reader, 1) == b""  # the child has left
                os.close(reader)
                os.waitpid(child, 0)

    class Pid(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            self.send(b"%d\n" % os.getpid())
            if text == b"fail\n":
                raise ZeroDivisionError
            return None

        def on_close(self) -> None:
            if hook == "on_close":
                fork()

    def forking(name: str) -> Any:
        def forked(self: Any, *args: Any) -> Any:
            result = getattr(reqtable.TCPServer, name)(self, *args)
            fork()
            return result

        return forked

    hooks = {hook: forking(hook)} if hook != "on_close" else {}
    with served(Pid, dispatch, **hooks) as server:
        clients = [Client(server.server_address) for _ in range(12)]
        for number, client in enumerate(clients):
            client.send(b"fail\n" if number == 3 else b"x\n")
        assert [client.line() for client in clients] == [b"%d\n" % os.getpid()] * len(clients)
        for client in clients:
            assert client.rest() == b""
            client.close()
        wait_until(server, lambda: not server.table)
    assert len(children) == 1


@pytest.mark.parametrize("dispatch", ["inline", "pool"])
def test_a_child_runs_no_step_of_another_request(dispatch: str, tmp_path: Path) -> None:
    """Callbacks that were posted before the fork belong to the parent."""
    steps = tmp_path / "steps"

    class Busy(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            if text == b"fork\n":
                return self.forked, reqtable.hand_off("fork")
            return self.called, reqtable.call(int, on="thread")

        @state()
        def called(self, _: int) -> Any:
            with steps.open("a") as file:
                file.write(f"{os.getpid()}\n")
            self.send(b"done\n")
            return self.command

        @state()
        def forked(self, _: None) -> Any:
            self.send(b"forked\n")
            return None

    with served(Busy, dispatch) as server:
        for _ in range(20):
            clients = [Client(server.server_address) for _ in range(6)]
            for number, client in enumerate(clients):
                client.send(b"fork\n" if number == 3 else b"x\n" * 3)
            for number, client in enumerate(clients):
                assert [client.line() for _ in range(1 if number == 3 else 3)][-1] in (b"done\n", b"forked\n")
                client.close()
    assert steps.read_text().split() == [str(os.getpid())] * (20 * 5 * 3)


def test_a_child_that_exits_in_service_actions_leaves_the_listening_socket_as_it_is() -> None:
    """The child shares O_NONBLOCK with the parent, so it must not change the flag."""
    statuses: list[int] = []

    class Server(reqtable.TCPServer):
        def service_actions(self) -> None:
            if not statuses:
                child = os.fork()
                if not child:
                    sys.exit(3)
                statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    with serving(Server(ANY, Starts)) as server:
        for _ in range(3):
            with Client(server.server_address) as client:
                assert client.ask(b"here\n") == b"%d\n" % os.getpid()
        assert not os.get_blocking(server.fileno())
    assert statuses == [3]


def test_a_listening_socket_that_others_may_have_stays_non_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes may be woken to accept one connection; on a blocking socket, one of them would wait for ever."""

    class Server(reqtable.TCPServer):
        timeout = 0.01
        waits = 0

        def handle_timeout(self) -> None:
            self.waits += 1

    with Server(ANY, Starts) as server:
        monkeypatch.setattr(Process, "has_forked", False)
        server.handle_request()
        assert os.get_blocking(server.fileno())
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        server.handle_request()
        assert not os.get_blocking(server.fileno())
        server.timeout = WAIT_S  # the socket's own timeout is still none
        with Client(server.server_address) as client:
            client.send(b"here\n")
            server.handle_request()
            assert client.rest() == b"%d\n" % os.getpid()
        assert server.waits == 2


def test_a_step_that_has_ended_its_own_request_may_fork(capfd: pytest.CaptureFixture[str]) -> None:
    class Ends(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            self.server.table.cancel(self.entry.id)
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
            return self.command

    with served(Ends) as server, Client(server.server_address) as client:
        assert client.send(b"x\n").rest() == b""
    assert capfd.readouterr().err == ""


class Exits(reqtable.StateRequestHandler):
    """Forks in a step or a call. The child exits with its own status."""

    @state(line())
    def command(self, text: bytes) -> Any:
        if text == b"call\n":
            return self.forked, reqtable.call(os.fork, on="thread")
        return self.forked(os.fork())

    @state()
    def forked(self, child: int) -> Any:
        if not child:
            sys.exit(3)
        self.send(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return self.command


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
def test_a_child_ends_with_its_own_status(dispatch: str, caplog: pytest.LogCaptureFixture) -> None:
    with served(Exits, dispatch) as server, Client(server.server_address) as client:
        assert client.ask(b"step\n") == b"3\n"
        assert client.ask(b"call\n") == b"0\n"  # it came back from the call, and ended there
    assert not caplog.records


def test_a_child_forked_beside_a_running_loop_has_no_part_in_it() -> None:
    """The child's calls on the server have no effect and don't wait. Signals to the child don't wake the parent."""

    def use(server: Any, pipe: Any) -> None:
        server.shutdown()
        server.engine.post(print)
        server.table.cancel(1)
        pipe.send((server.engine.steps.running, Process.forks))

    with served(Starts, "greenlet") as server, Client(server.server_address) as client:
        client.send(b"he")
        wait_until(server, lambda: len(server.table) == 1)
        ours, theirs = FORK.Pipe()
        child = FORK.Process(target=use, args=(server, theirs))
        child.start()
        assert ours.poll(WAIT_S)
        assert ours.recv() == (False, Process.forks + 1)
        child.join(WAIT_S)
        assert child.exitcode == 0
        child.close()
        ours.close()
        theirs.close()
        assert client.ask(b"re\n") == b"%d\n" % os.getpid()


@pytest.mark.parametrize("dispatch", ["inline", "greenlet", "thread", "pool"])
def test_a_server_that_has_served_is_forked_into_workers(dispatch: str) -> None:
    """Each worker has its own loop, and its end does not affect the others."""

    class Server(reqtable.TCPServer):
        def service_actions(self) -> None:
            if stop.poll():
                self._BaseServer__shutdown_request = True

    class Pid(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"%d\n" % os.getpid())

    def work() -> None:
        server.serve_forever(0.05)

    def ask() -> int:
        with Client(server.server_address) as client:
            return int(client.rest())

    stop, stop_one = FORK.Pipe(duplex=False)
    with Server(ANY, Pid, dispatch=dispatch) as server:
        with socket.create_connection(server.server_address) as client:
            server.handle_request()
            assert int(client.makefile().readline()) == os.getpid()
        workers = [FORK.Process(target=work) for _ in range(2)]
        for each in workers:
            each.start()
        pids = {each.pid for each in workers}
        assert {ask() for _ in range(20)} <= pids
        # One of them is stopped: it is in the midst of its loop, and takes nothing any more.
        os.kill(workers[0].pid or 0, signal.SIGKILL)
        workers[0].join(WAIT_S)
        assert {ask() for _ in range(5)} == {workers[1].pid}
        stop_one.send(None)
        workers[1].join(WAIT_S)
        assert workers[1].exitcode == 0
        for each in workers:
            each.close()
        thread = threading.Thread(target=server.serve_forever)
        stop.recv()
        thread.start()
        assert ask() == os.getpid()
        server.shutdown()
        thread.join()
    stop.close()
    stop_one.close()


INTERRUPTED = """
import os, signal
from reqtable.dispatch.forking.child import fork

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have begun us with SIGINT ignored
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    if not fork():
        os._exit(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
except KeyboardInterrupt:
    print("interrupted")
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_ctrl_c_in_the_midst_of_a_fork_is_not_lost() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (ran.stdout, ran.stderr) == ("interrupted\n0\n", "")


class WaitsItself(reqtable.StreamRequestHandler):
    """Forks, reaps its child itself, and goes on."""

    def handle(self) -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        self.wfile.write(b"%d\n" % child)
        self.rfile.readline()


@pytest.mark.parametrize("has_pidfds", [True, False])
@pytest.mark.parametrize("dispatch", ["greenlet", "thread", "pool"])
def test_a_number_that_is_no_child_any_more_gets_no_signal(
    dispatch: str, has_pidfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled = []

    def by_number(pid: int, number: int) -> None:
        signalled.append((pid, number))

    def none(*_: Any) -> int:
        raise OSError("an old kernel")

    monkeypatch.setattr(os, "kill", by_number)
    if not has_pidfds:
        monkeypatch.setattr(os, "pidfd_open", none)
    with served(WaitsItself, dispatch) as server, Client(server.server_address) as client:
        assert client.line().strip().isdigit()
        [row] = server.table.snapshot()
        assert server.table.cancel(row["id"])
        assert client.rest() == b""
    assert signalled == []


class ForksAndGoesOn(reqtable.StreamRequestHandler):
    """Leaves the request to the child of a plain `os.fork()`, which waits for a line that never arrives."""

    def handle(self) -> None:
        if not os.fork():
            self.wfile.write(b"%d\n" % os.getpid())
            self.rfile.readline()
        elif self.server.dispatch == "thread":
            return


@pytest.mark.parametrize("has_pidfds", [True, False])
@pytest.mark.parametrize("dispatch", ["greenlet", "thread"])
def test_a_child_that_has_the_request_is_ended_with_it(
    dispatch: str, has_pidfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> int:
        raise OSError("an old kernel")

    if not has_pidfds:
        monkeypatch.setattr(os, "pidfd_open", none)
    server = reqtable.TCPServer(ANY, ForksAndGoesOn, dispatch=dispatch)
    with serving(server), Client(server.server_address) as client:
        pid = int(client.line())
        os.kill(pid, 0)
        [row] = server.table.snapshot()
        assert server.table.cancel(row["id"])
        assert client.rest() == b""
        wait_until(server, lambda: not server.table)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
