"""Counts the instructions that a request takes in a server's process, by callgrind of valgrind.

The kernel's instructions don't count. The clients are in lockstep: all send, then all wait for their answers. callgrind
begins to count when the server is warm, and the server waits in a poll whenever a count begins or ends. So nothing else
on the machine changes a count, and two runs differ by less than one percent.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tests.benchmarks.http_servers import FILE_BYTES, HELLO
from tests.benchmarks.processes import CORES, PATIENCE_S, Failed, Server
from tests.benchmarks.servers import PEERS
from tests.benchmarks.work import LINE_BYTES

CLIENTS = 50
AT_ONCE = 16
WARM_ROUNDS, ROUNDS, ROUNDS_OF_ONE = 10, 10, 100
CALLGRIND = ("--tool=callgrind", "--instr-atstart=no", "--dump-instr=no")
BROWSED = b"GET /page.html HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n"


class Asked(NamedTuple):
    """Says what a client sends at once, how many requests that is, and how each answer ends."""

    sent: bytes
    count: int
    end: bytes


ASKED = {
    "lines": Asked(b"x" * (LINE_BYTES - 1) + b"\n", 1, b"\n"),
    "redis": Asked(b"*2\r\n$3\r\nGET\r\n$16\r\nkey:000000000000\r\n" * AT_ONCE, AT_ONCE, b"$-1\r\n"),
    "hello": Asked(BROWSED, 1, HELLO),
    "file": Asked(BROWSED, 1, b"x" * FILE_BYTES),
}

COUNTED: dict[str, tuple[str, ...]] = {
    "lines": (
        *(f"reqtable-{style}{form}" for style in ("state", "async", "greenlet") for form in ("", "-pure")),
        *(f"{loop}-{style}" for loop in ("uvloop", "asyncio") for style in ("protocol", "streams")),
        "gevent",
    ),
    "redis": ("reqtable-state", "reqtable-state-pure", "uvloop-protocol", "asyncio-protocol", "asyncio-streams"),
    "hello": ("reqtable-wsgi-inline", "uvicorn"),
    "file": ("reqtable-http",),
}


def missing() -> str | None:
    """Return why nothing can be counted here; None if it can."""
    absent = [name for name in ("valgrind", "vgdb") if shutil.which(name) is None]
    return f"there is no {absent[0]} here (package valgrind)" if absent else None


def answered(client: socket.socket, asked: Asked) -> None:
    data = b""
    while data.count(asked.end) < asked.count:
        more = client.recv(65_536)
        if not more:
            raise Failed("the server ended the connection")
        data += more


def exchange(clients: list[socket.socket], asked: Asked, rounds: int) -> None:
    for _ in range(rounds):
        for client in clients:
            client.sendall(asked.sent)
        for client in clients:
            answered(client, asked)


def instructions(kind: str, peer: str, core: int) -> dict[str, float]:
    """Return the instructions of a request if all of 50 clients send at once, and if only one of them does."""
    asked = ASKED[kind]
    os.sched_setaffinity(0, {core})  # of this thread
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pipes = f"--vgdb-prefix={folder}/vgdb"
        valgrind = ["valgrind", *CALLGRIND, pipes, f"--callgrind-out-file={folder}/counts"]
        command = [*valgrind, sys.executable, "-m", "tests.benchmarks.servers", peer, kind]
        server = stack.enter_context(Server(command, core=core))
        # A SCHED_BATCH process that wakes up does not preempt the clients on its core: a pass finds all that they send.
        os.sched_setscheduler(server.pid, os.SCHED_BATCH, os.sched_param(0))

        def control(*words: str) -> None:
            subprocess.run(
                ["vgdb", pipes, f"--pid={server.pid}", *words], check=True, capture_output=True, timeout=PATIENCE_S
            )

        def dumped(number: int) -> int:
            """Return the instructions since the last dump."""
            control("dump")
            text = (folder / f"counts.{number}").read_text()
            return int(text.rpartition("\ntotals: ")[2])

        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S))
            for _ in range(CLIENTS)
        ]
        exchange(clients, asked, WARM_ROUNDS)
        control("instrumentation", "on")
        exchange(clients, asked, 1)
        dumped(1)
        exchange(clients, asked, ROUNDS)
        together = dumped(2) / (ROUNDS * CLIENTS * asked.count)
        exchange(clients[:1], asked, ROUNDS_OF_ONE)
        alone = dumped(3) / (ROUNDS_OF_ONE * asked.count)
    return {"together": round(together), "alone": round(alone)}


def all_instructions(counted: dict[str, tuple[str, ...]] = COUNTED) -> dict[str, dict[str, dict[str, float]]]:
    """Return the instructions by kind of work and peer. Each core has one server at a time, and its clients."""
    jobs = [(kind, peer) for kind, peers in counted.items() for peer in peers if PEERS[peer].missing is None]
    free: SimpleQueue[int] = SimpleQueue()
    for core in CORES:
        free.put(core)

    def on_a_free_core(job: tuple[str, str]) -> dict[str, float]:
        core = free.get()
        try:
            return instructions(*job, core)
        finally:
            free.put(core)

    found: dict[str, dict[str, dict[str, float]]] = {}
    with ThreadPoolExecutor(len(CORES)) as pool:
        for (kind, peer), each in zip(jobs, pool.map(on_a_free_core, jobs), strict=True):
            found.setdefault(kind, {})[peer] = each
    return found
