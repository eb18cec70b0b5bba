"""A seeded random workload, and all that can be seen of it: the two forms of the lean path must show the same.

`python -m tests.lean_work 0 40` prints the transcripts of the seeds 0 to 39. A third argument is the path of another C
module than the one that is built.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import wraps
from typing import Any

if __name__ == "__main__" and len(sys.argv) > 3:  # before the package looks for its own module
    spec = importlib.util.spec_from_file_location("reqtable._lean", sys.argv[3])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["reqtable._lean"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["reqtable._lean"])

import reqtable
from reqtable import Engine, Limits, System
from reqtable.table.states import Event
from reqtable.table.table import Entry
from reqtable.table.want import Waiting, Want
from reqtable.testing import FakeClock

CONNECTIONS = 4
ACTIONS = 60
BUFFER_BYTES = (1, 20_000)  # 1: the least that the kernel gives, so that it takes answers in part
LIMITS = Limits(
    steps_per_pass=3, high_water_bytes=30_000, output_bytes_max=120_000, buffered_bytes_max=None, recv_bytes=4_000
)


class Odd(Want[Any]):
    """A user's want for a line, whose `first` answers as no want should."""

    needs_bytes = True

    def __init__(self, answer: Callable[[bytes], Any]) -> None:
        self.first = answer  # type: ignore[method-assign, assignment]

    def take(self, entry: Waiting) -> Any:
        return entry.input.through(b"\n", 4_000)

    def __repr__(self) -> str:
        return f"odd({self.first(b'xyz')!r})"


ODD: list[Callable[[bytes], Any]] = [
    lambda data: data,
    lambda data: [data, len(data)],
    lambda data: (data,),
    lambda data: (data, len(data), 1),
    lambda data: (data, len(data) + 1),
    lambda data: (data, -1),
    lambda data: (data, 2**70),
    lambda data: (data, True),
    lambda data: (data, 0),
    lambda data: (data, float(len(data))),
    lambda data: (data, "1"),
    lambda data: (data, len(data) // 2),
]


class Counted(Want[Any]):
    """A want whose attributes are made anew whenever they are read."""

    @property
    def needs_bytes(self) -> bool:  # type: ignore[override]
        return [self]  # type: ignore[return-value]  # true

    @property
    def awaits(self) -> Event:  # type: ignore[override]
        return Event.AWAITS_INPUT

    def take(self, entry: Waiting) -> Any:
        return entry.input.chunk(50)


class Ends(BaseException):
    """An exception that no `except Exception` catches."""


def parse(data: bytes) -> Any:
    """Find a message: a digit, and as many bytes. Other bytes are an error, or are skipped."""
    if data[:1] == b"!":
        raise ValueError("no message")
    size = 1 + (data[0] - 48 if 48 <= data[0] <= 57 else 0)
    return ((data[1:size], size), size) if len(data) >= size else size if size % 2 else None


WANTS: list[Want[Any]] = [
    *[reqtable.line()] * 6,
    reqtable.line(12),
    reqtable.line(2**70),
    reqtable.until(b";"),
    reqtable.until(b";;", 40),
    reqtable.exactly(7),
    reqtable.exactly(0),
    reqtable.chunk(),
    reqtable.chunk(5),
    reqtable.parsed(parse),
    reqtable.parsed(parse, 6),
    reqtable.skip_line(),
    reqtable.nothing(),
    reqtable.sleep(1),
    reqtable.flushed(),
    reqtable.rest(2_000),
    *map(Odd, ODD),
    *[Counted()] * 3,
]


ERRORS = [ValueError, TypeError, Ends, GeneratorExit, reqtable.HandlerError, KeyboardInterrupt]


def wrapped(function: Any) -> Any:
    """Decorate a state from outside: then its declaration is that of the function within."""

    @wraps(function)
    def run(self: Any, item: Any) -> Any:
        self.work.note(self.entry, "wrapped")
        return function(self, item)

    return run


class Handler(reqtable.StateRequestHandler):
    """Does something by chance in every step. All that it does, it notes."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.work: Work = self.server.work
        self.chance = random.Random(f"{self.work.seed} {entry.id}")

    def start(self) -> Any:
        return self.line

    @reqtable.state(reqtable.line())
    def line(self, item: Any) -> Any:
        return self.do("line", item)

    @reqtable.state(reqtable.line(12), timeout=3)
    def timed(self, item: Any) -> Any:
        return self.do("timed", item)

    @reqtable.state(reqtable.chunk(30))
    def chunk(self, item: Any) -> Any:
        return self.do("chunk", item)

    @wrapped
    @reqtable.state(reqtable.until(b";"), timeout=5)
    def outside(self, item: Any) -> Any:
        return self.do("outside", item)

    def no_state(self) -> Any:
        return None

    def on_error(self, error: Exception) -> Any:
        return self.told("on_error", error, error)

    def on_limit(self, error: Any) -> Any:
        return self.told("on_limit", error, error)

    def on_eof(self, partial: bytes) -> Any:
        return self.told("on_eof", partial)

    def on_timeout(self) -> Any:
        return self.told("on_timeout")

    def on_close(self) -> None:
        self.work.note(self.entry, "on_close", self.state_name)

    def told(self, hook: str, what: Any = None, error: Exception | None = None) -> Any:
        caught = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
        context = None if caught is None else caught.__context__
        self.work.note(self.entry, hook, repr(what), repr(caught), repr(context), self.entry.table.running is not None)
        if self.chance.random() < 0.2:
            raise error or RuntimeError(f"in {hook}")
        return self.transition()

    def do(self, state: str, item: Any) -> Any:
        chance, entry = self.chance, self.entry
        self.work.note(entry, state, shown(item), entry.table.running is entry)
        for _ in range(chance.choice([0, 1, 1, 1, 1, 2, 5])):
            with suppress(reqtable.LimitExceeded):
                self.put(chance)
        rare = chance.random()
        if rare < 0.03:
            entry.table.cancel(entry.id)
        elif rare < 0.06:
            raise chance.choice(ERRORS)(f"at {state}")
        elif rare < 0.08:
            self.line()  # type: ignore[call-arg]  # a state that is called
        elif rare < 0.13:
            handlers = [other.handler for other in entry.table if other is not entry]
            others = [other for other in handlers if isinstance(other, Handler)]
            if others:
                chance.choice(others).send(b"from another\n")
        elif rare < 0.15:
            self.work.engine.steps.set_limits(replace(LIMITS, idle_timeout_s=chance.choice([None, 4.0])))
        return self.transition()

    def put(self, chance: random.Random) -> None:
        size = chance.choice([0, 1, 10, 10, 10, 500, 16_383, 16_384, 40_000, 130_000])
        data = bytes([97 + size % 26]) * size
        kind = chance.random()
        if kind < 0.7:
            self.send(data)
        elif kind < 0.8:
            self.send(data=data)
        else:
            self.send(chance.choice([bytearray, memoryview])(data))

    def transition(self) -> Any:
        chance = self.chance
        kind = chance.random()
        state = chance.choice([self.line, self.line, self.timed, self.chunk, self.outside])
        if kind < 0.5:
            return self.line
        if kind < 0.75:
            return state
        if kind < 0.93:
            return state, chance.choice(WANTS)
        if kind < 0.96:
            return None
        other = Handler.__new__(Handler)
        return chance.choice([state.__func__, self.no_state, "line", (state, 3), (state, WANTS[0], 1), other.line])


def shown(data: Any) -> str:
    """Return the data, but of much data only its length and both ends."""
    return repr(data) if not isinstance(data, bytes) or len(data) < 60 else f"{len(data)} {data[:20]!r} {data[-20:]!r}"


class Notes(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.lines.append(f"log {record.levelname} {record.getMessage()} {error!r}")


class Server(reqtable.TCPServer):
    work: Work

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        trace, names = error.__traceback__, []
        while trace is not None:
            names.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        own = [name for name in names if name in vars(Handler)]
        self.work.lines.append(f"handle_error {error!r} {error.__context__!r} {own}")


class Work:
    """Drives the connections of one engine by chance, and keeps the transcript."""

    def __init__(self, seed: int, stack: ExitStack) -> None:
        self.seed = seed
        self.lines: list[str] = []
        self.chance = random.Random(seed)
        self.clock = FakeClock()
        self.server = stack.enter_context(Server(("127.0.0.1", 0), Handler))
        self.server.work = self
        self.engine = Engine(limits=LIMITS, system=System(clock=self.clock))
        self.engine.add(self.server).loop.open()
        self.table = self.server.table
        self.table.on_transition = lambda entry, before, event: self.note(entry, before.name, event.name)
        self.stack = stack
        self.peers: list[tuple[Entry, socket.socket]] = []

    def note(self, entry: Entry, *said: Any) -> None:
        self.lines.append(f"{entry.id} " + " ".join(map(str, said)))

    def connect(self) -> None:
        ours, theirs = socket.socketpair()
        self.stack.enter_context(theirs)
        theirs.settimeout(0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.chance.choice(BUFFER_BYTES))
        self.server.process_request(ours, ("192.0.2.1", len(self.peers) + 1))
        entry = max(self.table, key=lambda each: each.id, default=None)
        if entry is not None:
            self.peers.append((entry, theirs))

    def input(self) -> bytes:
        chance = self.chance
        word = b"".join(chance.choices([b"a", b"7", b"2", b"!", b";", b";;", b"\n"], [9, 2, 2, 0.3, 2, 1, 4], k=12))
        return chance.choice(
            [b"hello\n", b"hello\n", b"hello\n", b"x\n" * 9, b"part", b"\n", word, word * 20, b"y" * 3_990 + b"\n"]
        )

    def act(self) -> None:
        chance = self.chance
        while sum(entry in self.table for entry, _ in self.peers) < CONNECTIONS:
            self.connect()
        entry, peer = chance.choice(self.peers)
        kind = chance.random()
        with suppress(OSError):
            if kind < 0.75:
                peer.send(self.input())
            elif kind < 0.93:
                self.lines.append(f"{entry.id} got {shown(peer.recv(200_000))}")
            elif kind < 0.95:
                peer.shutdown(socket.SHUT_WR)
            else:
                self.clock.jump(chance.choice([0.5, 2, 30]))

    def look(self) -> None:
        for entry, _ in self.peers:
            self.note(
                entry,
                *[f"{name}={getattr(entry, name)}" for name in LOOKED_AT],
                entry.state.name,
                None if isinstance(entry.handler, type) else entry.handler.state_name,
                shown(bytes(entry.input.peek(10**6))),
                [shown(bytes(piece)) for piece in entry.output.pieces],
                entry.output.size,
                entry.output.held,
            )
        self.lines.append(f"table {self.table.running} {self.table.buffered}")

    def run(self) -> None:
        for _ in range(ACTIONS):
            self.act()
            try:
                self.engine.loop.run_once(0)
            except (Exception, KeyboardInterrupt) as error:
                self.lines.append(f"the loop raised {error!r}")
            self.look()
            self.peers = [pair for pair in self.peers if pair[0] in self.table]
        for entry in list(self.table):
            self.table.cancel(entry.id)
        self.engine.loop.run_once(0)


LOOKED_AT = ("want", "steps", "bytes_in", "bytes_out", "deadline", "timeout", "active_at", "held", "ending")


def transcript(seed: int) -> list[str]:
    """Run the workload of a seed."""
    log = logging.getLogger("reqtable")
    with ExitStack() as stack:
        work = Work(seed, stack)
        notes = Notes(work.lines)
        level, propagate = log.level, log.propagate
        log.addHandler(notes)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        try:
            work.run()
        finally:
            log.removeHandler(notes)
            log.setLevel(level)
            log.propagate = propagate
        return work.lines


def transcripts(first: int, count: int) -> Iterator[str]:
    for seed in range(first, first + count):
        yield f"-- seed {seed}"
        for line in transcript(seed):
            yield re.sub(r"( at 0x|\.\.\.)[0-9a-f]+>", "", line)  # without addresses


if __name__ == "__main__":
    for line in transcripts(int(sys.argv[1]), int(sys.argv[2])):
        print(line)
