"""Handing off a request half-way to a thread or a child, by each kind of handler."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from typing import Any

import pytest

import reqtable
from reqtable import Config, Limits, Transition, call, hand_off, line, nothing, state, until
from reqtable.table.states import RESET
from tests.policies import ANY, AsyncHandsOff, empty, where
from tests.support import WAIT_S, Client, served, serving, wait_until


class StateHandsOff(reqtable.StateRequestHandler):
    """Answers lines on the loop until a line names a policy, then hands off the request to that policy."""

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
def test_what_was_handed_off_is_polled_only_for_a_reset_and_has_taken_its_output_along(to: str) -> None:
    """A past bug: the socket was polled for input. If it was half-closed, the loop spun while the child worked."""

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
            assert delegated.watched == RESET
            wait_until(server, lambda: entry.output.size == 0)  # the fork comes at the end of the pass
            client.send(b".").end()
            assert client.rest() == b"began\ndone\n"
        empty(server)
    assert len(passes) < 200


@pytest.mark.parametrize("handler", [StateHandsOff, AsyncHandsOff])
def test_what_can_not_be_handed_off_to_is_an_error_of_the_request(handler: Any) -> None:
    with served(handler) as server, Client(server.server_address) as client:
        client.send(b"inline\n")
        client.line()
        assert b"can't take on a request" in client.line()
        client.send(b"nowhere\n")
        client.line()
        assert b"there is no dispatch policy 'nowhere'" in client.line()
        assert where(client)[0] == os.getpid(), "it goes on"


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
        wait_until(server, lambda: not server.active_children and not server._policies.forking.children)
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


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


# -- handlers that fork -----------------------------------------------------------------------------------------------


class BlockingHandsOff(reqtable.StreamRequestHandler):
    """Answers the first line in the server, and the others in a child."""

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
    """The loop goes on at once, and the client's connection survives the parent's return."""
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
        assert "can be handed off only to 'fork'" in caplog.text


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


# -- forks that hand nothing off --------------------------------------------------------------------------------------


def test_a_fork_by_a_library_is_no_hand_off() -> None:
    """`multiprocessing` forks for its own purposes: the request stays in the server."""
    import multiprocessing

    class Uses(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            process = multiprocessing.get_context("fork").Process(target=int)
            process.start()
            process.join()
            self.wfile.write(b"%d %d\n" % (os.getpid(), process.exitcode or 0))

    with served(Uses) as server, Client(server.server_address) as client:
        assert client.rest() == b"%d 0\n" % os.getpid()


def test_a_subprocess_is_no_hand_off() -> None:
    class Spawns(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.server.spawned = subprocess.Popen(["sleep", "60"], preexec_fn=os.setsid)
            self.wfile.write(b"done\n")

    with served(Spawns) as server, Client(server.server_address) as client:
        assert client.rest() == b"done\n", "the connection ends though the program goes on"
        server.spawned.kill()
        server.spawned.wait(WAIT_S)
