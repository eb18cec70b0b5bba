"""Timers of the program: `engine.call_later` and `engine.every`. The clock is a fake, except where a thread waits."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from math import inf, nan
from typing import Any

import pytest

import reqtable
from reqtable import Engine, System
from reqtable.loop.mailbox import next_due
from reqtable.testing import Client, FakeClock, Faults, simulate
from tests.support import WAIT_S, serving

MAKERS: list[Callable[[Engine], Callable[..., reqtable.Timer]]] = [lambda e: e.call_later, lambda e: e.every]


class Echo(reqtable.StateRequestHandler):
    @reqtable.state(reqtable.line())
    def echo(self, text: bytes) -> Any:
        self.send(text)
        return self.echo


@pytest.fixture
def engine(clock: FakeClock) -> Iterator[Engine]:
    made = Engine(system=System(clock=clock, stalls=False))
    made.loop.open()
    yield made
    made.close()


def passes(engine: Engine, count: int = 1) -> None:
    for _ in range(count):
        engine.loop.run_once(0)


def jump(engine: Engine, clock: FakeClock, seconds: float) -> None:
    passes(engine)  # takes the timers that have been set
    clock.jump(seconds)
    passes(engine)


# -- when -------------------------------------------------------------------------------------------------------------


def test_call_later_calls_once_in_time_with_its_arguments(engine: Engine, clock: FakeClock) -> None:
    calls: list[Any] = []
    timer = engine.call_later(2, lambda *args: calls.append(args), 1, "two")
    jump(engine, clock, 1.9)
    assert (calls, timer.active) == ([], True)
    jump(engine, clock, 0.2)
    assert (calls, timer.active) == ([(1, "two")], False)
    jump(engine, clock, 10)
    assert len(calls) == 1


def test_timers_are_called_in_the_order_of_their_times(engine: Engine, clock: FakeClock) -> None:
    calls: list[str] = []
    for seconds, name in ((3, "third"), (1, "first"), (2, "second"), (2, "second too")):
        engine.call_later(seconds, calls.append, name)
    jump(engine, clock, 5)
    assert calls == ["first", "second", "second too", "third"]


def test_every_does_not_drift(engine: Engine, clock: FakeClock) -> None:
    """Each pass comes 0.3 s late, yet the tenth call is not 3 s late."""
    began = clock.now
    called_at: list[float] = []
    engine.every(1, lambda: called_at.append(clock.now - began))
    passes(engine)
    for due in range(1, 11):
        clock.now = began + due + 0.3
        passes(engine)
        assert engine.next_at() == began + due + 1
    assert called_at == pytest.approx([due + 0.3 for due in range(1, 11)])


def test_every_does_not_burst_after_a_pause(engine: Engine, clock: FakeClock) -> None:
    began = clock.now
    calls: list[float] = []
    engine.every(1, lambda: calls.append(clock.now - began))
    jump(engine, clock, 100.5)
    passes(engine, 5)
    assert calls == [100.5]
    assert engine.next_at() == began + 101, "in step with the times before the pause"
    jump(engine, clock, 0.5)
    assert calls == [100.5, 101]


def test_a_function_that_takes_longer_than_its_period_skips_calls(engine: Engine, clock: FakeClock) -> None:
    began = clock.now
    calls: list[float] = []

    def slow() -> None:
        calls.append(clock.now - began)
        clock.jump(2.5)

    engine.every(1, slow)
    jump(engine, clock, 1)
    passes(engine, 5)
    assert (calls, engine.next_at()) == ([1], began + 4)


@pytest.mark.parametrize(
    ("due_at", "every_s", "now", "expected"),
    [
        (10, 2, 10, 12),
        (10, 2, 11.9, 12),
        (10, 2, 12, 14),
        (10, 2, 99, 100),
        (10, 2, 9, 12),  # called early, which a clock does not allow
        (10, inf, 10, inf),
        (1e9, 1e-12, 1e9, 1e9),  # the sum is no later float
        (1.0, 5e-324, 5.0, 5.0),
    ],
)
def test_when_the_next_call_is_due(due_at: float, every_s: float, now: float, expected: float) -> None:
    assert next_due(due_at, every_s, now) == expected


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_due_at_once_again_and_again_does_not_hold_up_the_pass(
    engine: Engine, clock: FakeClock, maker: Any
) -> None:
    """The fake clock stands still, so each next call is due at once."""
    calls: list[int] = []

    def again() -> None:
        calls.append(1)
        if maker is MAKERS[0]:
            engine.call_later(1e-300, again)

    maker(engine)(1e-300, again)
    passes(engine, 10)
    assert 3 <= len(calls) <= 10


def test_a_pass_that_waits_is_woken_by_the_next_timer() -> None:
    """With the real clock: `serve_forever` has nothing else to do, and its poll would wait for ever."""
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Echo), poll_interval=3600) as server:
        ticks = threading.Semaphore(0)
        timer = server.engine.every(0.001, ticks.release)
        assert all(ticks.acquire(timeout=WAIT_S) for _ in range(3))
        timer.cancel()
        once = threading.Event()
        server.engine.call_later(0.001, once.set)
        assert once.wait(WAIT_S)


def test_a_timer_that_another_thread_sets_shortens_the_poll_at_once() -> None:
    """The poll already waits for a timer that is far away."""
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Echo), poll_interval=3600) as server:
        called: list[int] = []
        set_far = threading.Event()
        server.engine.call_later(3600, called.append, 1)
        server.engine.post(set_far.set)
        assert set_far.wait(WAIT_S)
        in_loop: list[int] = []
        done = threading.Event()

        def near() -> None:
            in_loop.append(threading.get_ident())
            done.set()

        server.engine.call_later(0.001, near)
        assert done.wait(WAIT_S)
        assert in_loop == [server.table.thread]
        assert called == []


def test_a_timer_that_is_set_before_the_loop_runs_counts_from_then(engine: Engine, clock: FakeClock) -> None:
    calls: list[int] = []
    engine.call_later(5, calls.append, 1)
    engine.every(2, calls.append, 2)
    clock.jump(4.5)
    assert engine.next_at() <= clock.now, "the loop must look at them"
    passes(engine, 2)
    assert calls == [2], "the call at 2 s is late, and stands for that at 4 s"
    clock.jump(0.5)
    passes(engine)
    assert calls == [2, 1]


def test_a_timer_that_is_set_in_a_pass_is_counted_in_its_lateness(engine: Engine, clock: FakeClock) -> None:
    engine.call_later(1, int)
    jump(engine, clock, 4)
    assert engine.loop.times.plain()["lag_s_max"] == 3


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_cancelled_timer_calls_nothing(engine: Engine, clock: FakeClock, maker: Any, is_taken: bool) -> None:
    calls: list[int] = []
    timer = maker(engine)(1, calls.append, 1)
    passes(engine, int(is_taken))
    timer.cancel()
    timer.cancel()
    jump(engine, clock, 5)
    assert (calls, timer.active) == ([], False)
    assert engine.loop.times.plain()["lag_s_max"] == 0


def test_a_function_may_cancel_its_own_timer(engine: Engine, clock: FakeClock) -> None:
    calls: list[int] = []

    def once() -> None:
        calls.append(1)
        timer.cancel()

    timer = engine.every(1, once)
    jump(engine, clock, 1)
    assert (len(calls), len(engine.loop.mailbox.timers)) == (1, 0)


def test_a_timer_that_is_over_keeps_nothing_alive(engine: Engine, clock: FakeClock) -> None:
    class Thing:
        def touch(self) -> None: ...

    things = [Thing(), Thing()]
    gone = [weakref.ref(each) for each in things]
    timers = [engine.call_later(1, things[0].touch), engine.every(1, things[1].touch)]
    jump(engine, clock, 1)
    timers[1].cancel()
    things.clear()
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_cancelled_timers_do_not_pile_up(engine: Engine) -> None:
    kept = [engine.call_later(3600, int) for _ in range(10)]
    for _ in range(1000):
        engine.call_later(3600, int).cancel()
        timer = engine.call_later(3600, int)
        passes(engine)
        timer.cancel()
    assert len(engine.loop.mailbox.timers) <= 70
    assert all(each.active for each in kept)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_function_is_logged_and_called_again(
    engine: Engine, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("a bug")

    engine.every(1, fail)
    for _ in range(3):
        jump(engine, clock, 1)
    assert len(calls) == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert all(each.startswith("outside of any request: ValueError: a bug, in fail (") for each in said)


def test_sys_exit_in_a_timer_ends_serve_forever_and_the_timer_stays() -> None:
    calls: list[int] = []

    def leave() -> None:
        calls.append(1)
        raise SystemExit(3)

    with reqtable.TCPServer(("127.0.0.1", 0), Echo) as server:
        server.engine.every(0.001, leave)
        for _ in range(2):
            with pytest.raises(SystemExit, match="3"):
                server.serve_forever()
    assert len(calls) == 2


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((0, int), "seconds must be above 0, not 0"),
        ((-1, int), "seconds must be above 0, not -1"),
        ((nan, int), "seconds must be above 0, not nan"),
        ((True, int), "seconds must be a number, not True"),
        (("1", int), "seconds must be a number, not '1'"),
        ((Decimal(1), int), "seconds must be a number, not Decimal('1')"),
        ((Fraction(1), int), "seconds must be a number, not Fraction(1, 1)"),
        ((int, 1), "seconds must be a number, not <class 'int'>"),
        ((1, None), "fn must be a function, not None"),
        ((1, "tick"), "fn must be a function, not 'tick'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(engine: Engine, maker: Any, args: Any, error: str) -> None:
    name = maker(engine).__name__
    with pytest.raises((TypeError, ValueError)) as caught:
        maker(engine)(*args)
    assert str(caught.value) == f"{name}(seconds, fn): {error}"
    assert engine.next_at() == inf


# -- the life of the engine -------------------------------------------------------------------------------------------


def test_a_timer_keeps_no_loop_going() -> None:
    engine = Engine()
    timer = engine.every(3600, int)
    engine.serve_forever()  # without servers, it returns at once, and the engine closes
    assert not timer.active


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_timer_is_cancelled_when_its_engine_closes(clock: FakeClock, is_taken: bool) -> None:
    engine = Engine(system=System(clock=clock, stalls=False))
    calls: list[int] = []
    server = reqtable.TCPServer(("127.0.0.1", 0), Echo, bind_and_activate=False)
    engine.add(server)
    timers = [engine.call_later(1, calls.append, 1), engine.every(1, calls.append, 2)]
    engine.loop.open()
    passes(engine, int(is_taken))
    server.server_close()
    assert not any(each.active for each in timers)
    engine.loop.open()
    jump(engine, clock, 5)
    assert calls == []
    engine.close()


def test_a_timer_waits_while_no_loop_runs(clock: FakeClock) -> None:
    """It is still there in the next `serve_forever`."""
    with reqtable.TCPServer(("127.0.0.1", 0), Echo) as server:
        calls: list[int] = []

        def tick() -> None:
            calls.append(1)
            server.shutdown()

        server.engine.every(0.001, tick)
        server.serve_forever()
        server.serve_forever()
    assert calls == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_a_simulation_has_the_timers_of_its_server_and_ends(seed: int) -> None:
    """The hooks are called too. The timer would go on for ever, but the clients are done."""
    told: list[tuple[str, float]] = []

    class Server(reqtable.TCPServer):
        def on_start(self) -> None:
            clock = self.engine.system.clock
            self.began = clock()
            self.engine.every(10, lambda: told.append(("tick", clock() - self.began)))

        def on_stop(self) -> None:
            told.append(("stop", 0))

    client = Client().send(b"one\n").expect(b"one\n").pause(35).send(b"two\n").expect(b"two\n").end()
    simulate(lambda: Server(("127.0.0.1", 0), Echo), [client, client], seed=seed, faults=Faults.none())
    names = [name for name, _ in told]
    assert names == ["tick"] * 3 + ["stop"]
    assert [at for _, at in told[:3]] == pytest.approx([10, 20, 30], abs=0.1)
    simulate(lambda: Server(("127.0.0.1", 0), Echo), [client, client], seed=seed)  # with faults


def in_child(work: Callable[[], object]) -> str:
    """Return what `work` returns in a forked child, as text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, str(work()).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.parametrize("is_taken", [False, True])
@pytest.mark.parametrize("has_run", [False, True])
def test_a_child_has_its_own_timers_and_the_parents_only_if_the_loop_has_not_run(
    clock: FakeClock, has_run: bool, is_taken: bool
) -> None:
    engine = Engine(system=System(clock=clock, stalls=False))
    server = reqtable.TCPServer(("127.0.0.1", 0), Echo, bind_and_activate=False)
    engine.add(server)
    if has_run:
        engine.run(lambda: True)
    calls: list[str] = []
    engine.call_later(1, calls.append, "parent's")
    if is_taken:
        engine.loop.mailbox.run_posts()

    def child() -> str:
        engine.call_later(1, calls.append, "child's")
        ran = iter([False, False, True])

        def stop() -> bool:
            clock.jump(1)
            return next(ran)

        engine.run(stop, 0)
        return " and ".join(calls)

    assert in_child(child) == ("child's" if has_run else "parent's and child's")
    engine.loop.open()
    jump(engine, clock, 1)
    assert calls == ["parent's"]
    server.server_close()


def test_a_child_that_a_timer_forks_leaves_the_loop_to_the_parent(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The child ends when it returns from the function. The parent's timer goes on."""
    caplog.set_level(logging.CRITICAL)
    with reqtable.TCPServer(("127.0.0.1", 0), Echo) as server:
        children: list[int] = []

        def fork() -> None:
            child = os.fork()
            if child:
                children.append(child)
                os.waitpid(child, 0)
                if len(children) == 2:
                    server.shutdown()

        server.engine.every(0.001, fork)
        server.serve_forever()
    assert len(children) == 2
