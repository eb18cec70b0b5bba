"""The metrics of several workers: sums that never go down, whatever becomes of the workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reqtable import Engine
from reqtable.control.figures import METRICS
from reqtable.control.joining import joined
from reqtable.control.line import Line
from reqtable.control.totals import Totals
from reqtable.control.workers import Gathered
from tests.scraping import Samples, ask, scraped, value, whole
from tests.service import WAIT_S, Service, state_of

ACCEPTED = "reqtable_requests_accepted_total"
RESTARTS = "reqtable_worker_restarts_total"
GROWING = {name for name, each in METRICS.items() if each.only_grows}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "c.sock")


@pytest.fixture
def service(path: str, tmp_path: Path) -> Iterator[Service]:
    file = tmp_path / "r.toml"
    file.write_text(f'[control]\nsocket = "{path}"\nmetrics = "127.0.0.1:0"\n')
    with Service("--config", str(file)) as service:
        service.wait_for("2 of 2 workers are ready")
        yield service


def shown(path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ask(path, "/v1/workers")[1])
    return found


def wait_for_others(path: str, former: set[int]) -> set[int]:
    """Wait until the supervisor has two workers that serve, and none of the former ones. Returns their pids."""
    until = time.monotonic() + WAIT_S
    while True:
        workers = shown(path)
        pids = {each["worker"] for each in workers}
        if len(pids) == 2 and not pids & former and all(each["phase"] == "serving" for each in workers):
            return pids
        assert time.monotonic() < until, workers


def falls(before: Samples, after: Samples) -> list[Any]:
    """Return the samples that have become smaller, or have gone, although they may only grow."""

    def grows(name: str) -> bool:
        return name in GROWING or name.rpartition("_")[0] in GROWING

    return [key for key, number in before.items() if grows(key[0]) and not after.get(key, -1) >= number]


def ask_times(service: Service, times: int) -> None:
    for number in range(times):
        assert service.ask(f"echo {number}").endswith(f" {number}")


def test_sums_survive_workers_that_are_replaced_killed_or_stuck(service: Service, path: str) -> None:
    pids = wait_for_others(path, set())
    ask_times(service, 10)
    seen = [scraped(path)[1]]
    assert value(seen[-1], ACCEPTED) == 10
    assert value(seen[-1], "reqtable_workers", state="serving") == 2

    ask_times(service, 5)  # nobody looks before these workers end: they say it themselves
    service.reload()
    pids = wait_for_others(path, pids)
    seen.append(scraped(path)[1])
    assert value(seen[-1], ACCEPTED) == 15
    assert whole(seen[-1], "reqtable_request_duration_seconds_count") == 15
    assert value(seen[-1], RESTARTS, reason="reload") == 2
    assert value(seen[-1], "reqtable_config_reloads_total", result="applied") == 1

    victim, other = sorted(pids)
    os.kill(victim, signal.SIGKILL)
    service.wait_for(f"worker {victim} was killed by SIGKILL")
    [third] = wait_for_others(path, {victim}) - {other}
    seen.append(scraped(path)[1])
    assert value(seen[-1], ACCEPTED) == 15
    assert value(seen[-1], RESTARTS, reason="crashed") == 1

    assert ask(path, "/v1/drain", "POST", json.dumps({"worker": other}).encode())[0] == 200
    pids = wait_for_others(path, {other})
    seen.append(scraped(path)[1])
    assert value(seen[-1], RESTARTS, reason="asked") == 1

    os.kill(third, signal.SIGSTOP)
    until = time.monotonic() + WAIT_S
    while state_of(third) != "T":
        assert time.monotonic() < until
    try:
        assert ask(path, "/readyz") == (200, "ready\n"), "the other one is"
        seen.append(scraped(path)[1])
        assert value(seen[-1], "reqtable_workers", state="stuck") == 1
        assert value(seen[-1], ACCEPTED) == 15
    finally:
        os.kill(third, signal.SIGCONT)
    seen.append(scraped(path)[1])
    assert value(seen[-1], "reqtable_workers", state="stuck") == 0

    for before, after in pairwise(seen):
        assert falls(before, after) == []
    places = {dict(labels)["worker"] for samples in seen for name, labels in samples if name == "reqtable_requests"}
    assert places == {"1", "2"}, "six processes, but never more than two at a time"


def test_not_ready_without_a_worker_that_answers(service: Service, path: str) -> None:
    pids = wait_for_others(path, set())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert ask(path, "/readyz") == (503, "not ready\n")
        assert ask(path, "/healthz") == (200, "ok\n")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert ask(path, "/readyz") == (200, "ready\n")


def test_tcp_is_the_supervisors(service: Service, path: str) -> None:
    [port] = service.wait_for(r"control: listening on 127.0.0.1:(\d+)")
    place = ("127.0.0.1", int(port[1]))
    ask_times(service, 3)
    assert value(scraped(place)[1], ACCEPTED) == 3
    assert ask(place, "/v1/workers")[0] == 404
    for pid in wait_for_others(path, set()):
        inodes = {os.readlink(each.path) for each in os.scandir(f"/proc/{pid}/fd")}
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        [own] = [row[9] for row in rows if row[1].endswith(f":{place[1]:04X}") and row[3] == "0A"]
        assert f"socket:[{own}]" not in inodes, "a worker would keep the port after the supervisor's end"


def test_what_a_worker_said_before_it_hung_up_is_heard() -> None:
    ours, theirs = socket.socketpair()
    engine = Engine()
    engine.loop.open()
    heard: list[Any] = []
    line = Line(engine.loop.poller, ours, heard.append, lambda: heard.append("end"))
    other = Line(engine.loop.poller, theirs, heard.append, lambda: None)
    figures = {"reqtable_requests_accepted_total": {(): 5}}
    other.say([1, "batch", 7])
    other.say_last([0, "last", figures], WAIT_S)
    line.say("the other end can't take this")
    assert heard == [[1, "batch", 7], [0, "last", figures], "end"]
    assert not line.is_open
    engine.close()


class Answers:
    """Stands in for an operation of a worker that answers with `batches`, and then with nothing more."""

    def __init__(self, *batches: Any) -> None:
        self.batches = list(batches)
        self.is_closed = False

    def pull(self, then: Any, patient: bool = False) -> None:
        if self.batches:
            then(self.batches.pop(0))

    def close(self) -> None:
        self.is_closed = True


def test_one_answer_that_is_enough_is_not_kept_waiting() -> None:
    askings: list[Any] = [Answers([False]), Answers(), Answers([True])]
    found: list[Any] = []
    Gathered(askings, joined, is_enough=any).pull(found.append)
    assert found == [[False, True]]
    assert all(each.is_closed for each in askings), "a worker keeps no work that nobody waits for"


def test_a_worker_that_does_not_answer_keeps_its_place_in_the_labels() -> None:
    class Serving:
        phase_name = "serving"
        caller = SimpleNamespace(last_words=None, line=SimpleNamespace(is_open=True))

        def __init__(self, pid: int) -> None:
            self.pid = pid

    def places(*pids: int) -> set[tuple[str, ...]]:
        figures = {"reqtable_requests": {("READING", "Echo", "Server", "1"): 1}}
        return set(totals.whole([[{"worker": pid, "figures": figures}] for pid in pids])["reqtable_requests"])

    workers = [Serving(pid) for pid in (11, 12, 13)]
    supervisor = SimpleNamespace(workers=workers, restarts=Counter(), reloads=Counter(), phases=())
    supervisor.restart = SimpleNamespace(counts=Counter())
    totals = Totals(supervisor)
    assert places(11, 13) == {("READING", "Echo", "Server", place) for place in "13"}
    assert places(11, 12, 13) == {("READING", "Echo", "Server", place) for place in "123"}
    totals.left(workers.pop(0))
    workers.append(Serving(14))
    assert places(12, 13) == {("READING", "Echo", "Server", place) for place in "23"}
    assert places(12, 13, 14) == {("READING", "Echo", "Server", place) for place in "123"}
