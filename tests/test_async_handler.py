"""`AsyncRequestHandler`: a coroutine that awaits wants."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import linecache
import logging
import re
import warnings
from typing import Any, ClassVar

import pytest

import reqtable
from reqtable import AsyncRequestHandler, chunk, exactly, line, rest, until
from reqtable.testing import Exercise, FakeClock, exercise
from tests.support import Client, served
from tests.test_handler_classes import line_of
from tests.test_loop import World, small_buffers


class Reads(AsyncRequestHandler):
    """Reads by the want that the first letter names, and answers with the result."""

    wants = {
        b"l": line(limit=10),
        b"u": until(b"--", limit=10),
        b"e": exactly(5),
        b"c": chunk(limit=4),
        b"r": rest(limit=10),
    }

    async def handle(self) -> None:
        want = self.wants[await self.read(exactly(1))]
        try:
            item = await self.read(want, timeout=5)
        except reqtable.IncompleteRead as error:
            await self.send(b"incomplete %r" % error.partial)
        except reqtable.LimitExceeded as error:
            await self.send(b"limit %d" % error.limit)
        except TimeoutError:
            await self.send(b"timeout")
        else:
            await self.send(b"item %r" % item)


@pytest.mark.parametrize("split", ["whole", "byte by byte"])
@pytest.mark.parametrize(
    ("given", "ends", "answer"),
    [
        (b"lone\nmore", False, b"item b'one\\n'"),
        (b"lpart", True, b"item b'part'"),
        (b"l", True, b"item b''"),
        (b"l0123456789", False, b"limit 10"),
        (b"uab--c", False, b"item b'ab--'"),
        (b"uab-", True, b"incomplete b'ab-'"),
        (b"e12345", False, b"item b'12345'"),
        (b"e1234", True, b"incomplete b'1234'"),
        (b"c", True, b"item b''"),
        (b"r12345", True, b"item b'12345'"),
        (b"r", True, b"item b''"),
        (b"r12345678901", False, b"limit 10"),
    ],
)
def test_every_want(clock: FakeClock, given: bytes, ends: bool, answer: bytes, split: str) -> None:
    world = World(clock, Reads)
    peer, _ = world.connect()
    pieces = [given] if split == "whole" else [given[i : i + 1] for i in range(len(given))]
    for piece in pieces:
        peer.send(piece)
        world.passes()
    if ends:
        peer.shutdown(1)
    world.passes(2)
    assert peer.recv(100) == answer
    world.close()


def test_a_chunk_is_whatever_has_come(clock: FakeClock) -> None:
    world = World(clock, Reads)
    peer, _ = world.connect()
    peer.send(b"c123456")
    world.passes()
    assert peer.recv(100) == b"item b'1234'"
    world.close()


def test_a_timeout_is_raised_where_it_reads(clock: FakeClock) -> None:
    world = World(clock, Reads)
    peer, _ = world.connect()
    peer.send(b"lno end of line"[:9])
    world.passes()
    world.jump(5)
    assert peer.recv(100) == b"timeout"
    world.close()


def test_sending_suspends_above_the_high_water_mark(clock: FakeClock) -> None:
    held: list[int] = []

    class Produce(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(line())
            for _ in range(1000):
                await self.send(b"x" * 10_000)
                held.append(self.entry.output.held)

    world = World(clock, Produce)
    peer, entry = world.connect()
    small_buffers(entry.transport.request)
    peer.send(b"go\n")
    world.passes(5)
    assert entry.state is reqtable.State.WRITING
    assert len(held) < 100
    received = 0
    while entry.state is not reqtable.State.LINGERING:
        with contextlib.suppress(BlockingIOError):
            received += len(peer.recv(99999))
        world.passes()
    with contextlib.suppress(BlockingIOError):
        while more := len(peer.recv(99999)):
            received += more
    assert received == 10_000_000
    assert max(held) <= world.engine.limits.high_water_bytes + 10_000
    world.close()


def test_sleep_and_call() -> None:
    class Both(AsyncRequestHandler):
        async def handle(self) -> None:
            while text := await self.read(line()):
                await self.sleep(0)
                try:
                    await self.send(b"%d\n" % await self.call(int, text, base=16))
                except ValueError:
                    await self.send(b"not a number\n")

    with served(Both) as server, Client(server.server_address) as client:
        assert client.ask(b"ff\n") == b"255\n"
        assert client.ask(b"zz\n") == b"not a number\n"


def test_coroutines_of_ones_own_may_await_wants() -> None:
    class Nested(AsyncRequestHandler):
        async def number(self) -> int:
            return int(await self.read(line()))

        async def handle(self) -> None:
            await self.send(b"%d\n" % (await self.number() + await self.number()))

    with served(Nested) as server, Client(server.server_address) as client:
        assert client.send(b"1\n2\n").rest() == b"3\n"


def test_awaiting_anything_else_says_what_to_await(caplog: pytest.LogCaptureFixture) -> None:
    class Foreign(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.send(b"before")
            await asyncio.sleep(0)

    with served(Foreign) as server, Client(server.server_address) as client:
        assert client.rest() == b"before"
    assert "there is no asyncio inside" in caplog.text
    gc.collect()


@pytest.mark.parametrize("misses_its_loop", [lambda: asyncio.sleep(1), lambda: asyncio.Event().wait()])
def test_asyncio_is_told_why_it_has_no_loop_here(misses_its_loop: Any) -> None:
    class Foreign(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(line())
            finally:
                await misses_its_loop()

    for end in (Exercise.end, lambda each: each.send(b"x" * 100_000)):
        with pytest.raises((RuntimeError, AttributeError), match=r"event loop|create_future") as caught:
            end(exercise(Foreign))
        [note] = caught.value.__notes__
        assert "there is no asyncio inside" in note
        assert "self.sleep(…)" in note


class Hurried(AsyncRequestHandler):
    waits: ClassVar[bool] = False

    async def handle(self) -> None:
        for _ in range(3):
            self.send(b"x" * 60)  # in a hurry
        if self.waits:
            await self.send(b"x" * 60)
            kept = self.send(b"y" * 60)
            await kept
        await self.read(line())


def test_a_send_that_should_have_been_awaited_is_warned_of_once_for_each_line() -> None:
    limits = reqtable.Limits(high_water_bytes=100)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        exercise(Hurried, limits=limits).expect(b"x" * 180)
    [each] = warned
    assert (each.category, each.filename) == (RuntimeWarning, __file__)
    assert 'self.send(b"x" * 60)  # in a hurry' in linecache.getline(__file__, each.lineno)
    assert "write await self.send(…)" in str(each.message)


def test_a_send_that_is_awaited_or_small_or_anothers_is_not() -> None:
    class Waits(Hurried):
        waits = True

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        exercise(Hurried, limits=reqtable.Limits(high_water_bytes=180)).expect(b"x" * 180)
        other = exercise(Hurried, limits=reqtable.Limits(high_water_bytes=200)).read_nothing()
        for _ in range(5):
            other.handler.send(b"x" * 100)
        assert not warned
        exercise(Waits, limits=reqtable.Limits(high_water_bytes=180)).expect(b"x" * 240 + b"y" * 60)
    assert not warned


def test_an_uncaught_error_is_logged_with_its_traceback_and_a_peers_fault_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="reqtable")

    class Fails(AsyncRequestHandler):
        async def handle(self) -> None:
            if await self.read(line(limit=5)) == b"bad\n":
                raise ZeroDivisionError  # raised
            await self.read(exactly(5))

    with served(Fails) as server:
        for given in (b"bad\n", b"too long", b"ok\n1"):
            with Client(server.server_address) as client:
                assert client.send(given).end().rest() == b""
    by_error = {
        re.split(r", request \d|:\d+: ", record.getMessage())[-1]: record.exc_info is not None
        for record in caplog.records
        if record.name == "reqtable"
    }
    assert by_error == {
        f": ZeroDivisionError, in Fails.handle ({line_of('# raised', __file__)})": True,
        "input up to b'\\n' exceeds its limit of 5 bytes": False,
        "end of file after 1 bytes while waiting for exactly(n=5)": False,
    }


def test_a_request_that_ends_early_unwinds_its_coroutine(clock: FakeClock) -> None:
    unwound: list[int] = []

    class Careful(AsyncRequestHandler):
        async def handle(self) -> None:
            try:
                await self.read(line())
            finally:
                unwound.append(self.entry.id)

        def on_close(self) -> None:
            unwound.append(-self.entry.id)

    world = World(clock, Careful)
    _, cancelled = world.connect()
    reset, _ = world.connect()
    world.connect()
    world.engine.table.cancel(cancelled.id)
    reset.close()
    world.passes(2)
    world.close()
    assert unwound == [1, -1, 2, -2, 3, -3]


def test_a_coroutine_that_will_not_be_ended_is_reported(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(AsyncRequestHandler):
        async def handle(self) -> None:
            while True:
                try:
                    await self.read(line())
                except GeneratorExit:
                    if self.entry.steps < 0:
                        raise

    world = World(clock, Stubborn)
    _, entry = world.connect()
    world.engine.table.cancel(entry.id)
    world.passes()
    assert "coroutine ignored GeneratorExit" in caplog.text
    entry.steps = -1
    world.close()
    del entry
    gc.collect()


def test_a_timeout_is_that_of_its_own_read(clock: FakeClock) -> None:
    class Twice(AsyncRequestHandler):
        async def handle(self) -> None:
            await self.read(line(), timeout=5)
            await line()
            await self.send(b"patient")

    world = World(clock, Twice)
    peer, _ = world.connect()
    peer.send(b"one\n")
    world.passes()
    world.jump(60)
    peer.send(b"two\n")
    world.passes()
    assert peer.recv(100) == b"patient"
    world.close()
