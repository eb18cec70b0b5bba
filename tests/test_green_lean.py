"""The lean path of policy `greenlet`: a handler that reads, answers and reads again.

Such a line settles nothing. So these tests look at everything that a settled request would show all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import reqtable
from reqtable import Limits, State
from reqtable.testing import FakeClock
from tests.support import echoing

Lines = Callable[..., None]


class Echo(reqtable.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.answer(line)

    def answer(self, line: bytes) -> None:
        self.wfile.write(line)


def test_a_line_is_counted(clock: FakeClock) -> None:
    running = []

    class Handler(Echo):
        def answer(self, line: bytes) -> None:
            running.append(self.server.table.running)
            super().answer(line)

    with echoing(clock, Handler, dispatch="greenlet") as (entry, line):
        before = entry.steps
        for number in range(1, 4):
            clock.jump(1)
            line(b"hello\n")
            assert (entry.steps - before, entry.bytes_in, entry.bytes_out) == (number, 6 * number, 6 * number)
            assert (entry.active_at, entry.state, entry.deadline) == (clock(), State.READING, None)
            assert entry.table.running is None
        assert running == [entry] * 3


def test_a_timeout_that_is_set_between_two_lines_holds_until_it_is_dropped(clock: FakeClock) -> None:
    class Handler(Echo):
        def answer(self, line: bytes) -> None:
            self.connection.settimeout(float(line) or None)
            super().answer(line)

    with echoing(clock, Handler, dispatch="greenlet") as (entry, line):
        for seconds in (0, 30, 5, 0, 7):
            clock.jump(1)
            line(b"%d\n" % seconds)
            assert entry.deadline == (clock() + seconds if seconds else None)
        clock.jump(7)
        line(b"", b"")
        assert entry.state is State.CLOSED


def test_each_line_renews_the_deadline_of_an_idle_connection(clock: FakeClock) -> None:
    with echoing(clock, Echo, Limits(idle_timeout_s=10), "greenlet") as (entry, line):
        for _ in range(3):
            clock.jump(9)
            line(b"hello\n")
            assert entry.deadline == clock() + 10
        clock.jump(9)
        line(b"part", b"")
        assert entry.deadline == clock() + 10  # what the handler has read is a secret of its own


def test_the_last_line_ends_the_request(clock: FakeClock) -> None:
    class Handler(reqtable.StreamRequestHandler):
        def handle(self) -> None:
            while (line := self.rfile.readline()) != b"quit\n":
                self.wfile.write(line)

    with echoing(clock, Handler, dispatch="greenlet") as (entry, line):
        line(b"hello\n")
        line(b"quit\n", b"")
        assert (entry.state, entry.ending, len(entry.table)) == (State.CLOSED, None, 0)


def test_an_exception_that_ends_the_program_ends_the_loop(clock: FakeClock) -> None:
    class Handler(Echo):
        def answer(self, line: bytes) -> None:
            if line == b"stop\n":
                raise KeyboardInterrupt
            super().answer(line)

    with echoing(clock, Handler, dispatch="greenlet") as (entry, line):
        line(b"hello\n")
        before = entry.steps
        with pytest.raises(KeyboardInterrupt):
            line(b"stop\n", b"")
        assert (entry.state, entry.steps, entry.table.running) == (State.CLOSED, before + 1, None)


@pytest.mark.parametrize("by", ["the socket", "a duplicate in turn"])
def test_a_request_has_one_share_of_a_pass(clock: FakeClock, by: str) -> None:
    """A handler that moves its share without a wait waits for its turn, whichever sockets it uses."""

    class Handler(reqtable.BaseRequestHandler):
        def handle(self) -> None:
            with self.request.dup() as copy:
                other: Any = copy if by == "a duplicate in turn" else self.request
                while self.request.recv(10):
                    self.request.sendall(b"x" * 600)
                    other.sendall(b"x" * 600)

    with echoing(clock, Handler, Limits(recv_bytes=1000), "greenlet") as (entry, line):
        for _ in range(2):
            before = entry.steps
            line(b"?", b"x" * 1200)
            assert entry.steps == before + 2
