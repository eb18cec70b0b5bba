"""A step that holds up the loop gives one warning, with its handler, its client and its current line.

The steps in these tests hold up the loop until the warning comes.
"""

from __future__ import annotations

import _thread
import inspect
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import reqtable
from reqtable import Limits
from reqtable.loop.platform import System
from reqtable.loop.selector import DefaultSelector
from reqtable.server.engine import Engine
from reqtable.server.stall_detector import StallDetector, _polls
from tests.support import WAIT_S, Client, serving

ANY = ("127.0.0.1", 0)
HERE = Path(__file__)


class Warned(logging.Handler):
    """Releases the steps that wait for a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.happened = threading.Event()
        self.lines: list[str] = []
        self.one_end, self.other_end = socket.socketpair()
        self.lock_held = threading.Lock()
        self.lock_held.acquire()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if not self.happened.is_set():
            self.lock_held.release()
            self.other_end.send(b"go on")
        self.happened.set()


@pytest.fixture
def warned() -> Iterator[Warned]:
    handler = Warned()
    logging.getLogger("reqtable").addHandler(handler)
    yield handler
    logging.getLogger("reqtable").removeHandler(handler)
    handler.one_end.close()
    handler.other_end.close()


def impatient(server: Any) -> Any:
    server.engine.steps.set_limits(Limits(loop_stall_s=0.02))
    return server


def line_of(marked: str) -> int:
    """Return the number of the line of this file that ends with that mark."""
    (number,) = (n for n, text in enumerate(HERE.read_text().splitlines(), 1) if text.endswith(f"# {marked}"))
    return number


def wait(warned: Warned) -> None:
    assert warned.happened.wait(WAIT_S)  # an event


def take_lock(warned: Warned) -> None:
    assert warned.lock_held.acquire(timeout=WAIT_S)  # a lock


def read_another_socket(warned: Warned) -> None:
    warned.one_end.settimeout(WAIT_S)
    assert warned.one_end.makefile("rb").read(5) == b"go on"  # a socket


WAYS = {"an event": wait, "a lock": take_lock, "a socket": read_another_socket}


def blocking(act: Callable[[], None]) -> Any:
    class Blocking(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            act()
            self.wfile.write(b"done\n")

    return Blocking


def states(act: Callable[[], None]) -> Any:
    class States(reqtable.StateRequestHandler):
        @reqtable.state(reqtable.line())
        def first(self, text: bytes) -> None:
            act()
            self.send(b"done\n")

    return States


def coroutine(act: Callable[[], None]) -> Any:
    class Coroutine(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(reqtable.line())
            act()
            await self.send(b"done\n")

    return Coroutine


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("style", "dispatch"),
    [(blocking, "inline"), (blocking, "greenlet"), (states, "inline"), (coroutine, "inline")],
    ids=["blocking-inline", "blocking-greenlet", "state", "async"],
)
def test_it_is_named_once_while_it_lasts(style: Any, dispatch: str, way: str, warned: Warned) -> None:
    handler = style(lambda: WAYS[way](warned))
    with serving(impatient(reqtable.TCPServer(ANY, handler, dispatch=dispatch))) as server:
        with Client(server.server_address) as client:
            peer = client.socket.getsockname()
            assert client.ask(b"go\n") == b"done\n"
    (text,) = warned.lines
    assert text.startswith(f"127.0.0.1:{peer[1]}: a step of {handler.__name__} has held up everyone for 0.")
    code = HERE.read_text().splitlines()[line_of(way) - 1].strip()
    mend = "run it by call(), or the server under policy 'thread' or 'pool'"
    assert text.endswith(f" s at {HERE}:{line_of(way)} in {WAYS[way].__name__}: {code} ({mend})")


def test_so_is_a_hook(warned: Warned) -> None:
    class Taking(reqtable.TCPServer):
        def get_request(self) -> tuple[Any, Any]:
            request = super().get_request()
            wait(warned)
            return request

    with serving(impatient(Taking(ANY, blocking(bool)))) as server, Client(server.server_address) as client:
        assert client.ask(b"go\n") == b"done\n"
    (text,) = warned.lines
    assert text.startswith("Taking, in a hook or taking a request, has held up everyone for 0.")
    assert f"{HERE}:{line_of('an event')} in wait" in text


@pytest.mark.parametrize(
    ("dispatch", "limits", "looked_on"),
    [
        ("inline", Limits(), True),
        ("greenlet", Limits(), True),
        ("inline", Limits(loop_stall_s=inf), False),
        ("thread", Limits(), False),
        ("pool", Limits(), False),
        ("fork", Limits(), False),
    ],
)
def test_who_looks_on_goes_with_the_loop(dispatch: str, limits: Limits, looked_on: bool) -> None:
    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    def one_ends() -> bool:
        """Return whether a thread of an earlier test is still ending. Threads of pytest-xdist stay."""
        frames = sys._current_frames().values()
        return tasks() > len(frames) or any(frame.f_code is StallDetector._look_on.__code__ for frame in frames)

    until = time.monotonic() + 1
    while one_ends() and time.monotonic() < until:
        pass
    before = tasks()
    counts = []

    class Server(reqtable.TCPServer):
        def service_actions(self) -> None:
            if not counts:
                counts.append((tasks() - before, len(threading.enumerate())))
            self._BaseServer__shutdown_request = True

    server = Server(ANY, blocking(bool), dispatch=dispatch)
    server.engine.steps.set_limits(limits)
    threads = len(threading.enumerate())
    with server:
        server.engine.post(bool)
        server.serve_forever()
        server.serve_forever(0)
    assert counts == [(1 if looked_on else 0, threads)]
    until = time.monotonic() + WAIT_S
    while tasks() != before:  # the kernel takes its time
        assert time.monotonic() < until


class Table(list[Any]):
    """Stands in for a table, with the attributes that a watch uses."""

    def __init__(self, loop: Stepping) -> None:
        super().__init__()
        self.clock = lambda: loop.now
        self.now = 0.0
        self.last_id = 0
        self.running: Any = None
        self.accepting: Any = None
        self.limits: Limits
        self.thread = _thread.get_ident()


class Stepping:
    """Stands in for a loop whose time and steps the test sets. The test also calls the watch's looks."""

    def __init__(self, stall_s: float = 1.0) -> None:
        self.now = 0.0
        self.table = Table(self)
        self.progress: tuple[int, ...] = ()
        self.poller = SimpleNamespace(selector=object())
        self.table.limits = Limits(loop_stall_s=stall_s)
        self.on_stall = bool
        self.watch = StallDetector(self, -1)  # type: ignore[arg-type]

    def begin(self, peer: int | None, pass_at: float | None = None) -> None:
        """Begin a step of the peer's request, in a new pass at `pass_at`, or else in the current pass."""
        if pass_at is not None:
            self.table.now = pass_at
        self.table.running = None if peer is None else SimpleNamespace(peer=("h", peer), handler=Stepping)

    def look(self, at: float, inside: str = "work") -> float:
        self.now = at
        inner: dict[str, Any] = {}
        exec(f"def {inside}(self, look): return look()", inner)
        return float(inner[inside](self.poller.selector, self.watch._look))


def test_it_looks_again_just_when_a_step_has_lasted_too_long(warned: Warned) -> None:
    loop = Stepping()
    loop.begin(1, pass_at=10.0)
    assert loop.look(10.2) == pytest.approx(0.5)
    assert loop.look(10.7) == pytest.approx(0.3)
    assert warned.lines == []
    assert loop.look(11.0) == pytest.approx(0.5)
    assert len(warned.lines) == 1
    assert warned.lines[0].startswith("h:1: a step of Stepping has held up everyone for 1.0 s at ")
    for at in (11.5, 12.0, 99.0):
        loop.look(at)
    assert len(warned.lines) == 1


def test_a_long_pass_of_many_short_steps_is_nobodys(warned: Warned) -> None:
    loop = Stepping()
    for number in range(100):
        loop.begin(number, pass_at=10.0)
        loop.look(10.0 + number / 4)
    assert warned.lines == []


def test_one_who_comes_late_in_a_pass_is_not_blamed_for_those_before(warned: Warned) -> None:
    loop = Stepping()
    loop.begin(1, pass_at=10.0)
    loop.look(10.1)
    loop.begin(2)
    assert loop.look(10.9) == pytest.approx(0.5)
    loop.look(11.4)
    assert warned.lines == []
    loop.look(11.9)
    assert "h:2: " in warned.lines[0]


def test_the_same_client_in_the_next_pass_begins_anew(warned: Warned) -> None:
    loop = Stepping()
    for number in range(10):
        loop.begin(1, pass_at=10.0 + number)
        loop.look(10.4 + number)
        loop.look(10.9 + number)
    assert warned.lines == []


def test_waiting_for_something_to_do_is_no_stall(warned: Warned) -> None:
    loop = Stepping()
    loop.begin(None, pass_at=10.0)
    for at in (10.4, 11.0, 500.0):
        loop.look(at, inside="select")
    assert warned.lines == []
    loop.look(501.0, inside="service_actions")
    assert warned.lines[0].startswith("Engine, in a hook or taking a request, has held up everyone for ")


@pytest.mark.parametrize("selector", [DefaultSelector, selectors.SelectSelector])
def test_it_knows_a_loop_that_waits_for_something_to_do(selector: Any) -> None:
    engine = Engine(system=System(selector=selector))
    with reqtable.TCPServer(ANY, states(bool)) as server:
        engine.add(server)
        with serving(server, poll_interval=WAIT_S):
            until = time.monotonic() + WAIT_S / 2
            assert engine.table.thread is not None
            while not _polls(sys._current_frames()[engine.table.thread], engine.loop):
                assert time.monotonic() < until, "it never came to wait"
                time.sleep(0.001)


def test_a_pass_of_many_that_are_freed_is_nobodys(warned: Warned) -> None:
    """The watch sees no step in such a pass, but the pass makes progress."""
    loop = Stepping()
    loop.begin(None, pass_at=10.0)
    for number in range(100):
        loop.progress = (number,)
        loop.look(10.0 + number / 4, inside="close")
    assert warned.lines == []


def test_a_pass_goes_on_with_each_who_is_ready() -> None:
    seen = []

    class Looking(reqtable.StateRequestHandler):
        @reqtable.state(reqtable.line())
        def first(self, text: bytes) -> None:
            seen.append(self.server.engine.loop.progress)

    pairs = [socket.socketpair() for _ in range(3)]
    with reqtable.TCPServer(ANY, Looking) as server:
        server.engine.loop.open()
        for ours, theirs in pairs:
            server.process_request(ours, ("h", 1))
            theirs.send(b"now\n")
        server.engine.loop.run_once(0)
        assert len(set(seen)) == 3
    for _, theirs in pairs:
        theirs.close()


def test_the_line_is_the_programs_own() -> None:
    """The warning names the program's line, not that of a library that it calls, unless only libraries are running."""
    from reqtable.server.stall_detector import _place

    frame = inspect.currentframe()
    assert frame is not None
    assert _place(frame).startswith(f"{HERE}:{frame.f_lineno} in test_the_line_is_the_programs_own: ")
    frames: list[Any] = []
    logger = logging.Logger("own")
    logger.addFilter(lambda _: bool(frames.append(inspect.currentframe().f_back)))  # type: ignore[union-attr]
    logger.warning("through the library")
    assert frames[0].f_code.co_filename != __file__
    assert _place(frames[0]).startswith(f"{HERE}:")
