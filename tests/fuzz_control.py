"""Requests that no operator should send, to a control API that must not mind: `python -m tests.fuzz_control`.

Each seed is one connection to the control API of a server that serves clients meanwhile. Some requests are an
operator's with a wrong value somewhere, others are random bytes. No answer may be a 500, nothing may be logged as a
bug, and a client of the server must get its answer afterwards. Descriptors and memory must be level in the end. All in
one thread, over socket pairs, by a fake clock: a seed does the same wherever it runs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from reqtable import Config, Limits
from reqtable.control.annex import Annex
from reqtable.control.api import ControlHandler
from reqtable.control.listening import LIMITS
from reqtable.control.operations import Target
from reqtable.control.source import OwnSource
from reqtable.control.watch import forget, watch_of
from reqtable.server.operator import Operator
from tests.fuzz import LEVEL_BYTES, Bugs, Server, States, descriptors, main, resident

PASSES_MAX = 60
CONFIG = Config(limits=Limits(entries_max=100))
LOGGERS = ("reqtable", "reqtable.control")

METHODS = ["GET", "GET", "GET", "POST", "POST", "PATCH", "PUT", "HEAD", "DELETE", "OPTIONS", "get", "BREW"]
# What belongs to which resource: the method that it takes, and the keys of its query or its body.
RESOURCES = {
    "/v1/requests": ("GET", ["state", "handler", "handler_state", "peer", "path", "older", "idle", "policy", "worker"]),
    "/v1/requests?": ("GET", ["sort", "limit", "by", "format", "state", "older"]),
    "/v1/requests/1": ("GET", []),
    "/v1/requests/%s": ("GET", []),
    "/v1/requests/%s/cancel": ("POST", []),
    "/v1/requests/cancel": ("POST", ["ids", "older", "state", "handler", "max", "dry_run", "limit", "sort", "peer"]),
    "/v1/stats": ("GET", []),
    "/v1/workers": ("GET", []),
    "/v1/machine": ("GET", []),
    "/v1/events": ("GET", ["kinds"]),
    "/v1/stacks": ("GET", []),
    "/v1/config": ("PATCH", ["limits.entries_max", "limits.idle_timeout_s", "limits.when_full", "dispatch", "limits"]),
    "/v1/config?": (
        "PATCH",
        [
            "log.format",
            "pool.workers",
            "proxy.trusted",
            "tls.cert",
            "origins",
            "workers",
            "",
            "a.b",
            "executor.arguments",
        ],
    ),
    "/v1/reload": ("POST", []),
    "/v1/drain": ("POST", ["stay", "worker"]),
    "/v1/log-level": ("PUT", ["logger", "level"]),
    "/v1/log-level?": ("GET", ["logger", "level"]),
    "/metrics": ("GET", []),
    "/healthz": ("GET", []),
    "/readyz": ("GET", []),
}
NUMBERS = [0, 1, -1, 2, 40, 0.5, -0.0, 1e15, 1e300, -1e300, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400]
TEXTS = [
    "",
    "1",
    "-1",
    "inf",
    "nan",
    "1e3",
    "\u0661",
    "0x10",
    "READING",
    "R",
    "body",
    "age",
    "mem",
    "peer",
    "ndjson",
    "ended",
    "begun,state,\x1b[2J",
    "evict",
    "pool",
    "debug",
    "reqtable",
    "reqtable.control",
    "\x1b]0;owned\x07",
    "\u202eevil\u2066",
    "<script>alert(1)</script>",
    "\0",
    "\r\nSplit: 1",
    "%s%n{0}",
    "é" * 3000,
    "9" * 5000,
    "." * 10_000,
]
RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"{}",
    b"\xff\xfe",
    b'{"older": NaN}',
    b'{"older": Infinity, "max": -Infinity}',
    b'{"older": 1e999}',
    b'{"max": ' + b"9" * 5000 + b"}",
    b'{"handler": "\\ud800"}',
    b'{"handler": "\xff"}',
    b'{"older": 1, "older": 2}',
    b"[" * 100_000,
    b'{"ids": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"a": ' * 20_000,
    b'{"ids": [' + b",".join([b"7"] * 20_000) + b"]}",
    b'{"' + b"k" * 100_000 + b'": 1}',
]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Return a value that JSON has, likely one that does not belong there."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [value(rng, depth + 1) for _ in range(rng.randrange(4))]


def request(rng: random.Random) -> bytes:
    """Return a request of an operator, with wrong values."""
    path, (method, keys) = rng.choice(list(RESOURCES.items()))
    path = path.removesuffix("?").replace("%s", quote(str(rng.choice([*NUMBERS, *TEXTS])), safe=""))
    if rng.random() < 0.1:
        method = rng.choice(METHODS)
    chosen = {key: value(rng) for key in keys if rng.random() < 0.4}
    if rng.random() < 0.1:
        chosen[rng.choice(TEXTS)] = value(rng)
    if method == "GET" or rng.random() < 0.1:
        query = "&".join(f"{quote(key)}={quote(str(each))}" for key, each in chosen.items())
        path += f"?{query}" if query else ""
    body = b"" if method == "GET" else json.dumps(chosen).encode()
    if rng.random() < 0.15:
        body = rng.choice(RAW)
    if rng.random() < 0.05:
        body = rng.randbytes(rng.choice([10, 1000]))
    fields = f"Host: reqtable\r\nContent-Length: {len(body)}\r\n"
    if rng.random() < 0.2:
        fields += rng.choice(["Accept: application/x-ndjson\r\n", "Accept: \x1b[2J\r\n", "Connection: close\r\n"])
    return f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + body


def connection(rng: random.Random) -> Iterator[bytes]:
    """Yield what one operator sends, in pieces."""
    data = b"".join(request(rng) for _ in range(rng.choice([1, 1, 1, 3])))
    if rng.random() < 0.1:
        spoiled = bytearray(data)
        for _ in range(rng.choice([1, 5])):
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
        data = bytes(spoiled)
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data))]
    step = rng.choice([len(data), 1 + len(data) // 3, 1 + len(data) // 20]) or 1
    for start in range(0, len(data), step):
        yield data[start : start + step]


class Control(Server):
    """A control server whose operators are offered to it by hand."""

    def __init__(self, target: Target) -> None:
        self.source = OwnSource(target)
        super().__init__(ControlHandler, "inline", Config(limits=LIMITS))

    @staticmethod
    def user_of(_: socket.socket) -> int:
        return os.geteuid()


class World:
    """A server with a few clients, and its control API."""

    def __init__(self) -> None:
        self.served = Server(States, "inline", CONFIG)
        self.engine = self.served.engine
        self.operator = Operator(self.engine, CONFIG)
        self.control = Control(Target(self.engine, self.operator))
        self.annex = Annex(self.engine, self.control.engine)
        self.clients = [self.client() for _ in range(3)]

    def client(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.served.offer(ours)
        return theirs

    def run(self, passes: int) -> None:
        for _ in range(passes):
            self.engine.loop.run_once(0)

    def close(self) -> None:
        for each in self.clients:
            each.close()
        self.annex.close()
        forget(self.engine)
        self.served.server_close()

    def operate(self, pieces: Iterator[bytes]) -> bytes:
        """Send the pieces, and hang up. Returns what was answered."""
        ours, theirs = socket.socketpair()
        got = b""
        with theirs:
            theirs.setblocking(False)
            self.control.offer(ours)
            for piece in pieces:
                for start in range(0, len(piece), 50_000):
                    with contextlib.suppress(OSError):
                        theirs.send(piece[start : start + 50_000])
                    self.run(2)
            for _ in range(PASSES_MAX):
                self.run(1)
                with contextlib.suppress(OSError):
                    got += theirs.recv(1_000_000)
        for _ in range(PASSES_MAX):
            self.run(1)
            if not len(self.control.table):
                break
        return got

    def problems(self) -> Iterator[str]:
        """Say what is not as it was before, and mend what an operator may change."""
        if len(self.control.table) or self.control.table.buffered:
            yield f"left over: {list(self.control.table)}, {self.control.table.buffered} bytes"
        if watch_of(self.engine)._lookers:
            yield "events are still recorded"
        self.operator._apply(CONFIG)
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)
        client = self.client()
        client.send(b"honest\n")
        self.run(3)
        try:
            got = client.recv(100)
        except BlockingIOError:
            got = b""
        client.close()
        self.run(3)
        if got != b"honest\n":
            yield f"a client got {got!r}"
        yield from self.served.bugs + self.control.bugs
        self.served.bugs.clear()
        self.control.bugs.clear()

    @property
    def is_spent(self) -> bool:
        """Whether an operator has ended what the next seed needs."""
        return self.served._is_draining or len(self.served.table) < len(self.clients)


def fuzz(seeds: range) -> list[str]:
    """Run the seeds. Returns what was wrong; prints what was done."""
    log = Bugs()
    logger = logging.getLogger("reqtable")
    logger.addHandler(log)
    logger.propagate = False
    before, problems, statuses = descriptors(), [], Counter[str]()
    warm, memory = min(len(seeds) // 2, 2000), resident()
    world = World()
    try:
        for number, seed in enumerate(seeds):
            memory = resident() if number == warm else memory
            found = []
            try:
                got = world.operate(connection(random.Random(seed)))
                answered = [each.decode() for each in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", got)]
                statuses.update(answered)
                found += [f"answered {got[:300]!r}"] if "500" in answered else []
                is_spent = world.is_spent
                found += world.problems() if not world.served._is_draining else []
            except Exception as error:
                found.append(f"escaped: {error!r}")
                is_spent = True
            problems += [f"seed {seed}: {each}" for each in [*found, *log.bugs]]
            log.bugs.clear()
            if is_spent:
                world.close()
                world = World()
    finally:
        world.close()
        logger.removeHandler(log)
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    gc.collect()
    grown = resident() - memory
    if descriptors() > before:
        problems.append(f"{descriptors() - before} descriptors more than before")
    if grown > LEVEL_BYTES:
        problems.append(f"{grown / 2**20:.1f} MiB of memory more than after {warm} seeds")
    counts = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
    print(f"{len(seeds)} seeds, from {seeds.start}: {counts}; memory grew by {grown / 2**20:.1f} MiB")
    return problems


if __name__ == "__main__":
    sys.exit(main(fuzz, __doc__))
