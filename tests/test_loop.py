"""The rules of the loop, one by one: fairness, deadlines, lingering, bounded accepting, nothing freed in mid-pass.

The engine runs on a fake clock, one pass at a time, on a simulated network: no test waits.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import reqtable
from reqtable import Limits, State, System, chunk, exactly, flushed, line, rest, sleep, state
from reqtable.loop.threads import Threads
from reqtable.run.signals import log_table
from reqtable.table.input import MISSING
from reqtable.table.states import READ, RESET, WRITE
from reqtable.table.table import SLICE_ROWS, Entry
from reqtable.testing import Client as Script
from reqtable.testing import FakeClock, Faults, SimNetwork, simulate
from tests.support import Client, served, serving, wait_until


class Echo(reqtable.StateRequestHandler):
    @state(line(limit=1024), timeout=30)
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


class World:
    """Runs an engine on a fake clock, with connections on a simulated network without faults.

    The test runs each pass, and every byte arrives the moment it is sent.
    """

    def __init__(self, clock: FakeClock, handler: Any = Echo, real_threads: bool = False, **limits: Any) -> None:
        self.clock = clock
        self.network = SimNetwork(faults=Faults.none(), clock=clock)
        if real_threads:
            self.network.system = replace(self.network.system, executor=Threads)
        with self.network.installed():
            self.server = reqtable.TCPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
            self.engine = reqtable.Engine(limits=Limits(**limits)).add(self.server)
        self.engine.loop.open()
        self.policy = self.server._policies.policy("inline")
        self.peers: list[socket.socket] = []

    def connect(self, handler: Any = None) -> tuple[socket.socket, Entry]:
        ours, theirs = self.network.pair()
        theirs.setblocking(False)
        self.peers.append(theirs)
        if handler is not None:
            self.server.RequestHandlerClass = handler
        self.engine.intake.admit(self.server, ours, ("peer", len(self.peers)))
        entry = self.engine.table.get(self.engine.table.last_id)
        assert entry is not None
        return theirs, entry

    def passes(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.loop.run_once(0)

    def jump(self, seconds: float) -> None:
        self.clock.jump(seconds)
        self.passes()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.server.server_close()


@pytest.fixture
def world(clock: FakeClock) -> Iterator[World]:
    made = World(clock)
    yield made
    made.close()


def small_buffers(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


# -- stepping --------------------------------------------------------------------------------------------------------


def test_a_request_that_is_served_in_one_pass_stays_in_its_state(world: World) -> None:
    peer, entry = world.connect()
    assert entry.state is State.READING
    peer.send(b"hello\n")
    world.passes()
    assert (peer.recv(100), entry.state, entry.steps) == (b"hello\n", State.READING, 2)


def test_sixteen_pipelined_lines_cost_one_send(world: World) -> None:
    peer, entry = world.connect()
    sends: list[bytes] = []

    class Counted:
        def __init__(self, own: socket.socket) -> None:
            self.own = own

        def send(self, data: bytes) -> int:
            sends.append(data)
            return self.own.send(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.own, name)

    entry.transport.request = Counted(entry.transport.request)
    peer.send(b"x\n" * 16)
    world.passes()
    assert sends == [b"x\n" * 16]


def test_a_listener_asks_no_more_than_once_for_each_client_that_comes_alone() -> None:
    asked: list[bool] = []

    class Counting(reqtable.TCPServer):
        def get_request(self) -> Any:
            asked.append(False)
            found = super().get_request()
            asked[-1] = True
            return found

    with Counting(("127.0.0.1", 0), Echo) as server, contextlib.ExitStack() as stack:
        server.engine.listeners.listen(server)

        def come(count: int, passes: int) -> list[bool]:
            """What each call of get_request found, while so many clients come, and so many passes are made."""
            asked.clear()
            for _ in range(count):
                stack.enter_context(socket.create_connection(server.server_address))
            for _ in range(passes):
                server.engine.loop.run_once(0)
            return list(asked)

        assert come(3, 1) == [True, True, True, False], "at first it takes all that it may"
        assert come(1, 1) == [True, False]
        for _ in range(5):
            assert come(1, 2) == [True]
        assert come(12, 4) == [True] * (1 + 1 + 2 + 4), "twice as many after two full passes in a row"
        assert come(0, 1)[:5] == [True, True, True, True, False]
        server.engine.listeners.unlisten(server)


def test_a_pipelining_client_does_not_starve_another(world: World) -> None:
    greedy, busy = world.connect()
    modest, _ = world.connect()
    share = world.engine.limits.steps_per_pass
    greedy.send(b"x\n" * (share * 3))
    modest.send(b"me too\n")
    world.passes()
    assert modest.recv(100) == b"me too\n"
    assert busy.state is State.READY
    assert len(greedy.recv(9999)) == 2 * 2 * share  # the share it read with, and the turn at the end of the pass
    world.passes(3)
    assert len(greedy.recv(9999)) == 2 * share
    assert busy.state is State.READING


def test_a_request_whose_share_ends_again_and_again_keeps_its_turn(world: World) -> None:
    """A past bug: a READY request that used up its share again was forgotten."""
    peer, entry = world.connect()
    share = world.engine.limits.steps_per_pass
    peer.send(b"x\n" * (share * 10))
    world.passes(12)
    assert len(peer.recv(99999)) == 2 * share * 10
    assert entry.state is State.READING


def test_a_step_never_runs_inside_another(world: World) -> None:
    depth = 0

    class Nosy(Echo):
        @state(line())
        def echo(self, text: bytes) -> Any:
            nonlocal depth
            depth += 1
            assert depth == 1
            assert self.entry.table.running is self.entry
            assert [row["state"] for row in self.entry.table.snapshot(state="RUNNING")] == ["RUNNING"]
            for other in self.entry.table:
                other.handler.send(text)
            depth -= 1
            return self.echo

    peers = [world.connect(Nosy)[0] for _ in range(3)]
    for peer in peers:
        peer.send(b"all\n")
    world.passes(3)
    assert [peer.recv(100) for peer in peers] == [b"all\n" * 3] * 3
    assert world.engine.table.running is None


def test_one_closed_by_an_earlier_event_of_the_batch_is_passed_over(world: World) -> None:
    class Killer(Echo):
        @state(line())
        def echo(self, text: bytes) -> Any:
            for other in self.entry.table:
                if other is not self.entry:
                    other.table.cancel(other.id)
            self.send(b"killed\n")
            return self.echo

    pairs = [world.connect(Killer) for _ in range(4)]
    for peer, _ in pairs:
        peer.send(b"kill the others\n")
    world.passes()
    alive = [entry for _, entry in pairs if entry.state is not State.CLOSED]
    assert len(alive) == 1 == len(world.engine.table)
    answers = []
    for peer, _ in pairs:
        try:
            answers.append(peer.recv(100))
        except ConnectionResetError:  # its own line was never read
            answers.append(b"")
    assert sorted(answers) == [b"", b"", b"", b"killed\n"]


def test_a_request_may_cancel_itself(world: World) -> None:
    closed = []

    class Suicidal(Echo):
        @state(line())
        def echo(self, text: bytes) -> Any:
            self.entry.table.cancel(self.entry.id)
            self.send(text)
            return self.echo

        def on_close(self) -> None:
            closed.append(self.entry.id)

    peer, entry = world.connect(Suicidal)
    peer.send(b"one\ntwo\n")
    world.passes()
    assert (entry.state, entry.steps, closed) == (State.CLOSED, 2, [entry.id])
    assert peer.recv(100) == b""
    assert len(world.engine.table) == 0


# -- deadlines -------------------------------------------------------------------------------------------------------


def test_a_deadline_closes_and_dribbling_does_not_move_it(world: World) -> None:
    peer, entry = world.connect()
    for _ in range(29):
        world.clock.jump(1)
        peer.send(b"x")
        world.passes()
    assert entry.state is State.READING
    world.jump(1.5)
    assert entry.state in (State.LINGERING, State.CLOSED)
    assert peer.recv(100) == b""


def test_a_step_moves_the_deadline_without_touching_the_heap(world: World) -> None:
    peer, entry = world.connect()
    heap = len(world.engine.steps.deadlines)
    for _ in range(100):
        world.clock.jump(0.1)
        peer.send(b"x\n")
        world.passes()
    assert entry.deadline == world.clock.now + 30
    assert len(world.engine.steps.deadlines) == heap


def test_sleepers_wake_in_order_and_are_polled_only_for_a_reset(world: World) -> None:
    woken = []

    class Sleeper(reqtable.StateRequestHandler):
        @state(line())
        def command(self, text: bytes) -> Any:
            return self.awake, sleep(float(text))

        @state()
        def awake(self, item: None) -> Any:
            woken.append((self.entry.id, world.clock.now))
            return self.command

    begun = world.clock.now
    for seconds in (3, 1, 2):
        peer, entry = world.connect(Sleeper)
        peer.send(b"%d\n" % seconds)
        world.passes()
        assert entry.state is State.SLEEPING
        assert entry.transport.watched == RESET
    for _ in range(3):
        world.jump(1)
    assert woken == [(2, begun + 1), (3, begun + 2), (1, begun + 3)]


def test_deadlines_of_one_moment_hold_up_nobody(clock: FakeClock) -> None:
    """A pass expires a limited number of deadlines, and the next pass does not wait in its poll."""
    world = World(clock, expiries_per_pass=10)
    late = [world.connect()[1] for _ in range(95)]
    clock.jump(1)
    peer, _ = world.connect()
    clock.jump(29)
    peer.send(b"me too\n")
    left = []
    for number in range(10):
        assert world.engine.next_at() <= clock.now
        world.passes()
        left.append(sum(entry.state is State.READING for entry in late))
        if not number:
            assert peer.recv(100) == b"me too\n"
    assert left == [85, 75, 65, 55, 45, 35, 25, 15, 5, 0]
    assert world.engine.next_at() > clock.now
    world.close()


def test_how_late_comes_what_is_due_is_counted(world: World) -> None:
    world.connect()
    world.engine.loop.mailbox.call_later(lambda: None, 10)
    world.passes(5)
    times = world.server.stats()["loop"]
    assert (times["lag_s_mean"], times["lag_s_max"], times["due"]) == (0, 0, 0)
    world.jump(13)  # the timer is late by 3 seconds
    world.jump(18)  # and the request's deadline by one
    times = world.server.stats()["loop"]
    assert (times["lag_s_mean"], times["lag_s_max"]) == pytest.approx((2, 3))
    assert (times["due"], times["lag_s"]) == (2, pytest.approx(4))


def test_sleeping_for_no_time_lets_the_others_go_on(world: World) -> None:
    """A past bug: the pass that expired a deadline of `now` expired it again, for ever."""

    class Restless(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            while True:
                await self.sleep(0)

    _, entry = world.connect(Restless)
    world.passes(10)
    assert 10 <= entry.steps <= 12
    peer, _ = world.connect(Echo)
    peer.send(b"me too\n")
    world.passes(2)
    assert peer.recv(100) == b"me too\n"


def test_a_timeout_shorter_than_a_sleep_comes_first(world: World) -> None:
    class Impatient(reqtable.StateRequestHandler):
        @state(sleep(10), timeout=2)
        def never(self, item: None) -> Any:
            raise AssertionError

        def on_timeout(self) -> Any:
            self.send(b"timed out\n")
            return self.after

        @state(sleep(1), timeout=5)
        def after(self, item: None) -> Any:
            self.send(b"slept\n")

    peer, _ = world.connect(Impatient)
    world.jump(2)
    assert peer.recv(100) == b"timed out\n"
    world.jump(1)
    assert peer.recv(100) == b"slept\n"


# -- output ----------------------------------------------------------------------------------------------------------


class Flood(reqtable.StateRequestHandler):
    """Answers each line, which is a number, with that many bytes."""

    @state(line(), timeout=30)
    def ask(self, text: bytes) -> Any:
        self.send(b"x" * int(text))
        return self.ask


def test_untaken_output_stops_reading_until_it_has_drained(world: World) -> None:
    peer, entry = world.connect(Flood)
    small_buffers(entry.transport.request)
    peer.send(b"1000000\n5\n")
    world.passes()
    assert (entry.state, entry.steps) == (State.WRITING, 2)  # the second line waits
    received = 0
    while received < 1_000_005:
        received += len(peer.recv(65536))
        world.passes()
    assert (entry.state, entry.output.size, entry.bytes_out) == (State.READING, 0, 1_000_005)


def test_a_peer_that_takes_nothing_is_closed_and_one_that_takes_something_is_not(world: World) -> None:
    peer, entry = world.connect(Flood)
    small_buffers(entry.transport.request)
    peer.send(b"1000000\n")
    world.passes()
    timeout = world.engine.limits.write_timeout_s
    for _ in range(3):
        world.clock.jump(timeout - 1)
        peer.recv(300_000)
        world.passes(2)
        assert entry.state is State.WRITING
    world.jump(timeout + 1)
    assert entry.state is State.CLOSED


def test_flushed_comes_once_the_kernel_has_it_all(world: World) -> None:
    class Careful(reqtable.StateRequestHandler):
        @state(line())
        def ask(self, text: bytes) -> Any:
            self.send(b"x" * int(text))
            return self.sent, flushed()

        @state()
        def sent(self, item: None) -> Any:
            assert self.entry.output.size == 0
            self.send(b"done\n")
            return self.ask

    peer, entry = world.connect(Careful)
    small_buffers(entry.transport.request)
    peer.send(b"3\n500000\n")
    world.passes(2)
    assert peer.recv(8) == b"xxxdone\n"
    data = b""
    while not data.endswith(b"done\n"):
        data += peer.recv(65536)
        world.passes()
    assert len(data) == 500_005


def test_one_that_does_not_read_is_closed_by_the_bound_on_its_output(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Tell(Echo):
        @state(line())
        def echo(self, text: bytes) -> Any:
            for other in self.entry.table:
                if other is not self.entry:
                    other.handler.send(b"x" * 50_000)
            self.send(text)
            return self.echo

    world = World(clock, Tell, output_bytes_max=100_000)
    deaf, victim = world.connect()
    small_buffers(victim.transport.request)
    talker, sender = world.connect()
    for _ in range(20):
        talker.send(b"x\n")
        world.passes(2)
    assert victim.state is State.CLOSED
    assert sender.state is State.READING
    assert len(talker.recv(100)) == 40
    assert "more than 100000 bytes of output" in caplog.text
    deaf.close()
    world.close()


def test_output_over_the_bound_in_ones_own_step_is_an_error_of_its_own(clock: FakeClock) -> None:
    seen = []

    class Greedy(Flood):
        def on_limit(self, error: reqtable.LimitExceeded) -> Any:
            seen.append(error.limit)
            self.send(b"too much\n")

    world = World(clock, Greedy, output_bytes_max=1000)
    peer, _ = world.connect()
    peer.send(b"1001\n")
    world.passes()
    assert (peer.recv(100), seen) == (b"too much\n", [1000])
    world.close()


def test_a_send_to_a_sleeping_request_reaches_its_peer_and_the_sleep_goes_on(world: World) -> None:
    class Sleeper(reqtable.StateRequestHandler):
        @state(sleep(10))
        def awake(self, item: None) -> Any:
            self.send(b"awake")

    peer, entry = world.connect(Sleeper)
    small_buffers(entry.transport.request)
    entry.handler.send(b"x" * 500_000)
    world.passes()
    assert entry.state is State.WRITING
    received = b""
    world.clock.jump(11)  # the sleep ends while the peer has not taken what it was sent
    while not received.endswith(b"awake"):
        received += peer.recv(65536)
        world.passes()
    assert len(received) == 500_005


def test_a_file_is_sent_by_the_kernel_and_bytes_around_it_keep_their_order(world: World, tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(700_000))

    class Files(reqtable.StateRequestHandler):
        @state(line())
        def ask(self, text: bytes) -> Any:
            self.file = path.open("rb")
            self.send(b"<")
            self.send_file(self.file)
            self.send(b"|")
            self.send_file(self.file, 10, 5)
            self.send(b">")
            return self.sent, flushed()

        @state()
        def sent(self, item: None) -> Any:
            self.file.close()

    peer, _ = world.connect(Files)
    peer.send(b"please\n")
    data = path.read_bytes()
    received = b""
    while len(received) < len(data) + 8:
        world.passes()
        received += peer.recv(99999)
    assert received == b"<" + data + b"|" + data[10:15] + b">"


# -- the end of a connection -----------------------------------------------------------------------------------------


def test_a_half_closed_peer_still_gets_its_answer(world: World) -> None:
    class Sum(reqtable.StateRequestHandler):
        @state(rest(limit=100))
        def all(self, data: bytes) -> Any:
            self.send(b"%d" % len(data))

    peer, entry = world.connect(Sum)
    peer.send(b"12345")
    peer.shutdown(socket.SHUT_WR)
    world.passes(2)
    assert (peer.recv(100), peer.recv(100), entry.state) == (b"5", b"", State.CLOSED)


def test_unread_input_does_not_cut_off_the_answer(world: World) -> None:
    class Refuse(reqtable.StateRequestHandler):
        @state(line())
        def ask(self, text: bytes) -> Any:
            self.send(b"no\n")

    peer, entry = world.connect(Refuse)
    peer.send(b"may I\n" + b"x" * 50_000)
    world.passes()
    assert entry.state is State.LINGERING
    peer.send(b"x" * 50_000)
    world.passes(3)
    assert (peer.recv(100), peer.recv(100)) == (b"no\n", b"")
    peer.close()
    world.passes()
    assert len(world.engine.table) == 0


def test_lingering_is_bounded(world: World) -> None:
    class Bye(reqtable.StateRequestHandler):
        @state()
        def bye(self, item: None) -> Any:
            self.send(b"bye\n")

    peer, entry = world.connect(Bye)
    assert entry.state is State.LINGERING
    for _ in range(10):
        peer.send(b"I will not go")
        world.jump(world.engine.limits.linger_timeout_s / 10)
    world.passes()
    assert (entry.state, len(world.engine.table)) == (State.CLOSED, 0)


@pytest.mark.parametrize("way", ["reset", "gone while writing", "half a line", "at once"])
def test_a_peer_that_goes_away_leaves_nothing(way: str) -> None:
    with served(Flood) as server:
        client = Client(server.server_address)
        if way == "reset":
            client.send(b"1\n").receive(1)
            client.reset()
        elif way == "gone while writing":
            client.send(b"30000000\n").receive(1)
            client.reset()
        elif way == "half a line":
            client.send(b"12")
        client.close()
        with Client(server.server_address) as other:
            assert other.send(b"3\n").receive(3) == b"xxx"
        wait_until(server, lambda: len(server.table) == 0)


# -- taking new requests ---------------------------------------------------------------------------------------------


def test_while_the_table_is_full_the_listener_is_not_polled() -> None:
    calls = []

    class Small(reqtable.TCPServer):
        def get_request(self) -> Any:
            calls.append(self.table.clock())
            return super().get_request()

    config = reqtable.Config(limits=Limits(entries_max=2))
    talkers = [Script().send(b"%d\n" % n).expect(b"%d\n" % n).pause(5).end().expect_end() for n in range(6)]
    report = simulate(lambda: Small(("127.0.0.1", 0), Echo, config=config), talkers, seed=1, faults=Faults.none())
    assert [sum(peer.received == b"%d\n" % n for peer in report.clients) for n in range(6)] == [1] * 6
    assert len(calls) < 20


def test_accepting_is_bounded_in_a_pass(clock: FakeClock) -> None:
    network = SimNetwork(faults=Faults.none(), clock=clock)
    with network.installed():
        config = reqtable.Config(limits=Limits(accepts_per_pass=3))
        deep = type("Deep", (reqtable.TCPServer,), {"request_queue_size": 64})
        with deep(("127.0.0.1", 0), Echo, config=config) as server:
            for _ in range(10):
                network.socket().connect(server.server_address)
            server.engine.loop.open()
            server.engine.listeners.listen(server)
            counts = []
            for _ in range(4):
                server.engine.loop.run_once(0)
                counts.append(len(server.table))
    assert counts == [3, 6, 9, 10]


def test_when_descriptors_run_out_it_neither_spins_nor_dies_and_goes_on_when_one_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Counting(reqtable.TCPServer):
        request_queue_size = 64
        refused = 0

        def get_request(self) -> Any:
            try:
                return super().get_request()
            except OSError as error:
                self.refused += error.errno == errno.EMFILE
                raise

    with serving(Counting(("127.0.0.1", 0), Echo)) as server:
        clients = [Client(server.server_address)]
        assert clients[0].ask(b"warm\n") == b"warm\n"
        waiting = socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    held.append(os.dup(0))
            waiting.connect(server.server_address)
            waiting.settimeout(20)
            waiting.send(b"served in the end\n")
            wait_until(server, lambda: server.refused >= 2)  # it looks again after its pause, not at once
            assert clients[0].ask(b"still here\n") == b"still here\n"
            assert server.refused <= 4
            clients[0].close()  # that frees one: service resumes at once
            assert waiting.recv(100) == b"served in the end\n"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for number in held:
                os.close(number)
            waiting.close()
    assert caplog.text.count("can't accept") == 1


# -- from elsewhere --------------------------------------------------------------------------------------------------


def test_cancel_from_another_thread_takes_effect_at_once() -> None:
    with served(Echo) as server:
        with Client(server.server_address) as client:
            assert client.ask(b"x\n") == b"x\n"
            [row] = server.table.snapshot()
            assert server.table.cancel(row["id"])
            assert client.rest() == b""
        assert not server.table.cancel(row["id"])


def test_posts_run_on_the_loop_in_order() -> None:
    with served(Echo) as server:
        ran: list[tuple[int, bool]] = []
        done = threading.Event()
        for number in range(1000):
            server.engine.post(lambda n=number: ran.append((n, server.engine.steps.in_loop_thread)))
        server.engine.post(done.set)
        assert done.wait(20)
    assert ran == [(number, True) for number in range(1000)]


def test_a_loop_that_runs_can_not_be_run_again() -> None:
    with served(Echo) as server, pytest.raises(reqtable.ReqtableError, match="running already"):
        server.engine.run(lambda: True)


def test_what_handle_error_raises_is_logged_and_the_loop_goes_on(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Fragile(reqtable.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            raise

    class Bad(Echo):
        @state(line())
        def echo(self, text: bytes) -> Any:
            if text == b"bad\n":
                raise ZeroDivisionError
            return super().echo(text)

    with Fragile(("127.0.0.1", 0), Bad) as server:
        server.engine.loop.open()
        server.engine.listeners.listen(server)
        clients = [Client(server.server_address) for _ in range(3)]
        server.engine.loop.run_once(0)
        for client, text in zip(clients, [b"good\n", b"bad\n", b"fine\n"], strict=True):
            client.send(text)
        for _ in range(3):
            server.engine.loop.run_once(0)
        assert server.table.running is None
        assert clients[0].line() == b"good\n"
        assert clients[1].rest() == b""
        assert clients[2].line() == b"fine\n"
        [record] = caplog.records
        assert record.levelname == "ERROR"
        assert "handle_error raised ZeroDivisionError" in record.getMessage()
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    "selector",
    [getattr(selectors, n) for n in ("SelectSelector", "PollSelector", "EpollSelector") if hasattr(selectors, n)],
)
def test_any_selector_will_do(selector: type[selectors.BaseSelector]) -> None:
    server = reqtable.TCPServer(("127.0.0.1", 0), Echo)
    reqtable.Engine(system=System(selector=selector)).add(server)
    with serving(server), Client(server.server_address) as client:
        assert client.ask(b"any\n") == b"any\n"


# -- mistakes of a handler -------------------------------------------------------------------------------------------


class Mistaken(reqtable.StateRequestHandler):
    """Makes the mistake that a line names."""

    @state(line())
    def command(self, text: bytes) -> Any:
        self.send(b"half of it")
        return {
            b"number": 5,
            b"method": self.helper,
            b"pair": (self.command, "line"),
            b"triple": (self.command, line(), 5),
            b"other's": Mistaken(self.entry).command,
            b"want": line(),
        }.get(text.strip()) or self.fail()

    def helper(self, item: bytes) -> Any:
        return self.command

    def fail(self) -> Any:
        raise KeyError("a mistake")


@pytest.mark.parametrize("mistake", [b"number", b"method", b"pair", b"triple", b"other's", b"want", b"error"])
def test_a_mistake_closes_its_own_request_only(mistake: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with served(Mistaken) as server, Client(server.server_address) as bystander:
        with Client(server.server_address) as client:
            assert client.send(mistake + b"\n").rest() == b"half of it"
        assert bystander.send(b"error\n").rest() == b"half of it"
    first = caplog.records[0]
    if mistake == b"error":
        assert first.exc_info is not None
        assert first.exc_info[0] is KeyError
    else:
        assert first.exc_info is None
        assert "Mistaken.command returned" in first.getMessage()


def test_input_over_a_limit_closes_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="reqtable")
    with served(Echo) as server, Client(server.server_address) as client:
        assert client.send(b"x" * 5000).rest() == b""
    [record] = [r for r in caplog.records if "exceeds its limit of 1024 bytes" in r.getMessage()]
    assert record.exc_info is None


def test_every_read_want_over_its_limit_reaches_on_limit(world: World) -> None:
    class Polite(reqtable.StateRequestHandler):
        wants = {b"e": exactly(10**12), b"r": rest(limit=10), b"l": line(limit=10)}

        @state(exactly(1))
        def which(self, letter: bytes) -> Any:
            return self.never, self.wants[letter]

        @state()
        def never(self, item: bytes) -> Any:
            raise AssertionError

        def on_limit(self, error: reqtable.LimitExceeded) -> Any:
            self.send(b"too much")

    for letter in (b"e", b"r", b"l"):
        peer, entry = world.connect(Polite)
        peer.send(letter + b"x" * 11)
        world.passes()
        assert peer.recv(100) == b"too much"
        assert entry.state is State.LINGERING


def test_the_trace_of_a_request_is_legal_and_ends_in_closed(world: World) -> None:
    trace: list[State] = []
    world.engine.table.on_transition = lambda entry, *_: trace.append(entry.state)

    class Busy(reqtable.StateRequestHandler):
        @state(chunk())
        def begin(self, data: bytes) -> Any:
            return self.slept, sleep(1)

        @state()
        def slept(self, item: None) -> Any:
            self.send(b"done")

    peer, _ = world.connect(Busy)
    peer.send(b"x")
    world.passes()
    world.jump(1)
    peer.close()
    world.passes()
    assert trace == [
        State.RUNNING,
        State.READING,
        State.RUNNING,
        State.SLEEPING,
        State.RUNNING,
        State.LINGERING,
        State.CLOSED,
    ]


# -- found by attack ---------------------------------------------------------------------------------------------------


def test_a_burst_that_stops_at_the_high_water_mark_goes_on(clock: FakeClock) -> None:
    """A past bug: the flush after the burst succeeded, but the next line, which had arrived, was never read."""
    world = World(clock, Flood, high_water_bytes=1000)
    peer, entry = world.connect()
    kernel = entry.transport.request.file
    send, refusals = kernel.send, [BlockingIOError()]

    def send_the_second_time(data: Any) -> int:
        if refusals:
            raise refusals.pop()
        return int(send(data))

    kernel.send = send_the_second_time
    peer.send(b"2000\n3\n4\n")
    world.passes(3)
    assert len(peer.recv(9999)) == 2007
    assert entry.state is State.READING
    world.close()


def test_a_result_may_come_while_its_request_waits_its_turn(world: World) -> None:
    class Last(reqtable.StateRequestHandler):
        @state(exactly(1))
        def count(self, item: bytes) -> Any:
            if self.entry.table.limits.steps_per_pass - 1 == len(self.entry.handler.seen):
                return self.called, reqtable.call(int, 5)
            self.seen.append(item)
            return self.count

        seen: list[bytes] = []

        @state()
        def called(self, number: int) -> Any:
            self.send(b"%d" % number)

    peer, entry = world.connect(Last)
    peer.send(b"x" * 200)
    peer.settimeout(20)
    world.engine.loop.poller.wake()
    while entry.state is not State.LINGERING:
        world.engine.loop.run_once(20)
    assert peer.recv(10) == b"5"


@pytest.mark.parametrize("way", ["timeout", "sleep", "closed file"])
def test_a_request_that_can_not_be_suspended_ends_alone(
    world: World, way: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)

    class Odd(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(line())
            if way == "timeout":
                await self.read(line(), timeout=10**400)
            if way == "sleep":
                await self.sleep(10**400)
            with (tmp_path / "file").open("rb") as file:
                self.send_file(file)
            await self.read(line())

    odd, entry = world.connect(Odd)
    peer, _ = world.connect(Echo)
    odd.send(b"go\n")
    peer.send(b"hello\n")
    world.passes(3)
    assert (entry.state, peer.recv(100)) == (State.CLOSED, b"hello\n")
    assert len(world.engine.table) == 1
    said = "that is being sent can't be read" if way == "closed file" else "peer:1, request 1: OverflowError: "
    assert said in caplog.text


def test_a_want_of_ones_own_needs_only_take(world: World) -> None:
    class Even(reqtable.Want[bytes]):
        def take(self, entry: Entry) -> Any:
            return entry.input.exactly(len(entry.input) // 2 * 2) or MISSING

    class Own(reqtable.StateRequestHandler):
        @state(Even(), timeout=5)
        def pairs(self, data: bytes) -> Any:
            self.send(data)
            return self.pairs

    peer, entry = world.connect(Own)
    peer.send(b"12345")
    world.passes()
    assert peer.recv(100) == b"1234"
    assert entry.table.snapshot()[0]["waits_for"] == "even()"
    world.jump(6)
    assert entry.state is State.LINGERING


def test_writing_always_has_a_deadline(world: World) -> None:
    """In one pass, another request sends to this request, and a part of its own input arrives."""
    peer, entry = world.connect()
    small_buffers(entry.transport.request)
    entry.timeout = entry.deadline = None
    entry.handler.send(b"x" * 500_000)
    peer.send(b"part")
    world.passes()
    assert (entry.state, entry.deadline) == (State.WRITING, world.clock.now + world.engine.limits.write_timeout_s)


def test_a_row_shows_the_address_that_its_client_came_to() -> None:
    with serving(reqtable.TCPServer(("0.0.0.0", 0), Echo)) as server:
        with Client(("127.0.0.1", server.server_address[1])) as client:
            assert client.ask(b"x\n") == b"x\n"
            assert server.table.snapshot()[0]["local"] == f"127.0.0.1:{server.server_address[1]}"


def test_a_long_table_is_logged_in_slices_and_nobody_waits_for_all_of_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    peers = [world.connect()[0] for _ in range(2 * SLICE_ROWS + 1)]
    log_table(world.engine)
    logged = []
    for peer in peers[:3]:
        logged.append([len(record.message.splitlines()) - 2 for record in caplog.records])  # without the headings
        peer.send(b"line\n")
        world.passes()
        assert peer.recv(10) == b"line\n"
    world.passes()
    assert logged == [[SLICE_ROWS], [SLICE_ROWS] * 2, [SLICE_ROWS, SLICE_ROWS, 1]]
    assert [record.message.partition("\n")[0] for record in caplog.records] == [
        f"{len(peers)} requests",
        "more requests",
        "more requests",
    ]


def test_nothing_follows_the_last_answer(world: World) -> None:
    class Bye(reqtable.StateRequestHandler):
        @state(line())
        def ask(self, text: bytes) -> Any:
            self.send(b"x" * 500_000)

    peer, entry = world.connect(Bye)
    small_buffers(entry.transport.request)
    handler = entry.handler
    peer.send(b"go\n")
    world.passes()
    handler.send(b"too late")
    received = b""
    while entry.state is State.WRITING:
        received += peer.recv(99999)
        world.passes()
    received += peer.recv(999999)
    assert received == b"x" * 500_000


def test_an_answer_is_never_held_back_for_an_acknowledgement() -> None:
    """A past bug: a pipelined burst that took two turns waited 40 ms for the peer's delayed acknowledgement."""
    with served(Echo) as server, Client(server.server_address) as client:
        assert client.ask(b"x\n") == b"x\n"
        [entry] = server.table
        assert entry.transport.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_call_that_ends_its_thread_does_not_end_the_server() -> None:
    class Exits(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.call(sys.exit)
            except reqtable.HandlerError as error:
                await self.send(str(error).encode())

    with served(Exits) as server:
        for _ in range(2):
            with Client(server.server_address) as client:
                assert client.rest().startswith(b"call(exit) raised SystemExit")


def test_on_close_may_end_the_server() -> None:
    class Last(Echo):
        def on_close(self) -> None:
            self.server.shutdown()

    server = reqtable.TCPServer(("127.0.0.1", 0), Last)
    with serving(server):
        with Client(server.server_address) as client:
            assert client.ask(b"x\n") == b"x\n"
        assert server._BaseServer__is_shut_down.wait(20)


def test_a_flooding_client_does_not_starve_the_others_under_greenlet(clock: FakeClock) -> None:
    taken = []

    class Sink(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1000):
                taken.append(len(data))
                feeder.send(b"x" * len(data))  # there is always more

    server = reqtable.TCPServer(("127.0.0.1", 0), Sink, dispatch="greenlet")
    reqtable.Engine(system=System(clock=clock)).add(server)
    with server, socket.create_connection(server.server_address) as feeder:
        feeder.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        feeder.send(b"x" * 5000)
        server.engine.loop.open()
        server.engine.listeners.listen(server)
        for _ in range(5):
            server.engine.loop.run_once(0)
        assert server.table.snapshot()[0]["state"] == "READY"
        assert 65_536 <= sum(taken) <= 5 * 2 * 65_536 + 10_000


@pytest.mark.parametrize(("before", "after"), [(READ, 0), (0, READ), (READ, WRITE)])
def test_an_exception_between_the_selector_and_its_note_of_it_is_made_good(
    world: World, before: int, after: int
) -> None:
    """Ctrl-C can strike anywhere, so the transport's note may differ from the selector's state."""
    _, entry = world.connect()
    transport: Any = entry.transport
    transport.watch(before)
    selector = world.engine.loop.poller.selector
    if before:
        selector.unregister(transport.fd)
    else:
        selector.register(transport.fd, WRITE, transport)
    transport.watch(after)
    watched = selector.get_map().get(transport.fd)
    assert (watched.events if watched else 0) == after == transport.watched
