"""Records that no process should send, to a table that must not mind: `python -m tests.fuzz_records --seeds 10000`.

Each seed spoils the record of a request: some of its values, or some of its bytes. If the record is refused, the table
is as before. If it is taken, the request goes on until it ends, and whatever it does, the loop goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import socket
import sys
from copy import deepcopy
from typing import Any

import msgspec

import reqtable
from reqtable import (
    Limits,
    ReqtableError,
    StateRequestHandler,
    Transition,
    chunk,
    either,
    flushed,
    line,
    sleep,
    state,
    told,
)
from reqtable.loop.platform import System
from reqtable.testing import FakeClock
from tests.support import open_descriptors

WORDS = (b"", b"half", b"a\nhalf", b"sleep\n", b"either\n", b"much\n", b"flush\n", b"end\n")
OTHERS: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2**63, 1e300, float("inf"), "x", b"x", [], [1], {}, {"a": 1}, "line", "reqtable:Limits"),
    *({"!": "tuple", "v": [1]}, {"!": "end", "v": None}, {"!": "missing", "v": None}, {"!": "file", "v": 0}),
    *({"!": "want", "v": ["Line", {"limit": 5}]}, {"!": "want", "v": ["Told", {}]}, {"!": "want", "v": ["Ended", {}]}),
    *({"!": "want", "v": ["Either", {"wants": []}]}, {"!": "want", "v": ["Datagram", {}]}),
    *({"!": "want", "v": ["Sleeping", {"seconds": 1, "left": -5.0}]}, {"!": "want", "v": ["Line", {"limit": "x"}]}),
)


class Serves(StateRequestHandler):
    total: int = 0
    note: str = ""

    @state(line(100), timeout=30)
    def command(self, text: bytes) -> Transition:
        self.send(text)
        word = text.strip()
        if word == b"sleep":
            return self.command, sleep(5)
        if word == b"either":
            return self.some, either(chunk(), told(), sleep(5))
        if word in (b"much", b"flush", b"end"):
            self.send(bytes(3_000_000))
            return None if word == b"end" else (self.done, flushed()) if word == b"flush" else self.command
        return self.command

    @state()
    def some(self, arrived: Any) -> Transition:
        return self.command

    @state()
    def done(self, _: None) -> Transition:
        return self.command

    def on_error(self, error: Exception) -> Transition:
        return None


class Host:
    """A server whose loop is run by hand."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server = reqtable.TCPServer(("127.0.0.1", 0), Serves)
        self.engine = reqtable.Engine(limits=Limits(), system=System(clock=self.clock)).add(self.server)
        self.engine.loop.open()

    def passes(self, count: int = 3) -> None:
        for _ in range(count):
            self.engine.loop.run_once(0)


def record_of(rng: random.Random) -> bytes:
    """Return the record of some request."""
    host = Host()
    ours, theirs = socket.socketpair()
    with theirs:
        host.engine.intake.admit(host.server, ours, ("peer", 1))
        theirs.send(rng.choice(WORDS))
        host.passes()
        [record] = host.engine.table.save() or [b""]
        host.server.server_close()
    return record


def spoiled(record: bytes, rng: random.Random) -> bytes:
    """Return a record with other values, or with other bytes."""
    if rng.random() < 0.2:
        data = bytearray(record)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    head = msgspec.msgpack.decode(record)
    body = msgspec.msgpack.decode(head[-1])
    for _ in range(rng.randint(1, 2)):
        _spoil(head[:-1] if rng.random() < 0.1 else body, rng)
    if rng.random() < 0.1:
        _spoil(head, rng)
    if isinstance(head[-1], bytes):
        head[-1] = msgspec.msgpack.encode(body)
    return msgspec.msgpack.encode(head)


def _spoil(values: Any, rng: random.Random) -> None:
    """Put another value in the place of one of `values`, or of one within it."""
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(values[key], list | dict) and rng.random() < 0.6:
        _spoil(values[key], rng)
    elif isinstance(values, dict) and rng.random() < 0.2:
        del values[key]
    else:
        values[key] = deepcopy(rng.choice(OTHERS))  # it may be spoiled in turn


class Bugs(logging.Handler):
    """Keeps what is logged as a bug of the engine."""

    def __init__(self) -> None:
        super().__init__(logging.CRITICAL)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def problem_with(seed: int) -> str | None:
    """Restore a spoiled record, and go on until its request has ended. Returns what was wrong."""
    rng = random.Random(seed)
    record = spoiled(record_of(rng), rng)
    host = Host()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    try:
        try:
            host.engine.table.restore([record], [ours])
        except ReqtableError:
            ours.close()
            if len(host.engine.table):
                return "refused, but in the table"
            return None
        host.passes()
        for entry in host.engine.table:
            if not isinstance(entry.handler, type):
                entry.handler.tell(1)
        for data in (b"x\n", b"either\n", b"much\n"):
            with contextlib.suppress(OSError):
                theirs.send(data)
                theirs.recv(100_000)
            host.passes()
            host.clock.jump(20)
            host.passes()
        theirs.close()
        host.passes()
        host.clock.jump(10**6)
        host.passes(10)
        if len(host.engine.table):
            return f"goes on for ever: {list(host.engine.table)}"
    except Exception as error:
        return f"escaped: {error!r}"
    finally:
        theirs.close()
        host.server.server_close()
    return None


def fuzz(seeds: Any) -> list[str]:
    """Return what was wrong."""
    logger, bugs = logging.getLogger("reqtable"), Bugs()
    logger.addHandler(bugs)
    logger.propagate = False
    before = open_descriptors()
    problems = []
    try:
        for seed in seeds:
            problem = problem_with(seed)
            if problem is not None:
                problems.append(f"seed {seed}: {problem}")
            problems += [f"seed {seed}: {each}" for each in bugs.found]
            bugs.found.clear()
    finally:
        logger.removeHandler(bugs)
        logger.propagate = True
    if open_descriptors() > before:
        problems.append(f"{open_descriptors() - before} descriptors were never closed")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    problems = fuzz(range(asked.first, asked.first + asked.seeds))
    print("\n".join(problems) or f"{asked.seeds} spoiled records: no problem")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
