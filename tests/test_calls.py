"""Calls: a handler waits for a function that runs in a thread, a forked child or a process."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import reqtable
from reqtable import Config, Transition, call, line, state
from reqtable.config import ExecutorOptions
from tests.policies import ANY, empty
from tests.support import WAIT_S, Client, served, serving, wait_until


class Calls(reqtable.StateRequestHandler):
    """Calls the server's `wanted` at the place that the line names."""

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
    """A past bug: the child freed its copy of the executor, which takes that lock."""
    with calling(os.getpid) as (server, client):
        client.ask(b"process\n")
        with server._policies.executor("process")._executor._shutdown_lock:
            assert int(client.ask(b"fork\n")) != os.getpid()


def test_a_server_that_closes_before_a_forked_call_has_ended_leaves_nothing_open() -> None:
    """A past bug: the child was waited for after the selector was closed, which opened the selector again."""
    for _ in range(3):
        with calling(lambda: time.sleep(3600)) as (server, client):
            client.send(b"fork\n")
            wait_until(server, lambda: [row["letter"] for row in server.table.snapshot()] == ["F"])
            server.table.cancel(server.table.snapshot()[0]["id"])
            wait_until(server, lambda: not len(server.table))


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


def test_a_forked_call_without_a_descriptor_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with calling(os.getpid) as (_, client):
        pipe = os.pipe

        def exhausted() -> tuple[int, int]:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "pipe", exhausted)
        assert client.ask(b"fork\n").startswith(b"OSError: ")
        monkeypatch.setattr(os, "pipe", pipe)
        assert int(client.ask(b"fork\n")) != os.getpid()


def test_a_call_runs_in_an_executor_of_ones_own() -> None:
    options = ExecutorOptions("concurrent.futures:ThreadPoolExecutor", {"thread_name_prefix": "reqtable-call-mine"})
    with calling(lambda: threading.current_thread().name, executors={"mine": options}, call_on="mine") as (_, client):
        assert client.ask(b"mine\n").startswith(b"'reqtable-call-mine")
        assert client.ask(b"\n").startswith(b"'reqtable-call-mine"), "call_on is where a call runs that does not say"


def test_a_call_that_its_executor_cancels_is_an_error_and_not_a_wait_for_ever() -> None:
    mine = ExecutorOptions("tests.shipped:Cancelling")
    with calling(os.getpid, executors={"mine": mine}) as (_, client):
        answer = client.ask(b"mine\n")
        assert answer == b"HandlerError: call(getpid) was cancelled by its executor, 'mine'\n"
        assert int(client.ask(b"\n")) == os.getpid()


def test_a_child_has_the_executors_of_the_configuration() -> None:
    options = ExecutorOptions("concurrent.futures:ThreadPoolExecutor", {"thread_name_prefix": "reqtable-call-mine"})
    with calling(os.getpid, executors={"mine": options}, dispatch="fork") as (server, client):
        assert int(client.ask(b"mine\n")) not in (0, os.getpid())
        client.hang_up()
        empty(server)


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
    """A child needs executors of its own: it has neither the parent's threads nor the parent's loop."""
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
