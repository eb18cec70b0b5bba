"""Policy `thread`: a thread for each request, the limit on threads, and waiting for them at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextvars import ContextVar
from typing import Any

import pytest

import reqtable
from reqtable.config import ThreadOptions
from reqtable.dispatch.policies import thread as thread_policy
from reqtable.dispatch.policies.thread import RequestThread
from reqtable.loop.process import LOOPS
from tests.policies import ANY, AsyncWhere, HeldBlocking, StateWhere, Where, empty, held, where
from tests.support import WAIT_S, Client, Started, served, serving, wait_until


@pytest.mark.parametrize("handler", [Where, StateWhere, AsyncWhere])
def test_thread_gives_each_request_its_own(handler: Any) -> None:
    with served(handler, "thread") as server:
        with Client(server.server_address) as one, Client(server.server_address) as other:
            first, second = where(one), where(other)
            assert where(one) == first, "one thread drives it to its end"
            assert first[0] == second[0] == os.getpid()
            loop = next(ident for ident, each in LOOPS.items() if each is server.engine.loop)
            assert len({first[1], second[1], loop}) == 3
            wait_until(server, lambda: [row["letter"] for row in server.table.snapshot()] == ["D", "D"])
            assert {row["policy"] for row in server.table.snapshot()} == {"thread"}
        empty(server)
        assert len(server._policies.chosen.threads) == 0


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


# -- how many ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("handler", [Where, StateWhere])
def test_when_no_thread_can_be_started_at_all_the_request_fails_alone(
    handler: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start
    with served(handler, "thread") as server:

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


# -- threads that are used again --------------------------------------------------------------------------------------

REUSED = ThreadOptions(reuse=True)
TOLD: ContextVar[str] = ContextVar("TOLD", default="nothing")
local = threading.local()


class Remembering(reqtable.StreamRequestHandler):
    """Says what an earlier request has left in its thread, and leaves the line that it has read."""

    def handle(self) -> None:
        text = self.rfile.readline().decode().strip()
        self.wfile.write(f"{getattr(local, 'told', 'nothing')} {TOLD.get()}\n".encode())
        local.told = text
        TOLD.set(text)


def is_idle(server: Any) -> bool:
    return len(server._policies.chosen._idle) == 1


@pytest.mark.parametrize("handler", [Where, StateWhere, AsyncWhere])
def test_a_thread_serves_one_request_after_another(handler: Any) -> None:
    with held(handler, "thread", thread=REUSED) as server:
        served_by = []
        for _ in range(3):
            with Client(server.server_address) as client:
                served_by.append(where(client)[1])
                (row,) = server.table.snapshot()
                (thread,) = [each for each in threading.enumerate() if each.ident == served_by[-1]]
                assert thread.name == f"reqtable-{row['id']}"
                assert server._policies.chosen.busy == 1
            wait_until(server, lambda: is_idle(server) and not server.table)
        assert len(set(served_by)) == 1
    assert not thread.is_alive()


def test_requests_at_the_same_time_have_threads_of_their_own() -> None:
    with held(Where, "thread", thread=REUSED) as server:
        with Client(server.server_address) as one, Client(server.server_address) as other:
            assert where(one)[1] != where(other)[1]
        wait_until(server, lambda: len(server._policies.chosen._idle) == 2)


def test_a_reused_thread_keeps_its_locals_but_no_context() -> None:
    with held(Remembering, "thread", thread=REUSED) as server:
        answers = []
        for told in (b"first\n", b"second\n"):
            with Client(server.server_address) as client:
                answers.append(client.ask(told))
            wait_until(server, lambda: is_idle(server))
    assert answers == [b"nothing nothing\n", b"first nothing\n"]


def test_a_thread_waits_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_policy, "_IDLE_S", 0.001)
    with held(Where, "thread", thread=REUSED) as server:
        with Client(server.server_address) as client:
            ident = where(client)[1]
            (thread,) = [each for each in threading.enumerate() if each.ident == ident]
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert not server._policies.chosen._idle


def test_a_bounded_number_of_threads_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_policy, "_IDLE_MAX", 1)
    with held(Where, "thread", thread=REUSED) as server:
        clients = [Client(server.server_address) for _ in range(3)]
        idents = {where(client)[1] for client in clients}
        threads = [each for each in threading.enumerate() if each.ident in idents]
        for client in clients:
            client.close()
        empty(server)
        (idle,) = server._policies.chosen._idle
        for thread in threads:
            if thread is not idle:
                thread.join(WAIT_S)
        assert [thread for thread in threads if thread.is_alive()] == [idle]


def test_a_request_comes_just_when_a_thread_has_waited_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_policy, "_IDLE_S", 0.001)
    given_up, given = threading.Event(), threading.Event()
    forget, serve_next = thread_policy.Thread.forget, thread_policy._ReusedThread.serve_next

    def forget_late(self: Any, thread: Any) -> bool:
        if not given.is_set():
            given_up.set()
            assert given.wait(WAIT_S)
        return forget(self, thread)

    def tell(self: Any, handoff: Any) -> None:
        serve_next(self, handoff)
        given.set()

    monkeypatch.setattr(thread_policy.Thread, "forget", forget_late)
    monkeypatch.setattr(thread_policy._ReusedThread, "serve_next", tell)
    with held(Where, "thread", thread=REUSED) as server:
        with Client(server.server_address) as client:
            ident = where(client)[1]
        assert given_up.wait(WAIT_S)
        with Client(server.server_address) as client:
            assert where(client)[1] == ident


def test_a_request_that_ends_its_thread_ends_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", bool)  # pytest's own reports even a SystemExit

    class Exits(Where):
        def finish(self) -> None:
            super().finish()
            raise SystemExit

    with held(Exits, "thread", thread=REUSED) as server:
        for _ in range(2):
            with Client(server.server_address) as client:
                where(client)
            empty(server)
        assert not server._policies.chosen._idle


# -- who waits for them -----------------------------------------------------------------------------------------------


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
reused = reqtable.Config(thread=reqtable.ThreadOptions(reuse=True))
config = reused if dispatch == "reused" else None
class Server(reqtable.TCPServer):
    daemon_threads = daemon == "daemon"
server = Server(("127.0.0.1", 0), globals()[handler], dispatch=dispatch.replace("reused", "thread"), config=config)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_address[1], flush=True)
sys.stdin.readline()
threading.Thread(target=lambda: (sys.stdin.readline(), release.set()), daemon=True).start()
"""


@pytest.mark.parametrize("daemon", ["daemon", "waited for"])
@pytest.mark.parametrize(
    ("handler", "dispatch"), [("Line", "thread"), ("Line", "reused"), ("Line", "pool"), ("Calling", "inline")]
)
def test_the_interpreters_exit_waits_for_threads_that_are_no_daemons(handler: str, dispatch: str, daemon: str) -> None:
    command = [sys.executable, "-c", STAYING, handler, dispatch, daemon]
    with Started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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


NOT_BEGUN = """
import atexit, socket, sys, threading
atexit.register(lambda: print(f"exit; had begun: {had_begun}"))  # runs last
import reqtable
class Printing(reqtable.BaseRequestHandler):
    def handle(self):
        print("served")
server = reqtable.TCPServer(("127.0.0.1", 0), Printing, dispatch="thread")
ours, theirs = socket.socketpair()
sys.setswitchinterval(60)  # no thread takes the interpreter's lock
server.process_request(ours, "")
had_begun = [thread.ident is not None for thread in server._policies.chosen.threads]
"""


def test_the_interpreters_exit_waits_for_a_thread_that_has_not_begun() -> None:
    done = subprocess.run([sys.executable, "-c", NOT_BEGUN], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout == "served\nexit; had begun: [False]\n"


def test_server_close_waits_for_the_request_of_a_thread_that_is_used_again() -> None:
    with held(HeldBlocking, "thread", thread=REUSED) as server:
        client = Client(server.server_address).send(b"line\n")
        assert server.entered.acquire(timeout=WAIT_S)
        server.shutdown()
        closing = threading.Thread(target=server.server_close)
        closing.start()
        threads = list(server._policies.chosen.threads)
        server.gate.set()
        assert client.end().rest() == b"line\n"
        closing.join(WAIT_S)
        assert not closing.is_alive()
        assert [thread.is_alive() for thread in threads] == [False]
        client.close()
