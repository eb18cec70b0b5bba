"""The executor of calls and of policy `pool`."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, wait

import pytest

from reqtable.loop.threads import Threads
from tests.support import WAIT_S


@pytest.fixture
def made() -> Callable[..., Threads]:
    return lambda most=2: Threads(most, "reqtable-test", bool)


def test_it_begins_a_thread_only_where_none_is_idle(made: Callable[..., Threads]) -> None:
    with made() as threads:
        threads.submit(int).result(WAIT_S)
        while threads._free < 1:  # the result is there a moment before its thread is idle
            threads.submit(int).result(WAIT_S)
        begun = [each.ident for each in threads._threads]
        assert threads.submit(threading.get_ident).result(WAIT_S) in begun
        assert len(threads._threads) == len(begun)


def test_one_wake_is_enough_for_all_tasks_that_wait(made: Callable[..., Threads]) -> None:
    """The thread that is woken wakes the next, so a task that blocks holds up no other."""
    with made() as threads:
        begun = threading.Barrier(2)
        for each in [threads.submit(begun.wait, WAIT_S) for _ in range(2)]:
            each.result(WAIT_S)
        while threads._free < 2:
            threads.submit(int).result(WAIT_S)
        both, done = threading.Barrier(2), threading.Semaphore(0)

        def task() -> None:
            both.wait(WAIT_S)
            done.release()

        for _ in range(2):
            threads.run(task)
        assert both.n_waiting == 0, "not before the wake"
        threads.wake()
        assert all(done.acquire(timeout=WAIT_S) for _ in range(2))


def test_more_tasks_than_threads_wait_their_turn(made: Callable[..., Threads]) -> None:
    gate, running = threading.Event(), threading.Semaphore(0)

    def task(number: int) -> int:
        running.release()
        assert gate.wait(WAIT_S)
        return number

    with made() as threads:
        futures = [threads.submit(task, number) for number in range(10)]
        for _ in range(2):
            assert running.acquire(timeout=WAIT_S)
        assert not running.acquire(blocking=False)
        assert len(threads._threads) == 2
        gate.set()
        assert [each.result(WAIT_S) for each in futures] == list(range(10))


def test_what_a_task_raises_is_its_futures_and_nothing_holds_on_to_it(made: Callable[..., Threads]) -> None:
    class Thing:
        pass

    def fail(thing: Thing) -> None:
        raise SystemExit(3)

    with made(1) as threads:
        thing = Thing()
        future, seen = threads.submit(fail, thing), weakref.ref(thing)
        del thing
        assert isinstance(future.exception(WAIT_S), SystemExit)
        assert threads.submit(int).result(WAIT_S) == 0, "the thread goes on"
        gc.disable()
        try:
            del future
            assert seen() is None
        finally:
            gc.enable()


def test_shutdown_cancels_what_has_not_begun(made: Callable[..., Threads]) -> None:
    gate, begun = threading.Event(), threading.Event()
    threads = made(1)
    running = threads.submit(lambda: (begun.set(), gate.wait(WAIT_S)))
    waiting = threads.submit(int)
    assert begun.wait(WAIT_S)
    threads.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(RuntimeError, match="the threads reqtable-test are shut down"):
        threads.submit(int)
    gate.set()
    assert not wait([running], WAIT_S).not_done


def test_shutdown_without_cancelling_runs_what_waits(made: Callable[..., Threads]) -> None:
    threads = made(1)
    futures = [threads.submit(int) for _ in range(5)]
    threads.shutdown()
    assert [each.result(0) for each in futures] == [0] * 5


def test_a_task_that_shuts_down_does_not_wait_for_itself(made: Callable[..., Threads]) -> None:
    threads = made()
    assert threads.submit(threads.shutdown).result(WAIT_S) is None


def test_no_thread_left(made: Callable[..., Threads], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task is refused. A later task waits for an existing thread."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gate = threading.Event()
    with made() as threads:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                threads.submit(int)
        busy = threads.submit(gate.wait, WAIT_S)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            later = threads.submit(int)
        assert not later.done()
        gate.set()
        assert busy.result(WAIT_S)
        assert later.result(WAIT_S) == 0
