"""Attacks on the control API: wrong values, floods, and clients that send what harms an operator."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import reqtable
from reqtable import Config, ControlOptions
from reqtable.control import detail, jobs, operations
from reqtable.control.detail import deep_size
from reqtable.control.jobs import PAUSE, Job, Turns
from reqtable.control.listening import LIMITS
from reqtable.control.operations import Target
from reqtable.control.workers import STUCK, Caller
from reqtable.run.commands import shown
from reqtable.table.addresses import printable
from reqtable.table.table import Entry
from tests.control import Operator
from tests.fuzz_control import World, fuzz
from tests.support import Client, serving
from tests.test_control import Store, clients, controlled
from tests.test_control_workers import supervised
from tests.test_page import paged, port_in


def test_requests_that_no_operator_should_send() -> None:
    """`make fuzz` sends more."""
    assert fuzz(range(300)) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"older": None}, "everything would be cancelled"),
        ({"sort": "age", "limit": 1}, "a cancel has no sort, limit or also"),
        ({"older": 0, "sort": "age"}, "a cancel has no sort, limit or also"),
        ({"older": 0, "dry_run": 0}, "dry_run=0: give true or false"),
        ({"older": 0, "dry_run": None}, "dry_run=None: give true or false"),
        ({"older": True}, "older=True: give a number"),
        ({"older": 0, "max": "many"}, "max=many: give a number"),
        ({"older": 0, "max": 10**15}, "max=1000000000000000: give a number"),
        ({"ids": 1}, "ids must be a list"),
        ({"ids": [1.9]}, "1.9 is not the id"),
        ({"ids": [True]}, "True is not the id"),
        ({"ids": ["\u0661"]}, "is not the id"),
        ({"ids": [10**18]}, "1000000000000000000 is not the id"),
    ],
)
def test_a_cancel_that_is_not_clear_ends_nothing(tmp_path: Path, body: Any, words: str) -> None:
    with controlled(tmp_path) as (server, operator), clients(server, 1) as [client]:
        operator.rows_once(len)
        status, answer = operator.ask("/v1/requests/cancel", "POST", body)
        assert status == 400
        assert words in json.loads(answer)["error"]
        assert client.ask(b"still\n") == b"still\n"


def test_the_name_of_a_logger_is_bounded(tmp_path: Path) -> None:
    """`logging` keeps a placeholder for each dot in a name: the square of its length in memory."""
    with controlled(tmp_path) as (_, operator):
        status, answer = operator.ask("/v1/log-level", "PUT", {"logger": "." * 1000, "level": "info"})
        assert (status, json.loads(answer)["error"]) == (400, "logger: give the name of a logger, such as reqtable")


# -- floods -----------------------------------------------------------------------------------------------------------


def test_all_jobs_together_hold_a_pass_for_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(jobs, "perf_counter", lambda: next(ticks) * jobs.SLICE_S / 10)
    posts: list[Callable[[], Any]] = []
    turns = Turns(posts.append)
    runs: list[int] = []

    def work(number: int, job: Job) -> Iterator[Any]:
        while True:
            runs.append(number)
            while not job.is_spent:
                pass
            yield PAUSE

    def brief(number: int) -> Iterator[Any]:
        runs.append(number)
        yield number

    made = [Job(turns) for _ in range(6)]
    for number, job in enumerate(made):
        job.begin(work(number, job) if number < 3 else brief(number)).pull(id)
    passes = []
    for _ in range(5):
        runs.clear()
        [run] = posts
        posts.clear()
        run()
        passes.append(tuple(runs))
    assert passes == [(0,), (1,), (2,), (3, 4, 5, 0), (1,)]


@contextlib.contextmanager
def operators(world: World, count: int, asked: bytes) -> Iterator[list[socket.socket]]:
    """Have `count` operators send the same at once."""
    made = []
    try:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            theirs.send(asked)
            world.control.offer(ours)
            made.append(theirs)
        yield made
    finally:
        for each in made:
            each.close()
        world.run(count)
        world.close()


def answered(operators: list[socket.socket]) -> list[int]:
    """Return how many answers each operator has got since it looked last."""
    counts = []
    for each in operators:
        try:
            counts.append(each.recv(1_000_000).count(b" 200 OK"))
        except BlockingIOError:
            counts.append(0)
    return counts


def test_a_pass_serves_few_operators_and_each_has_its_turn() -> None:
    world = World()
    with operators(world, 50, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as made:
        total = [0] * 50
        for _ in range(50):
            world.run(1)
            counts = answered(made)
            assert sum(counts) <= 4
            total = [one + more for one, more in zip(total, counts, strict=True)]
        assert total == [1] * 50


@pytest.mark.parametrize("query", [{}, {"sort": "age"}])
def test_an_operator_who_reads_slowly_keeps_no_request(query: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "BATCH_ROWS", 2)
    world = World()
    world.clients += [world.client() for _ in range(20)]
    table = world.engine.table
    assert len(table) == 23
    known = {id(entry) for entry in table}
    batches = operations.requests(Target(world.engine, world.operator), query, Job(Turns(world.engine.post)))
    assert len(next(each for each in batches if each is not PAUSE)) == 2
    for client in world.clients:
        client.close()
    world.run(5)
    gc.collect()
    assert len(table) == 0
    assert sum(type(each) is Entry and id(each) in known for each in gc.get_objects()) <= 1
    assert [each for each in batches if each is not PAUSE] == []
    world.close()


def test_a_flood_of_a_port_takes_no_room_from_the_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reqtable.control")
    path = str(tmp_path / "c.sock")
    config = Config(control=ControlOptions(socket=path, page="127.0.0.1:0"))
    with serving(reqtable.TCPServer(("127.0.0.1", 0), Store, config=config)), contextlib.ExitStack() as made:
        page = "127.0.0.1", port_in(caplog)
        for _ in range(LIMITS.entries_max):
            watching = made.enter_context(Client(page))
            watching.send(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert watching.line() == b"HTTP/1.1 200 OK\r\n"
        assert Operator(path).get("/v1/requests") == []


# -- a page of another site -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/v1/events", "/v1/requests", "/v1/stats"])
def test_another_site_can_not_have_a_browser_ask(caplog: pytest.LogCaptureFixture, target: str) -> None:
    """A picture or a script of another site comes without Origin, but with Sec-Fetch-Site."""
    with paged(caplog) as (_, visitor):
        for site in ("cross-site", "same-site"):
            fields = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
            assert visitor.ask(target, **fields)[0] == 403
        assert visitor.ask("/", **{"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})[0] == 200  # a link
        assert visitor.ask("/v1/stats", **{"sec-fetch-site": "same-origin"})[0] == 200
        assert visitor.ask("/v1/stats", **{"sec-fetch-site": "none"})[0] == 200  # typed by the user


# -- what a client chooses --------------------------------------------------------------------------------------------


@dataclass
class Held:
    data: bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"x" * 10_000_000, "b'" + "x" * 50),
        (bytearray(10_000_000), "bytearray(b'"),
        ("\x1b[2J" * 1_000_000, r"'\x1b[2J"),
        (10**5000, "<int, which fails to describe itself>"),
        (dict.fromkeys(range(100_000)), "<dict of "),
        ([0] * 1_000_000, "<list of 80000"),
        (Held(b"x" * 10_000_000), "<Held of 10000"),
        ("\udcff\u202e", r"'\udcff\u202e'"),
        ([1, "\u202e"], r"[1, '\u202e']"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_field_of_any_size_has_a_short_text(value: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Mock(wraps=sys.getsizeof)
    monkeypatch.setattr(sys, "getsizeof", measured)
    found = printable(detail._text_of(value))
    assert found.startswith(text)
    assert len(found) < 1000
    assert measured.call_count <= 1000


def test_the_size_of_fields_is_measured_to_a_bound() -> None:
    table = [[None] * 100_000 for _ in range(10)]
    assert 8_000_000 < deep_size(table) < 9_000_000
    assert deep_size(list(map(str, range(100_000)))) < 1_000_000


def test_a_line_is_cut_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Mock(wraps=shown.width_of)
    monkeypatch.setattr(shown, "width_of", measured)
    assert shown.cut("é" * 100_000, 80) == "é" * 79 + "…"
    assert shown.cut("字" * 100_000, 80) == "字" * 39 + "…"
    assert shown.cut("字" * 40, 80) == "字" * 40
    assert measured.call_count < 200


# -- a worker that does not read --------------------------------------------------------------------------------------


def test_a_worker_that_does_not_read_is_asked_no_more() -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(reqtable.Engine()) as engine, theirs:
        engine.loop.open()
        caller = Caller(engine, ours)
        for _ in range(100):
            caller.ask("cancel", {"ids": [2**40] * 10_000})
        assert len(caller.line._leaving) < 2**20 + 200_000
        found: list[Any] = []
        asking = caller.ask("stats", {})
        asking.pull(found.append)
        asking.close()
        engine.loop.run_once(0)
        assert found == [STUCK]
        caller.line.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers without fork()")
def test_a_worker_that_was_stuck_misses_no_change(tmp_path: Path) -> None:
    """The supervisor shows the new value, so no worker may go on by the old one."""
    with supervised(tmp_path, workers=2) as (service, operator):
        stuck = service.workers()[0]
        os.kill(stuck, signal.SIGSTOP)
        try:
            operator.post("/v1/config", {"limits.entries_max": 77}, method="PATCH")
            operator.post("/v1/drain", {"stay": True})
        finally:
            os.kill(stuck, signal.SIGCONT)
        while len(found := operator.get("/v1/stats")["workers"]) < 2:
            pass  # it has not gone on yet; pytest-timeout is the backstop
        assert [(each["entries_max"], each["is_draining"]) for each in found] == [(77, True)] * 2
