"""Workers killed under load, with takeover: each run prints its figures, and returns what does not hold."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.moving.load import Group, Load
from tests.moving.restarts import faults, folder, shown
from tests.moving.tally import WAIT_S, quantile
from tests.moving.versions import write_http, write_ledger
from tests.service import Service, is_sleeper

CONFIGURATION = "takeover = true\ntakeover_attempts = 1000\n"  # a step may be cut off by one kill after another
WORKERS = 2
REST_S = 0.3  # at most so long between a takeover and the next kill
AGAIN, AGAIN_S = 0.25, 0.15  # so many kills are followed by another at most so much later, during the takeover
SLOW_S = 0.5  # between two requests of a client: a thousand clients of two cores


def kills(quick: bool, seed: int) -> list[str]:
    """SIGKILL workers at random times, some of them while they take over: no byte is lost, repeated or wrong."""
    times, scale = (40, 10) if quick else (1000, 100)
    groups = [
        Group("talk", 4 * scale, {"pause_s": SLOW_S}),
        Group("half", 3 * scale + scale // 2),
        Group("pipeline", scale, {"pause_s": SLOW_S}),
        Group("churn", scale // 2, {"pause_s": SLOW_S}),
        Group("upload", scale // 2, {"pause_s": SLOW_S / 5}),
        Group("download", scale // 2, {"pause_s": SLOW_S / 5}),
    ]
    return _killed("ledger", "Ledger", write_ledger, groups, times, seed)


def web_kills(quick: bool, seed: int) -> list[str]:
    """SIGKILL workers that serve HTTP: kept connections, uploads, downloads."""
    groups = [
        Group("http-talk", 40, {"pause_s": 0.1}),
        Group("http-churn", 10, {"pause_s": 0.1}),
        Group("http-download", 10, {"pause_s": 0.05}),
        Group("http-upload", 10, {"pause_s": 0.05}),
    ]
    return _killed("web", "Shop", write_http, groups, 20 if quick else 200, seed)


def websocket_kills(quick: bool, seed: int) -> list[str]:
    """SIGKILL workers that serve WebSockets, between and inside of messages."""
    return _killed("web", "Echo", write_http, [Group("websocket", 100, {"pause_s": 0.1})], 20 if quick else 200, seed)


def _killed(
    module: str, handler: str, write: Callable[[Path, int], None], groups: list[Group], times: int, seed: int
) -> list[str]:
    """Serve a handler to `groups` of clients, and kill its workers so many times."""
    with folder() as path:
        write(path / f"{module}.py", 1)
        (path / "reqtable.toml").write_text(CONFIGURATION)
        with Service(
            "--config", str(path / "reqtable.toml"), workers=WORKERS, handler=f"{path}/{module}.py:{handler}"
        ) as service:
            service.wait_for("workers are ready")
            with Load(service.address[1], groups, seed) as load:
                began = time.monotonic()
                again = kill_times(service, times, random.Random(seed))
                took_s = time.monotonic() - began
                figures = load.end()
            lines = list(service.lines)
            service.signal(signal.SIGTERM)
            status = service.wait()
    took = sorted(int(found[1]) for each in lines if (found := re.search(r"took over .* in (\d+) ms", each)))
    rows = sum(int(found[1]) for each in lines if (found := re.search(r"took over (\d+) requests?", each)))
    print(
        f"  {times} kills in {took_s:.0f} s, {again} of them followed by one during the takeover; {len(took)} "
        f"takeovers of {rows} requests, {quantile(took, 0.5):.0f} ms at the median, {quantile(took, 1):.0f} ms at most"
    )
    print(shown(figures))
    lost = [each for each in lines if re.search("not continued|can't be|given up|a bug of", each)]
    return (
        faults(figures)
        + [f"the log says: {each}" for each in lost[:10]]
        + ([] if took else ["nothing was taken over"])
        + ([f"the supervisor ended with status {status}"] if status else [])
    )


def redis_killed(quick: bool, seed: int) -> list[str]:
    """The benchmark of Redis runs through kills of its server without noticing. The data is not kept."""
    program = shutil.which("redis-benchmark")
    if program is None:
        return ["redis-benchmark is not installed: it is in the package redis-tools"]
    tests, requests = "ping,set,get,incr,lpush,lpop", 20_000 if quick else 200_000
    with Service("--takeover", workers=1, handler="examples/miniredis.py:MiniRedis") as service:
        service.wait_for("workers are ready")
        benchmark = subprocess.Popen(
            [program, "-p", str(service.address[1]), "-t", tests, "-n", str(requests), "-P", "4", "--csv"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        killed = 0
        chance = random.Random(seed)
        while benchmark.poll() is None:
            killed += kill_times(service, 1, chance) >= 0
        said, _ = benchmark.communicate()
        lines = list(service.lines)
    print(
        f"  redis-benchmark -t {tests} -n {requests} -P 4: exit status {benchmark.returncode}, {killed} kills\n{said}"
    )
    found = [f"redis-benchmark exits with {benchmark.returncode}"] if benchmark.returncode else []
    found += [f"it said: {line}" for line in said.splitlines() if re.search("error|reset|closed", line, re.IGNORECASE)]
    found += [f"the log says: {each}" for each in lines if re.search("not continued|can't be|a bug of", each)]
    return found + ([] if killed > 1 else ["the benchmark was over before the second kill"])


def kill_times(service: Service, times: int, chance: random.Random) -> int:
    """Kill one worker after another. Returns how many were killed while a takeover was under way.

    Most wait for the takeover after the kill before, however slow this machine is. More than ten deaths in a row would
    have the supervisor give the requests up.
    """
    again = 0
    for _ in range(times):
        while not (victims := [pid for pid in service.workers() if not is_sleeper(pid)]):
            time.sleep(0.001)
        done = len(service.found("took over"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims), signal.SIGKILL)
        if chance.random() < AGAIN:
            again += 1
            time.sleep(chance.random() * AGAIN_S)
        else:
            service.comes("took over", done + 1, WAIT_S)
            time.sleep(chance.random() * REST_S)
    return again
