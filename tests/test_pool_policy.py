"""Policy `pool`: steps take turns in a few threads, a state can say where it runs, and requests send to others."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import ConfigurationError, Transition, line, nothing, state
from reqtable.config import PoolOptions, ThreadOptions
from reqtable.dispatch import registry
from reqtable.loop.process import LOOPS
from tests.policies import ANY, Held, HeldBlocking, StateWhere, empty, held, where
from tests.support import WAIT_S, Client, served, wait_until


def test_pool_steps_run_in_threads_and_the_loop_does_the_io() -> None:
    with served(StateWhere, "pool") as server, Client(server.server_address) as client:
        loop = next(ident for ident, each in LOOPS.items() if each is server.engine.loop)
        pid, thread = where(client)
        assert (pid == os.getpid(), thread != loop) == (True, True)
        wait_until(server, lambda: [row["state"] for row in server.table.snapshot()] == ["READING"])


def test_ten_slow_clients_share_two_threads() -> None:
    """Only a step whose input is complete takes a thread. Half a line takes none."""
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


class Overlap(reqtable.StateRequestHandler):
    """Notices if two steps of the same request overlap."""

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


def test_a_policy_from_outside_that_takes_whole_requests_gets_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(reqtable.dispatch.Inline):  # type: ignore[name-defined,misc]
        name = "whole"
        takes_whole_requests = True

    class OnTheLoop(reqtable.StateRequestHandler):
        @state(line(), dispatch="inline")
        def command(self, text: bytes) -> Transition:
            return None

    monkeypatch.setitem(registry._BUILT_IN, "whole", f"{__name__}:Whole")
    monkeypatch.setitem(globals(), "Whole", Whole)
    with pytest.raises(ConfigurationError, match="runs on the loop, but dispatch policy 'whole' runs whole requests"):
        reqtable.TCPServer(ANY, OnTheLoop, dispatch="whole")


# -- sending to others ------------------------------------------------------------------------------------------------


class Shout(reqtable.StateRequestHandler):
    """Sends every line to all clients."""

    everyone: ClassVar[list[Any]] = []

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
