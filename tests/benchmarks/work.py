"""The works that are measured, and the goals.

The peers do a work in turn, round by round, so that a disturbance of the machine affects all of them. A round gives
plain figures, which `report` evaluates.
"""

from __future__ import annotations

import resource
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatch

from tests.benchmarks.http_servers import FILE_BYTES, HELLO
from tests.benchmarks.processes import CORES, PATIENCE_S, SERVER_CORE, Failed, Process, Server, Tools, load_of
from tests.benchmarks.servers import ANSWER_BYTES, PEERS

LINE_BYTES = 64
SNAPSHOTS = 5
SHUTDOWNS = 3
LONGER = 10  # so many times as long, because thousands of slow clients do something every second
FEW = 64  # connections that warm up a server

Figures = dict[str, float]


@dataclass(frozen=True)
class Effort:
    """Sets the seconds of a round, the number of rounds, the requests of each test of redis-benchmark, and `messages`.

    `messages` is how many lines a publisher sends in a round. Works with a fresh server have fewer rounds
    (`fresh_rounds`), because their rounds take longer and differ less.
    """

    seconds: float = 0.5
    rounds: int = 7
    fresh_rounds: int = 3
    redis_requests: int = 20_000
    messages: int = 100


QUICK = Effort(0.1, 3, 1, 3_000, 30)
FULL = Effort()
WARM_UP = Effort(0.05, 1, 1, 300, 10)


@dataclass(frozen=True)
class Work:
    """Describes one kind of measurement.

    Works of the same `group` are interleaved. `only` names the peers that do the work (empty: all that can). With
    `fresh`, each round starts a new server, because the server's past would change the figures.
    """

    name: str
    title: str
    measure: Callable[[Work, Tools, Server, Effort], Figures]
    kind: str = "lines"
    baseline: str = "uvloop-protocol"
    transport: str = "tcp"
    connections: int = 1
    lines: int = 1
    slow: int = 0
    all_cores: bool = False  # the server has not only a core of its own
    group: str = ""
    only: tuple[str, ...] = ()
    fresh: bool = False
    request: str = "request"  # what the page calls one of them

    def rounds(self, effort: Effort) -> int:
        return effort.fresh_rounds if self.fresh else effort.rounds

    @property
    def open_at_once(self) -> int:
        """How many open connections a peer must support; for `idle` a few are enough."""
        if self.measure is idle:
            return 2 * FEW
        one_after_another = self.transport == "churn" or self.kind in ("datagrams", "shutdown")
        return 1 if one_after_another else self.connections + self.slow

    @property
    def names(self) -> list[str]:
        """The names of the peers that can do the work, whether installed or not."""
        able = [
            peer.name for peer in PEERS.values() if peer.serves(self.kind) and peer.connections_max >= self.open_at_once
        ]
        if self.kind in ("lines", "answers", "datagrams", "forward", "forward-256", "publish"):
            able.append("floor")
        return [name for name in able if not self.only or name in self.only]


# -- measuring -----------------------------------------------------------------------------------------------------


def loaded(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure requests that are sent as fast as they are answered."""
    answer_bytes = ANSWER_BYTES if work.kind == "answers" else LINE_BYTES
    given = (work.transport, server.port, work.connections, work.lines, answer_bytes, work.slow, effort.seconds)
    with tools.clients(*given) as load:
        return told_to_work(load, server)


def told_to_work(load: Process, server: Server) -> Figures:
    before = server.cpu
    load.tell()
    figures = load_of(load)
    cpu = server.cpu - before
    return figures | {"cpu_s": cpu.total, "user_s": cpu.user, "system_s": cpu.system}


def forwarded(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure lines that come back through a forwarder, or MB that pass it both ways."""
    kind = "bulk" if work.lines == 0 else "lines"
    with tools.relayed(kind, server, work.connections, effort.seconds) as load:
        return told_to_work(load, server)


def published(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure lines to all subscribers, at most `work.lines` messages at once."""
    with tools.relayed("publish", server, work.connections, effort.messages, work.lines) as load:
        return told_to_work(load, server)


def redis(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure PING, SET and GET by redis-benchmark, with `work.lines` requests at once."""
    assert tools.redis is not None
    count = effort.redis_requests
    tests = ["-t", "ping_mbulk,set,get", "-n", str(count), "-c", str(work.connections), "-P", str(work.lines), "--csv"]
    before, load_before, began = server.cpu, waited_for(), time.perf_counter()
    command = [tools.redis, "-p", str(server.port), *tests]  # runs on the core of this process, which is the load's
    printed = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stdout
    wall_s = time.perf_counter() - began
    cpu = server.cpu - before
    if not all(f'"{test}"' in printed for test in ("PING_MBULK", "SET", "GET")):
        raise Failed(f"redis-benchmark said {printed[:200]!r}")
    return {
        "requests": 3 * count,
        "wall_s": wall_s,
        "load_s": waited_for() - load_before,
        "cpu_s": cpu.total,
        "user_s": cpu.user,
        "system_s": cpu.system,
    }


def waited_for() -> float:
    """Return the seconds of processor time of all reaped children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def asked(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure HTTP requests that are sent as fast as they are answered."""
    size = FILE_BYTES if work.kind == "file" else len(HELLO)
    server.run_on(set(CORES) if work.all_cores else {SERVER_CORE})
    seconds = effort.seconds * (LONGER if work.group == "honest" else 1)
    with tools.browsing("get", server, work.connections, size, work.slow, seconds) as load:
        return told_to_work(load, server)


def listened(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure server-sent events, one at a time."""
    with tools.browsing("events", server, work.connections, amount=max(1, effort.messages // 10)) as load:
        return told_to_work(load, server)


def idle(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure the memory of connections that are idle after one line and its answer, or after what HTTP has for it."""
    peer = PEERS.get(server.command[-2])
    count = min(work.connections, peer.connections_max - FEW if peer is not None else work.connections)

    def clients(count: int) -> AbstractContextManager[Process]:
        if work.kind == "lines":
            return tools.clients("hosts", server.port, count, 1, LINE_BYTES, 0, 0)
        return tools.browsing("websockets" if work.kind == "websocket" else "listeners", server, count)

    with clients(FEW):
        pass
    before = server.memory_kib
    with clients(count):
        return {"kib": (server.memory_kib - before) / count, "connections": count}


def shutdown(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure the time from `shutdown()` in another thread to the end of `serve_forever()`."""
    took = []
    for _ in range(SHUTDOWNS):
        server.tell()
        took.append(float(server.line()))
    return {"ms": statistics.median(took), "max_ms": max(took)}


def snapshot(work: Work, tools: Tools, server: Server, effort: Effort) -> Figures:
    """Measure a snapshot in a step and in another thread, and how long another request has to wait meanwhile."""
    figures: Figures = {}
    with tools.clients("tcp", server.port, work.connections, 1, LINE_BYTES, 0, 0):
        asking, busy = (socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) for _ in range(2))
        with asking, busy:
            for where in ("step", "thread"):
                seen = [look(asking, busy, where, work.connections) for _ in range(SNAPSHOTS)]
                took, delays = zip(*seen, strict=True)
                figures[f"{where}_ms"] = statistics.median(took)
                figures[f"{where}_delay_ms"] = statistics.median(delays)
    return figures


def look(asking: socket.socket, busy: socket.socket, where: str, least: int) -> tuple[float, float]:
    """Return the milliseconds of a snapshot, and of the slowest line echoed meanwhile."""
    asking.sendall(where.encode() + b"\n")
    asking.setblocking(False)
    slowest, answer = 0.0, b""
    while not answer.endswith(b"\n"):
        began = time.perf_counter()
        busy.sendall(b"here\n")
        busy.recv(100)
        slowest = max(slowest, time.perf_counter() - began)
        try:
            answer += asking.recv(100)
        except BlockingIOError:
            continue
    asking.settimeout(PATIENCE_S)
    rows, took_ms = answer.split()
    if int(rows) < least:
        raise Failed(f"a snapshot has {int(rows)} rows, not {least}")
    return float(took_ms), slowest * 1e3


# -- the works --------------------------------------------------------------------------------------------------------

GROWING = (
    "reqtable-state",
    "reqtable-state-pure",
    "reqtable-async",
    "reqtable-greenlet",
    "uvloop-protocol",
    "asyncio-streams",
    "floor",
)
BESIDE_SLOW = (*GROWING, "reqtable-thread", "socketserver-threading", "gevent")
IDLE = (
    *(f"reqtable-{name}" for name in ("state", "async", "pool", "greenlet", "thread")),
    *(f"{loop}-{style}" for loop in ("uvloop", "asyncio") for style in ("protocol", "streams")),
    "gevent",
    "trio",
    "twisted",
    "socketserver-threading",
    "floor",
)
SIZES = (10, 100, 1_000, 10_000)

WORKS = {
    work.name: work
    for work in (
        Work("echo-1", "Echo of 64-byte lines, 1 connection", loaded),
        Work("echo-50", "Echo of 64-byte lines, 50 connections", loaded, connections=50),
        Work("echo-500", "Echo of 64-byte lines, 500 connections", loaded, connections=500),
        Work("pipelined", "Sixteen lines at once, 50 connections", loaded, connections=50, lines=16),
        Work(
            "churn",
            "Connect, one line, close; 10 at a time",
            loaded,
            transport="churn",
            connections=10,
            baseline="socketserver-threading",
        ),
        Work("answers", "Answers of 1 MB, 1 connection", loaded, kind="answers"),
        Work("udp", "Echo of 64-byte datagrams, 50 peers", loaded, kind="datagrams", transport="udp", connections=50),
        Work("redis", "A small Redis, 50 connections", redis, "redis", "asyncio-streams", connections=50),
        Work(
            "redis-16",
            "A small Redis, 50 connections, -P 16",
            redis,
            "redis",
            "asyncio-streams",
            connections=50,
            lines=16,
        ),
        Work(
            "forward-lines",
            "A forwarder: 64-byte lines there and back, 50 connections",
            forwarded,
            "forward",
            "asyncio-streams",
            connections=50,
            request="line",
        ),
        *(
            Work(
                f"forward-bulk-{count}{'-256' if size == 256 else ''}",
                f"A forwarder: bulk both ways, {count} connection{'s' if count > 1 else ''}, {size} KiB at once",
                forwarded,
                "forward-256" if size == 256 else "forward",
                "asyncio-streams",
                connections=count,
                lines=0,
                request="MB",
            )
            for count, size in ((1, 64), (10, 64), (10, 256))
        ),
        *(
            Work(
                f"publish-{count}",
                f"Lines to 1,000 subscribers, {'one message' if count == 1 else f'{count} messages'} at a time",
                published,
                "publish",
                "asyncio-streams",
                connections=1_000,
                lines=count,
                fresh=True,
                request="line",
            )
            for count in (1, 16)
        ),
        *(
            Work(
                f"growth-{size}",
                f"CPU as connections grow: {size:,} busy",
                loaded,
                connections=size,
                group="growth",
                only=GROWING,
            )
            for size in SIZES
        ),
        Work("busy-10", "10 busy clients, alone", loaded, connections=10, group="slow", only=BESIDE_SLOW),
        Work(
            "slow-1000",
            "10 busy clients beside 1,000 slow ones",
            loaded,
            connections=10,
            slow=1_000,
            group="slow",
            only=BESIDE_SLOW,
        ),
        Work(
            "takeover",
            "Crash takeover: echo of 64-byte lines, 50 connections",
            loaded,
            "same",
            "reqtable-worker",
            connections=50,
            group="takeover",
        ),
        Work(
            "takeover-changing",
            "Crash takeover: the same, and two fields of the handler change with each line",
            loaded,
            "changing",
            "reqtable-worker",
            connections=50,
            group="takeover",
        ),
        Work(
            "takeover-16",
            "Crash takeover: sixteen lines at once, 50 connections",
            loaded,
            "same",
            "reqtable-worker",
            connections=50,
            lines=16,
            group="takeover",
        ),
        Work(
            "idle", "10,000 idle connections, all from different hosts", idle, connections=10_000, fresh=True, only=IDLE
        ),
        *(
            Work(
                f"{kind}-{count}{'-cores' if all_cores else ''}",
                f"HTTP: {title}, {count} connection{'s' if count > 1 else ''}{', all cores' if all_cores else ''}",
                asked,
                kind,
                baseline,
                connections=count,
                all_cores=all_cores,
            )
            for kind, title, baseline in (
                ("hello", "a hello", "uvicorn"),
                ("file", "a file of 10 KiB", "uvicorn"),
            )
            for count, all_cores in ((1, False), (8, False), (8, True), (32, False))
            if kind == "hello" or not all_cores
        ),
        *(
            Work(
                f"honest{'-slow' if slow else ''}",
                "HTTP: 10 clients, "
                + (f"beside {slow:,} slow uploads and {slow:,} slow downloads" if slow else "alone"),
                asked,
                "hello-large",
                "reqtable-wsgi-pool",
                connections=10,
                slow=slow,
                group="honest",
                only=("reqtable-wsgi-pool",),
                fresh=True,
            )
            for slow in (0, 2_000)
        ),
        *(
            Work(
                f"idle-{title.lower()}",
                f"HTTP: 10,000 idle {title}",
                idle,
                kind,
                "reqtable-http",
                connections=10_000,
                fresh=True,
            )
            for kind, title in (("websocket", "WebSockets"), ("events", "listeners"))
        ),
        Work(
            "events",
            "HTTP: a server-sent event for each of 10,000 listeners",
            listened,
            "events",
            "reqtable-http",
            connections=10_000,
            fresh=True,
            request="event",
        ),
        Work("shutdown", "Shutdown", shutdown, "shutdown", "socketserver", fresh=True),
        Work(
            "snapshot",
            "A snapshot of 10,000 requests",
            snapshot,
            "snapshot",
            "reqtable-state",
            connections=10_000,
            fresh=True,
        ),
    )
}


@dataclass(frozen=True)
class Goal:
    """Sets the most that a figure of a peer may be.

    If `over` names another peer or another work, the goal is about the ratio to that. None: the floor's own ratio.
    """

    text: str
    work: str
    peer: str
    most: float | None
    over: str = ""
    figure: str = "cpu_us"
    unit: str = "×"

    @property
    def reason(self) -> str:
        """Why the goal is missed, if it is; see REASONS."""
        place = (self.work, self.peer, self.over)
        found = (why for key, why in REASONS.items() if all(map(fnmatch, place, key)))
        return next(found, "")


def ratios(work: str, peer: str, *others: tuple[str, float]) -> list[Goal]:
    return [Goal(WORKS[work].title, work, peer, most, other) for other, most in others]


def for_each(works: tuple[str, ...], peer: str, *others: tuple[str, float]) -> list[Goal]:
    return [goal for work in works for goal in ratios(work, peer, *others)]


MANY = ("echo-50", "echo-500")
BULK = ("forward-bulk-1", "forward-bulk-10", "forward-bulk-10-256")
HELLOS = ("hello-8", "hello-32")

# No goal is below what a loop in C reaches in the same run: see the column of the page.
GOALS: list[Goal] = [
    *for_each(MANY, "reqtable-state", ("uvloop-protocol", 0.8), ("uvloop-streams", 0.55), ("asyncio-streams", 0.45)),
    *for_each(MANY, "reqtable-state-pure", ("uvloop-protocol", 1.1)),
    *ratios("echo-1", "reqtable-state", ("uvloop-protocol", 1.1)),
    *for_each(MANY, "reqtable-async", ("uvloop-streams", 0.6)),
    *for_each(MANY, "reqtable-async-pure", ("uvloop-streams", 0.85)),
    *for_each(MANY, "reqtable-greenlet", ("gevent", 0.6)),
    *for_each(MANY, "reqtable-greenlet-pure", ("gevent", 0.65)),
    *ratios("churn", "reqtable-thread", ("socketserver-threading", 1.05)),
    *ratios("churn", "reqtable-thread-reuse", ("socketserver-threading", 0.8)),
    *ratios("churn", "reqtable-fork", ("socketserver-forking", 1.4)),
    *ratios("redis-16", "reqtable-state", ("asyncio-streams", 0.5), ("asyncio-protocol", 1.0)),
    Goal("Growth of CPU from 10 to 10,000 connections", "growth-10000", "reqtable-state", None, "growth-10"),
    Goal("An idle connection", "idle", "reqtable-state", 0.66, figure="kib", unit="KiB"),
    *ratios("forward-lines", "reqtable-state", ("asyncio-streams", 0.6), ("uvloop-streams", 0.9)),
    *for_each(BULK, "reqtable-state", ("asyncio-streams", 0.6), ("uvloop-streams", 0.9)),
    *ratios("publish-1", "reqtable-state", ("asyncio-streams", 0.6)),
    *for_each(HELLOS, "reqtable-wsgi-inline", ("uvicorn", 0.8), ("gunicorn-gthread", 0.2), ("waitress", 0.2)),
    *for_each(HELLOS, "reqtable-wsgi-greenlet", ("gunicorn-gthread", 0.25), ("waitress", 0.25)),
    *for_each(HELLOS, "reqtable-wsgi-pool", ("gunicorn-gthread", 0.5), ("waitress", 0.5)),
    *ratios("hello-1", "reqtable-wsgi-pool", ("gunicorn-gthread", 1.0), ("waitress", 1.0)),
    *for_each(("file-8", "file-32"), "reqtable-http", ("uvicorn", 0.5)),
    Goal("An idle WebSocket", "idle-websockets", "reqtable-http", 2, figure="kib", unit="KiB"),
    *ratios("takeover", "reqtable-takeover", ("reqtable-worker", 1.15)),
    *ratios("takeover-changing", "reqtable-takeover", ("reqtable-worker", 1.6)),
    *(
        Goal("Shutdown", "shutdown", peer, 5, figure="ms", unit="ms")
        for peer in ("reqtable-state", "reqtable-greenlet", "reqtable-thread")
    ),
    Goal("snapshot() of 10,000 requests", "snapshot", "reqtable-state", 50, figure="step_ms", unit="ms"),
    Goal(
        "Another request's wait for a snapshot in another thread",
        "snapshot",
        "reqtable-state",
        5,
        figure="thread_delay_ms",
        unit="ms",
    ),
]

# Why goals are missed, by patterns of the work, the peer, and what it is compared with; the first that fits is shown.
REASONS = {
    (
        "echo-1",
        "*",
        "*",
    ): "A pass of the loop costs 12,000 instructions in Python, and each line has a pass of its own.",
    ("echo-*", "reqtable-state", "*"): "Most of what is left is the kernel's: see the floor.",
    ("echo-*", "reqtable-state-pure", "*"): "A line takes 366 bytecodes.",
    (
        "echo-*",
        "reqtable-async*",
        "*",
    ): "The coroutine, its awaits and what they return are Python: 132 bytecodes a line.",
    (
        "echo-*",
        "reqtable-greenlet*",
        "*",
    ): "The C module has no part in it: the methods of the handler's socket, and the "
    "way into and out of its greenlet, are Python, 344 bytecodes a line.",
    ("churn", "reqtable-thread*", "*"): "Each connection has a row in the table, a duplicate of its socket for "
    "cancelling and lingering, and a message that its thread is done.",
    ("churn", "reqtable-fork", "*"): "The process has four times the memory of one with socketserver alone. fork(2) "
    "copies its page tables, and a child writes to twice as many pages on its way out of the loop.",
    (
        "redis-16",
        "*",
        "asyncio-protocol",
    ): "Both parse with the same 274 bytecodes. Beside that, a GET is a step of the "
    "loop, with an input and an output of its own.",
    ("redis-16", "*", "*"): "The parser and the commands, which the peer has too, take more than half of the time.",
    ("forward-lines", "*", "*"): "A line passes the loop four times, and its steps take 2,400 bytecodes. A bare "
    "forwarder in Python, without a table, takes 0.55 × asyncio's streams.",
    ("forward-bulk-*", "*", "*"): "Most of the time is the kernel's, which copies the bytes: see the floor.",
    ("publish-*", "*", "*"): "`tell` puts each message into a mailbox, and a step takes the message out again.",
    ("hello-*", "*", "*"): "A request takes 1,300 bytecodes, where the peers parse and format in C or check less.",
    ("takeover*", "*", "*"): "The journal is Python, and the lean path in C has made the worker beside it faster.",
}
