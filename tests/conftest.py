"""The order of the tests, a clock that only a test moves, and a check for leaks around every test."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from reqtable.testing import FakeClock
from tests.support import WAIT_S, child_processes, open_descriptors, reserved_port

SLOW_S = 900  # on a busy machine; a slow test takes up to two minutes
EXITING_S = 5.0  # how long a thread that has left the list may take to let go of its descriptors

# Every loop checks its invariants after every pass, except in tests that use `unchecked`.
os.environ.setdefault("REQTABLE_DEBUG", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background: programs that tests start, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests their time, and begin with the longest test, so that the other core is busy meanwhile."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


def pytest_collection_finish() -> None:
    """What is there before the first test stays: no collection looks at it again, and no forked child copies it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def resource_tracker_runs() -> None:
    """Start multiprocessing's resource tracker before all tests: it stays, so its pipe would look like a leak."""
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True, scope="session")
def no_proxy() -> Iterator[None]:
    """Have all clients reach the servers of the tests directly, also on a machine behind a proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        yield


@pytest.fixture(autouse=True, scope="session")
def runtime_folder() -> Iterator[None]:
    """Keep the control sockets of the servers that tests start apart from those of other servers of this user."""
    with tempfile.TemporaryDirectory(prefix="reqtable-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.delenv("REQTABLE_CONTROL", raising=False)
        yield


def join_workers() -> None:
    """Wait for the workers of closed servers: closing a server doesn't wait for executors and exiting threads."""
    for thread in threading.enumerate():
        if thread.name.startswith(("reqtable-", "QueueFeeder")) or "ExecutorManager" in type(thread).__name__:
            thread.join(WAIT_S)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Check that no descriptor, no thread and no child process is left after a test."""
    descriptors, threads, children = open_descriptors(), threading.active_count(), child_processes()
    yield
    join_workers()
    if open_descriptors() > descriptors:
        gc.collect()  # garbage is not a leak; but collecting after every test would take a minute
    until = time.monotonic() + EXITING_S
    while open_descriptors() > descriptors and time.monotonic() < until:
        os.sched_yield()  # a thread is no longer listed before it has let go of what it held
    assert threading.active_count() <= threads, threading.enumerate()
    left = child_processes() - children
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() or pid for pid in left]
    assert open_descriptors() <= descriptors, sorted(os.readlink(each.path) for each in os.scandir("/proc/self/fd"))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that refuses connections until a server binds it."""
    with reserved_port() as port:
        yield port


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off the check of the invariants, which would take minutes with very many requests."""
    monkeypatch.delenv("REQTABLE_DEBUG", raising=False)
