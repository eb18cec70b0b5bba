"""`reqtable.testing`: testing handlers without sockets, threads or waiting."""

from __future__ import annotations

import io
from typing import Any

import pytest

import reqtable
from examples.notes import Notes
from examples.tftp import Tftp
from reqtable import Limits, Transition, call, chunk, datagram, exactly, hand_off, line, rest, sleep, state
from reqtable.testing import Client, Exercise, FakeClock, SimulationFailed, exercise, simulate


class Echo(reqtable.StateRequestHandler):
    closed = 0

    @state(line(limit=20), timeout=30)
    def command(self, text: bytes) -> Transition:
        if text == b"wait\n":
            return self.waited, sleep(5)
        if text == b"big\n":
            self.send(bytes(100_000))
            return self.command
        if text == b"boom\n":
            raise LookupError("as asked")
        if text == b"call\n":
            return self.called, call(len, b"four")
        if text == b"off\n":
            return self.over, hand_off("fork")
        if text == b"file\n":
            self.send_file(io.BytesIO(b"from a file\n"))
            return self.command
        self.send(text)
        return None if text == b"bye\n" else self.command

    @state()
    def waited(self, _: None) -> Transition:
        self.send(b"waited\n")
        return self.command

    @state()
    def called(self, size: int) -> Transition:
        self.send(b"%d\n" % size)
        return self.command

    @state()
    def over(self, _: None) -> Transition:
        self.send(b"over\n")
        return self.command

    def on_timeout(self) -> Transition:
        self.send(b"too slow\n")

    def on_eof(self, partial: bytes) -> Transition:
        self.send(b"end: " + partial)

    def on_limit(self, error: reqtable.LimitExceeded) -> Transition:
        self.send(b"too long\n")

    def on_close(self) -> None:
        self.closed += 1


class AsyncEcho(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while text := await self.read(line(), timeout=30):
            await self.send(text)


def test_a_dialogue_is_one_chain() -> None:
    exercise(Echo).send(b"one\n").expect(b"one\n").send(b"t").send(b"wo\nthree\n").expect(b"two\nthree\n")
    exercise(AsyncEcho).send(b"one\ntwo").expect(b"one\n").end().expect(b"two").expect_end()
    exercise(Notes).send(b"put 5\n").send(b"a b c").send(b"count\n").expect(b"3\n")


def test_what_is_not_expected_is_said() -> None:
    with pytest.raises(
        AssertionError, match=r"expected b'two\\n', found b'one\\n'; the request is READING and waits for"
    ):
        exercise(Echo).send(b"one\n").expect(b"two\n")
    with pytest.raises(AssertionError, match=r"expected the end, found b'one\\n'"):
        exercise(Echo).send(b"one\n").expect_end()
    with pytest.raises(AssertionError, match="expected the end, found b''; the request is READING"):
        exercise(Echo).expect_end()
    with pytest.raises(AssertionError, match="can't be sent: the handler has ended"):
        exercise(Echo).send(b"bye\n").send(b"more\n")
    with pytest.raises(AssertionError, match="can't be sent: the peer has ended"):
        exercise(Echo).end().send(b"more\n")
    with pytest.raises(TypeError, match="a blocking handler needs a socket"):
        exercise(reqtable.StreamRequestHandler)


def test_time_passes_when_it_is_told_to() -> None:
    tried = exercise(Echo).send(b"wait\n").jump(4.9).expect(b"")
    tried.jump(0.2).expect(b"waited\n")
    tried.jump(29.8).expect(b"").jump(0.2).expect(b"too slow\n").expect_end()
    assert tried.handler.closed == 1
    clock = FakeClock(5)
    clock.jump(1.5)
    assert clock() == 6.5
    with pytest.raises(ValueError, match="can't go back"):
        clock.jump(-1)


def test_the_ends_of_a_request() -> None:
    assert exercise(Echo).send(b"half").end().expect(b"end: half").expect_end().handler.closed == 1
    assert exercise(Echo).send(b"half").reset().expect(b"").expect_end().handler.closed == 1
    assert exercise(Echo).send(b"x" * 30).expect(b"too long\n").expect_end().is_over
    tried = exercise(Echo).send(b"bye\n").expect(b"bye\n")
    assert (tried.is_over, tried.handler.closed) == (True, 1)


def test_an_error_that_the_handler_does_not_take_is_raised() -> None:
    tried = exercise(Echo)
    with pytest.raises(LookupError, match="as asked"):
        tried.send(b"boom\n")
    tried.expect(b"").expect_end()


def test_calls_hand_offs_and_files_happen_at_once() -> None:
    exercise(Echo).send(b"call\noff\nfile\n").expect(b"4\nover\nfrom a file\n")

    class Fails(Echo):
        @state(line())
        def command(self, text: bytes) -> Transition:
            return self.called, call(int, text)

        def on_error(self, error: Exception) -> Transition:
            self.send(b"%b\n" % type(error).__name__.encode())
            return self.command

    exercise(Fails).send(b"x\n").expect(b"ValueError\n").send(b"5\n").expect(b"5\n")


def test_a_peer_that_does_not_read_holds_up_the_handler() -> None:
    tried = exercise(Echo).read_nothing().send(b"big\n").send(b"after\n").expect(b"")
    assert (tried.entry.state, tried.entry.steps) == (reqtable.State.WRITING, 2)
    tried.read_on().expect(bytes(100_000) + b"after\n")
    exercise(Echo).read_nothing().send(b"big\n").jump(61).read_on().expect(b"").expect_end()


def test_datagrams_are_taken_one_by_one() -> None:
    class Session(reqtable.StateRequestHandler):
        @state(datagram())
        def each(self, data: bytes) -> Transition:
            self.send(data)
            self.send(data.upper())
            return self.each

    tried = exercise(Session, datagrams=True).send(b"a").expect(b"a").expect(b"A").send(b"b").expect(b"b")
    with pytest.raises(AssertionError, match="expected b'c', found b'B'"):
        tried.expect(b"c")
    with pytest.raises(AssertionError, match="expected b'c', found None"):
        tried.expect(b"c")


def test_the_server_is_the_tests_own() -> None:
    class Asks(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            await self.send(b"%d %d %b" % (self.server.answer, len(self.server.table), self.client_address[0].encode()))
            await self.read(chunk())

    class Own:
        answer = 42

    exercise(Asks, server=Own()).expect(b"42 1 192.0.2.1")
    exercise(Asks, server=Own(), peer=("10.0.0.1", 1)).expect(b"42 1 10.0.0.1")


def test_limits_hold() -> None:
    class Reads(reqtable.AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(exactly(100))
            except reqtable.LimitExceeded:
                await self.send(b"no\n")
            await self.read(rest(10))

    exercise(Reads, limits=Limits(input_bytes_max=50)).expect(b"no\n")
    exercise(Reads, limits=Limits(request_timeout_s=9)).jump(8.9).expect(b"").jump(0.2).expect_end()


def test_a_request_that_goes_on_and_on_is_found() -> None:
    class Spins(reqtable.StateRequestHandler):
        is_over: bool = False

        @state()
        def again(self, _: None) -> Transition:
            return None if self.is_over else self.again

    with pytest.raises(AssertionError, match="goes on and on"):
        exercise(Spins)


def test_an_example_of_datagrams() -> None:
    tried: Exercise = exercise(Tftp, datagrams=True)
    tried.send(b"\0\1no-such-file\0octet\0")
    assert tried.output[:4] == b"\0\5\0\1", "the error of TFTP that says there is no such file"


class Answering(reqtable.StateRequestHandler):
    """Answers each line that is too long, and waits for the next line with the same want."""

    @state(line(limit=5), timeout=9)
    def command(self, text: bytes) -> Any:
        return self.command

    def on_limit(self, error: reqtable.LimitExceeded) -> Any:
        self.send(b"too long\n")
        return self.command


class AnsweringAwaiting(reqtable.AsyncRequestHandler):
    async def handle(self) -> None:
        while True:
            try:
                await self.read(line(limit=5))
            except reqtable.LimitExceeded:
                await self.send(b"too long\n")


@pytest.mark.parametrize("handler", [Answering, AnsweringAwaiting])
def test_an_answer_to_a_limit_that_would_never_end_is_refused(handler: Any) -> None:
    said = (
        r"waits for line\(limit=5\) again, but the same input still exceeds the limit: skip the line with skip_line\(\)"
    )
    with pytest.raises(reqtable.HandlerError, match=said):
        exercise(handler).send(b"x" * 9)
    client = Client().send(b"x" * 9).expect(b"too long\n")
    for dispatch in ("inline", "pool"):
        with pytest.raises(SimulationFailed, match=said):
            simulate(lambda policy=dispatch: reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=policy), [client])


def test_a_handler_that_waits_for_nothing_for_ever_ends_its_simulation() -> None:
    class Restless(reqtable.StateRequestHandler):
        is_over: bool = False

        @state()
        def step(self, _: None) -> Any:
            return None if self.is_over else self.step

    with pytest.raises(SimulationFailed, match=r"goes on and on: .* and it waits for nothing"):
        simulate(lambda: reqtable.TCPServer(("127.0.0.1", 0), Restless), [Client().pause(1)])
