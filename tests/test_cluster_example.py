"""The example of docs/how-to/outgrow-one-machine.md: a Dask cluster, two servers, HAProxy, and what dies of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.simulated import Costs, measure
from examples.cluster.stamps import BITS_MAX, Stamps, is_stamp, mint
from reqtable.testing import Client as Script
from reqtable.testing import exercise
from tests.control import Operator
from tests.support import Client, Started, lines_before

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120.0  # these programs take seconds to start on a busy machine
ASKED = b"mint 10 b\n"
STAMP = b"%d\n" % mint(10, b"b")
needs_cluster = pytest.mark.skipif(
    shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin") is None, reason="HAProxy is not installed"
)


# -- the handler ------------------------------------------------------------------------------------------------------


def test_a_stamp_is_minted_and_checked() -> None:
    stamp = mint(8, b"a text")
    assert is_stamp(stamp, 8, b"a text")
    assert not any(is_stamp(each, 8, b"a text") for each in range(stamp))
    sent = b"mint 8 a text\ncheck %d 8 a text\ncheck %d 8 a text\nping\n" % (stamp, stamp + 1)
    exercise(Stamps, Script().send(sent).expect(b"%d\nyes\nno\npong\n" % stamp))


@pytest.mark.parametrize("wrong", [b"mint", b"mint 25 a", b"mint -1 a", b"check 1 a", b"mint 8", b"check 1 99 a", b""])
def test_a_line_that_is_no_command_is_answered_by_the_usage(wrong: bytes) -> None:
    usage = b"mint BITS TEXT, check STAMP BITS TEXT, or ping; BITS is at most %d\n" % BITS_MAX
    exercise(Stamps, Script().send(wrong + b"\n").expect(usage))


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_model_has_as_many_tasks_done_as_workers_and_scheduler_allow() -> None:
    few, many = (measure(workers, Costs(0.060, 0.002), clients=32, each=5) for workers in (4, 64))
    assert few.per_s == pytest.approx(4 / 0.060, rel=0.05), "each worker has always something to do"
    assert few.p50_s == pytest.approx(32 * 0.060 / 4, rel=0.1)
    assert many.per_s < 32 / 0.060, "never more than one task for each client"
    bound = measure(64, Costs(0.060, 0.010), clients=32, each=5)
    assert bound.per_s == pytest.approx(1 / 0.010, rel=0.1), "the scheduler takes them one after the other"


def test_the_model_is_the_same_each_time() -> None:
    first, second = (measure(3, Costs(0.060, 0.002), clients=8, each=4) for _ in range(2))
    assert first == second


# -- the programs -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together(folder: Path, workers: int = 2) -> Iterator[Any]:
    pytest.importorskip("distributed")
    from examples.cluster.together import Together

    with Together(folder, workers) as made:
        yield made


def ask(address: Any, lines: Iterable[bytes]) -> list[bytes]:
    """Ask over a new connection, one line after the other."""
    with contextlib.closing(Client(address)) as client:
        client.socket.settimeout(PATIENCE_S)
        return [client.ask(each) for each in lines]


def reqtable(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "reqtable", *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Asking:
    """Asks in threads, and keeps the answers."""

    def __init__(self, address: Any, count: int, lines: Callable[[], Iterable[bytes]]) -> None:
        self.answers: list[bytes] = []
        self._threads = [threading.Thread(target=self._ask, args=(address, lines)) for _ in range(count)]
        for each in self._threads:
            each.start()

    def _ask(self, address: Any, lines: Callable[[], Iterable[bytes]]) -> None:
        self.answers += ask(address, lines())

    def join(self) -> list[bytes]:
        for each in self._threads:
            each.join(PATIENCE_S)
            assert not each.is_alive()
        return self.answers


def states(made: Any) -> dict[str, list[str]]:
    """The states of the requests of each server."""
    found = {}
    for name in made.servers:
        _, body = Operator(made.control(name)).ask("/v1/requests")
        found[name] = [row["state"] for row in json.loads(body)]
    return found


def are_out(made: Any) -> int:
    """How many requests wait for the cluster."""
    return sum(each.count("OFFLOADED") for each in states(made).values())


@contextlib.contextmanager
def paused(parts: list[Any]) -> Iterator[None]:
    """Stop these programs during the block, so that no task ends meanwhile."""
    for each in parts:
        each.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for each in parts:
            each.process.send_signal(signal.SIGCONT)


def until(condition: Any) -> None:
    """Look again and again; each look asks another program."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end


@needs_cluster
@pytest.mark.slow
def test_a_worker_killed_under_load_delays_its_requests_and_fails_none(tmp_path: Path) -> None:
    with together(tmp_path) as made:
        with paused(made.workers):
            asking = Asking(made.address, 6, lambda: [ASKED, b"ping\n"])
            until(lambda: are_out(made) == 6)
            assert all(states(made).values()), "HAProxy gives some to each server"
            made.workers[0].process.kill()
        assert sorted(asking.join()) == sorted([STAMP, b"pong\n"] * 6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_connection_that_fails_in_any_way_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from examples.cluster import executor

    class Closed:
        status = "closed"

    tried: list[str] = []

    def client(address: str, **_: Any) -> Closed:
        tried.append(address)
        if len(tried) == 2:
            raise RuntimeError("can't start new thread")
        return Closed()

    monkeypatch.setattr(executor, "Client", client)
    cluster = executor.Cluster("tcp://gone")

    def has_tried_again() -> bool:
        with pytest.raises(ConnectionError):
            cluster.submit(len, "")
        return len(tried) > 2

    until(has_tried_again)


@needs_cluster
@pytest.mark.slow
def test_a_dead_scheduler_is_an_error_for_each_request_until_it_is_back(tmp_path: Path) -> None:
    with together(tmp_path, workers=1) as made:
        with paused(made.workers):
            asking = Asking(made.address, 2, lambda: [ASKED, b"ping\n"])
            until(lambda: are_out(made) == 2)
            made.scheduler.process.kill()
            made.scheduler.process.wait(PATIENCE_S)
        gone = b"failed: call(mint) was cancelled by its executor, 'cluster'\n"
        answers = asking.join()
        assert sorted(answers) == sorted([gone, b"pong\n"] * 2), answers
        away = b"failed: the scheduler of the cluster, %b, is away\n" % made.scheduler_address.encode()
        assert ask(made.address, [b"mint 8 b\n", b"check 5 8 b\n"]) == [away, b"no\n"]
        made.workers[0].process.wait(PATIENCE_S)  # a worker without a scheduler ends
        made.start_scheduler()
        made.start_worker("worker-2").says("(Registered to)")
        stamp = b"%d\n" % mint(8, b"b")
        until(lambda: [ask(made.address, [b"mint 8 b\n"]) for _ in made.servers] == [[stamp]] * 2)  # in each server


@needs_cluster
@pytest.mark.slow
def test_a_server_is_restarted_and_one_dies_behind_haproxy(tmp_path: Path) -> None:
    with together(tmp_path) as made:
        restarted = threading.Event()

        def lines() -> Iterator[bytes]:
            while not restarted.is_set():
                yield ASKED
            yield from [ASKED] * 2

        asking = Asking(made.address, 4, lines)
        try:
            until(lambda: all(states(made).values()))
            assert "moved to process" in reqtable("restart", "--control", str(made.control("a")))
        finally:
            restarted.set()
        answers = asking.join()
        assert len(answers) >= 12
        assert set(answers) == {STAMP}, "no request has failed"
        os.killpg(made.servers["b"].pid, signal.SIGKILL)
        made.servers["b"].process.wait(PATIENCE_S)
        assert ask(made.address, [b"ping\n", ASKED]) == [b"pong\n", STAMP]


@needs_cluster
@pytest.mark.slow
def test_one_command_starts_all_of_it_and_ctrl_c_ends_all_of_it() -> None:
    pytest.importorskip("distributed")
    command = [sys.executable, "-m", "examples.cluster", "--port", "0", "--workers", "1"]
    with Started(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            printed = lines_before("Ctrl-C ends all of them.\n", process.stdout)
            pids = [int(found) for line in printed for found in re.findall(r"process (\d+)", line)]
            assert len(pids) == 5, printed
            [port] = [int(line.split()[1].rpartition(":")[2]) for line in printed if line.startswith("HAProxy")]
            assert ask(("127.0.0.1", port), [b"mint 8 b\n"]) == [b"%d\n" % mint(8, b"b")]
            [watch] = [line.split()[2:] for line in printed if line.startswith("Watch:")]
            assert "in all servers" in reqtable(*watch, "--once")
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
