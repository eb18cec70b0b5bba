"""What pytest does around the tests: their order, a clock that is set by hand, and a count of what leaks."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import pytest

from reqtable.testing import FakeClock
from tests.support import WAIT_S, open_descriptors

# Every loop checks its invariants after every pass; but see `unchecked`. pytest reads this before a test makes a loop.
os.environ.setdefault("REQTABLE_DEBUG", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first, so that the other core has something to do all the while."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


def pytest_collection_finish() -> None:
    """What is there before the first test stays: no collection looks at it again, and no forked child copies it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def resource_tracker_runs() -> None:
    """It belongs to the process and stays (multiprocessing): its pipe is no leak of the test that needs it first."""
    resource_tracker.ensure_running()


def join_workers() -> None:
    """Closing a server waits neither for what runs its calls, nor for the last steps of a thread that is done."""
    for thread in threading.enumerate():
        if thread.name.startswith(("reqtable-", "QueueFeeder")) or "ExecutorManager" in type(thread).__name__:
            thread.join(WAIT_S)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Descriptors and threads are as many after a test as before it."""
    descriptors, threads = open_descriptors(), threading.active_count()
    yield
    join_workers()
    if open_descriptors() > descriptors:
        gc.collect()  # what only the collector can find is not a leak; collecting after each test would take a minute
    assert threading.active_count() <= threads, threading.enumerate()
    assert open_descriptors() <= descriptors, sorted(os.readlink(each.path) for each in os.scandir("/proc/self/fd"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of so many requests that checking the invariants after every pass would take minutes."""
    monkeypatch.delenv("REQTABLE_DEBUG", raising=False)
