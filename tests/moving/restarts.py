"""Hot restarts of reqtable under load: each run prints its figures, and returns what does not hold."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.moving.load import ROOT, Figures, Group, Load
from tests.moving.servers import Reqtable, ReqtableHttp, ReqtableWebSockets, Server, StoppedReqtable
from tests.moving.tally import WAIT_S, quantile

BETWEEN_S = 0.1  # restarts: the load goes on meanwhile
LOG_LINES = 100
MIXED = [
    Group("talk", 20),
    Group("ping", 5),
    Group("churn", 8),
    Group("pipeline", 4),
    Group("upload", 2),
    Group("download", 2),
]


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="reqtable-moving-") as made:
        yield Path(made)


def shown(figures: Figures) -> str:
    """Return the figures as lines."""
    lines = []
    for kind, own in figures.items():
        lost = ", ".join(f"{count} {name}" for name, count in own["failures"].items()) or "0 failed"
        lines.append(
            f"  {kind:<14}{own['asked']:>8} requests, {lost}; closed {own['closed']}; p50 {own['p50_ms']:.1f} "
            f"p99 {own['p99_ms']:.1f} max {own['max_ms']:.1f} ms; longest silence {own['silence_max_ms']:.0f} ms"
        )
        lines += [f"      {each}" for each in own["examples"]]
    return "\n".join(lines)


def faults(figures: Figures) -> list[str]:
    """Return what is wrong with the figures of a load that should have lost nothing, after its end."""
    found = []
    for kind, own in figures.items():
        found += [f"{kind}: {count} {name}" for name, count in own["failures"].items()]
        found += [f"{kind}: {own['closed']} kept connections closed"] if own["closed"] else []
        found += [f"{kind}: {own['unaccounted']} unaccounted"] if own["unaccounted"] else []
        found += [] if own["answered"] else [f"{kind}: no answer"]
    return found


def restart_times(server: Server, times: int) -> list[float]:
    """Restart a server under load. Returns how long each restart took."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        server.restart()
        took.append(time.monotonic() - began)
        time.sleep(BETWEEN_S)
    return took


def _times_of(took: list[float]) -> str:
    took = sorted(took)
    return f"{len(took)} restarts, p50 {quantile(took, 0.5):.2f} s, max {quantile(took, 1):.2f} s"


def last_version(figures: Figures, version: int) -> list[str]:
    """Say which clients have not seen the version that the last restart has begun.

    The last answer to a slow download may have been in the kernel before that restart.
    """
    return [
        f"{kind}: {count} clients saw version {seen} last, not {version}"
        for kind, own in figures.items()
        for seen, count in own["versions"].items()
        if int(seen) != version and kind != "download"
    ]


def restarts(quick: bool, seed: int, make: type[Reqtable] = Reqtable) -> list[str]:
    """Many restarts under a mixed load, each with a changed handler: none failed, none wrong."""
    with folder() as path, make(path) as server, Load(server.port, MIXED, seed) as load:
        took = restart_times(server, 10 if quick else 100)
        figures = load.end()
        log = server.log.read_text()
    print(f"{_times_of(took)}\n{shown(figures)}")
    found = faults(figures) + last_version(figures, server.version)
    if found:
        print("the log of the servers ends with:\n" + "\n".join(log.splitlines()[-LOG_LINES:]))
    return found


def stopped(quick: bool, seed: int) -> list[str]:
    """The same, stopped and started: the check of the checks. It holds if clients have lost something."""
    with_faults = restarts(True, seed, StoppedReqtable)
    lost = {each.partition(":")[0] for each in with_faults}
    return [f"the clients of {kind} noticed nothing" for kind, _, _ in MIXED if kind not in lost]


def rows(quick: bool, seed: int) -> list[str]:
    """Thousands of half-done rows move within a second, and a client freezes for 50 ms at most (goals)."""
    count = 500 if quick else 5000
    groups = [Group("half", count), Group("ping", 100, {"pause_s": 0.1})]
    with folder() as path, Reqtable(path) as server, Load(server.port, groups, seed) as load:
        load.figures()  # what comes from connecting
        time.sleep(2)
        quiet = load.figures()["ping"]
        memory = _memory_kib(server.first())
        began = time.monotonic()
        server.restart()
        took = time.monotonic() - began
        during = load.figures()["ping"]
        figures = load.end()
    print(f"{count} rows: the command took {took:.2f} s, and said: {server.said}; memory before {memory} KiB")
    for name, own in (("quiet", quiet), ("during", during)):
        print(
            f"  {name}: a ping p50 {own['p50_ms']:.1f} p99 {own['p99_ms']:.1f} max {own['max_ms']:.1f} ms; "
            f"the longest wait of a client p99 {own['silence_p99_ms']:.1f} ms"
        )
    print(shown(figures))
    return faults(figures) + last_version(figures, server.version)


def _memory_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def generations(quick: bool, seed: int) -> list[str]:
    """Churn of one-request connections over three generations: none is refused."""
    groups = [Group("churn", 24, {"pause_s": 0.001})]
    found: list[str] = []
    for round_ in range(1 if quick else 10):
        with folder() as path, Reqtable(path) as server, Load(server.port, groups, seed + round_) as load:
            took = restart_times(server, 3)
            figures = load.end()
        print(f"{_times_of(took)}\n{shown(figures)}")
        found += faults(figures) + last_version(figures, server.version)
    return found


def websockets(quick: bool, seed: int) -> list[str]:
    """Thousands of WebSockets stay open through a restart."""
    count = 500 if quick else 10_000
    groups = [Group("websocket", count, {"pause_s": count / 400})]
    with folder() as path, ReqtableWebSockets(path) as server, Load(server.port, groups, seed) as load:
        before = load.figures()
        took = restart_times(server, 1)
        during = load.figures()
        figures = load.end()
    print(f"{count} WebSockets, {_times_of(took)}; before, during and after:")
    print("\n".join(shown(each) for each in (before, during, figures)))
    return faults(figures)


def upload(quick: bool, seed: int) -> list[str]:
    """An upload goes on through a restart."""
    size = 50_000_000 if quick else 1_000_000_000
    groups = [Group("http-upload", 1, {"size": size, "rate": size / 20, "once": True})]
    with folder() as path, ReqtableHttp(path) as server, Load(server.port, groups, seed) as load:
        took: list[float] = []
        while not load.figures()["http-upload"]["answered"] and len(took) < 3:
            took += restart_times(server, 1)
        went_through = len(took) - bool(load.figures()["http-upload"]["answered"])
        figures = load.end()
    print(f"{size} bytes, through {went_through} of {_times_of(took)}\n{shown(figures)}")
    return faults(figures) + ([] if went_through else ["the upload was over before a restart was"])


class MiniRedis(Reqtable):
    """`examples/miniredis.py`: its data is no row, and moves by `save_state`."""

    handler = "MiniRedis"

    @staticmethod
    def write(path: Path, _: int) -> None:
        shutil.copy(ROOT / "examples" / "miniredis.py", path)


def redis(quick: bool, seed: int) -> list[str]:
    """The benchmark of Redis runs through restarts without noticing, and the data stays."""
    program = shutil.which("redis-benchmark")
    if program is None:
        return ["redis-benchmark is not installed: it is in the package redis-tools"]
    tests, requests = "ping,set,get,incr,lpush,lpop", 20_000 if quick else 200_000
    with folder() as path, MiniRedis(path) as server:
        kept = _redis(server.port, b"SET kept through-restarts")
        benchmark = subprocess.Popen(
            [program, "-p", str(server.port), "-t", tests, "-n", str(requests), "-P", "4", "--csv"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        took = []
        while benchmark.poll() is None and len(took) < 5:
            took += restart_times(server, 1)
        ran_through = benchmark.poll() is None
        said, _ = benchmark.communicate(timeout=10 * WAIT_S)
        after = _redis(server.port, b"GET kept")
    print(
        f"redis-benchmark -t {tests} -n {requests} -P 4: exit status {benchmark.returncode}, {_times_of(took)}\n{said}"
    )
    found = [f"redis-benchmark exits with {benchmark.returncode}"] if benchmark.returncode else []
    found += [f"it said: {line}" for line in said.splitlines() if re.search("error|reset|closed", line, re.IGNORECASE)]
    found += [] if (kept, after) == (b"+OK\r\n", b"$16\r\nthrough-restarts\r\n") else [f"the data: {kept!r} {after!r}"]
    return found + ([] if ran_through or len(took) > 1 else ["the benchmark was over before the first restart"])


def _redis(port: int, command: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), WAIT_S) as own:
        own.sendall(command + b"\r\n")
        return own.recv(4096)
