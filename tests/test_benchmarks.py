"""The servers that `make bench` compares do the same work, and docs/explanation/performance.md shows the figures."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatch
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks import instructions, profile, trace
from tests.benchmarks.http_servers import FILE_BYTES, HELLO
from tests.benchmarks.processes import CORES, Failed, Process, Server, Tools, cpu_of, tools
from tests.benchmarks.report import is_limited_by_load, limited, outcome, outcomes, page, ratio, rows, written
from tests.benchmarks.servers import ANSWER_BYTES, PEERS
from tests.benchmarks.work import GOALS, REASONS, WARM_UP, WORKS, Effort, Figures, Work
from tests.support import WAIT_S, slow_but

GET = b"GET /page.html HTTP/1.1\r\nHost: here\r\n\r\n"
MEASURED = json.loads(bench.FIGURES.read_text())
FLOOR = "floor"
COUNTING_S = 240  # a traced interpreter is slow, and so is callgrind
_TRIES = 6  # on a busy machine, the lines of clients come in several passes, which cost more: the least counts


# -- the same work ----------------------------------------------------------------------------------------------------


def connected(port: int, kind: str = "lines") -> socket.socket:
    client = socket.socket(type=socket.SOCK_DGRAM if kind == "datagrams" else socket.SOCK_STREAM)
    client.settimeout(WAIT_S)
    client.connect(("127.0.0.1", port))
    return client


def taken(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := client.recv(count - len(data))):
        data += more
    return data


def echoed(server: Server) -> None:
    """Check that three lines are echoed, one of which arrives in two parts."""
    with connected(server.port) as client:
        client.sendall(b"one\ntwo")
        assert taken(client, 4) == b"one\n"
        client.sendall(b" and more\nthree\n")
        assert taken(client, 19) == b"two and more\nthree\n"


def answered(server: Server) -> None:
    with connected(server.port) as client:
        client.sendall(b"one\ntwo\n")
        assert taken(client, 2 * ANSWER_BYTES) == (b"x" * (ANSWER_BYTES - 1) + b"\n") * 2


def datagrams_echoed(server: Server) -> None:
    with connected(server.port, "datagrams") as one, connected(server.port, "datagrams") as other:
        for text in (b"one", b"two\n"):
            for client in (one, other):
                client.send(text)
                assert client.recv(100) == text


def redis_answered(server: Server) -> None:
    with connected(server.port) as client:
        client.sendall(b"PING\r\n*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nvalue\r\n*2\r\n$3\r\nGET\r\n$1\r\nk\r\nNONE\r\n")
        expected = b"+PONG\r\n+OK\r\n$5\r\nvalue\r\n-ERR unknown command 'NONE'\r\n"
        assert taken(client, len(expected)) == expected


def forwarded(server: Server) -> None:
    """Check that both ways pass on what comes, and that either side can end first and still receive."""
    assert server.upstream is not None
    server.upstream.settimeout(WAIT_S)
    for is_client_first in (True, False):
        with connected(server.port) as client, server.upstream.accept()[0] as far:
            far.settimeout(WAIT_S)
            first, second = (client, far) if is_client_first else (far, client)
            first.sendall(b"one")
            assert taken(second, 3) == b"one"
            first.shutdown(socket.SHUT_WR)
            assert taken(second, 1) == b""
            second.sendall(b"two" * 100_000)
            second.shutdown(socket.SHUT_WR)
            assert taken(first, 300_001) == b"two" * 100_000


def published(server: Server) -> None:
    with connected(server.port) as one, connected(server.port) as other, connected(server.port) as publisher:
        for client in (one, other):
            client.sendall(b"sub\n")
            assert taken(client, 4) == b"sub\n"
        publisher.sendall(b"one\nother\n")
        for client in (one, other):
            assert taken(client, 10) == b"one\nother\n"
        one.close()
        publisher.sendall(b"third\n")
        assert taken(other, 6) == b"third\n"


def got(client: socket.socket, request: bytes, end: bytes) -> bytes:
    """Return the answer to a request, which ends with `end`."""
    client.sendall(request)
    data = b""
    while not data.endswith(end) and (more := client.recv(65_536)):
        data += more
    return data


def greeted(server: Server) -> None:
    """Check two answers on one connection, the second to a request that comes in two parts."""
    with connected(server.port) as client:
        for first, second in ((GET, b""), (GET[:20], GET[20:])):
            client.sendall(first)
            head, _, body = got(client, second, HELLO).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\ncontent-length: 5" in head.lower()
            assert body == HELLO


def greeted_or_more(server: Server) -> None:
    greeted(server)
    with connected(server.port) as client:
        client.sendall(GET.replace(b"/page.html", b"/large"))
        data = taken(client, 100)
        head = data.partition(b"\r\n\r\n")[0]
        assert b"\r\ncontent-length: 4000000" in head.lower()
        assert taken(client, 4_000_000 - 100 + len(head) + 4).strip(b"x") == b""


def file_sent(server: Server) -> None:
    with connected(server.port) as client:
        for _ in range(2):
            client.sendall(GET)
            head, _, body = got(client, b"", b"x" * FILE_BYTES).partition(b"\r\n\r\n")
            assert b"\r\ncontent-length: 10240" in head.lower()
            assert body == b"x" * FILE_BYTES


def websocket_echoed(server: Server) -> None:
    with connected(server.port) as client:
        asks = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in got(client, GET[:-2] + asks + key, b"\r\n\r\n")
        client.sendall(b"\x81\x85\0\0\0\0hello")
        assert taken(client, 7) == b"\x81\x05hello"


def events_sent(server: Server) -> None:
    with connected(server.port) as one, connected(server.port) as other, connected(server.port) as sender:
        for client in (one, other):
            got(client, GET.replace(b"/page.html", b"/events"), b"retry: 1000\n\n\r\n")
        head = b"POST /events HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\n"
        assert got(sender, head + b"one", b"sent to 2\n").endswith(b"sent to 2\n")
        for client in (one, other):
            assert b"id: 1\ndata: one\n\n" in got(client, b"", b"\n\n\r\n")


CHECKS: dict[str, Callable[[Server], None]] = {
    "lines": echoed,
    "answers": answered,
    "datagrams": datagrams_echoed,
    "redis": redis_answered,
    "same": echoed,
    "changing": echoed,
    "forward": forwarded,
    "forward-256": forwarded,
    "publish": published,
    "hello": greeted,
    "hello-large": greeted_or_more,
    "file": file_sent,
    "websocket": websocket_echoed,
    "events": events_sent,
}


def check(name: str, start: Callable[[str, str], Server], kinds: list[str]) -> None:
    """Start a server for each kind of work, then check each."""
    with ExitStack() as stack:
        for kind, server in [(kind, stack.enter_context(start(name, kind))) for kind in kinds]:
            CHECKS[kind](server)


@pytest.mark.parametrize("name", slow_but(PEERS, "reqtable-state", "reqtable-greenlet", "reqtable-async"))
def test_every_peer_gives_the_same_bytes(name: str) -> None:
    peer = PEERS[name]
    if peer.missing:
        pytest.skip(peer.missing)
    start = Tools("", "").server  # none of them is in C
    check(name, start, [kind for kind in CHECKS if peer.serves(kind)])


@pytest.fixture(scope="module")
def compiled() -> Iterator[Tools]:
    try:
        with tools() as made:
            yield made
    except Failed as problem:
        pytest.skip(str(problem))


def test_the_floor_gives_the_same_bytes(compiled: Tools) -> None:
    check(FLOOR, compiled.server, ["lines", "answers", "datagrams", "forward", "forward-256", "publish"])


# -- measured ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("echo-50", "udp", "redis-16", "forward-lines", "forward-bulk-10", "hello-8", "file-8"),
        *slow_but(["pipelined", "churn", "answers", "busy-10", "shutdown", "publish-16", "events", "idle-websockets"]),
        *slow_but(["idle", "takeover-changing", "snapshot"]),
    ],
)
def test_a_work_gives_its_figures(name: str, compiled: Tools) -> None:
    work = WORKS[name]
    ours = ("reqtable-state", "reqtable-http", "reqtable-wsgi-inline", "reqtable-takeover")
    peer = next(name for name in ours if name in work.names)
    if work.kind == "redis" and compiled.redis is None:
        pytest.skip("there is no redis-benchmark here")
    with compiled.server(peer, work.kind) as server:
        figures = work.measure(work, compiled, server, WARM_UP)
    assert list(rows(work, {peer: [figures]}))
    assert all(value >= 0 for value in figures.values())
    assert figures.get("requests", 1) > 0


def test_a_server_that_ends_is_said_to_have(compiled: Tools) -> None:
    work = WORKS["echo-1"]
    with compiled.server("reqtable-state", "lines") as server:
        server.end()
        server.process.wait()
        with pytest.raises(Failed, match="Connection refused"):
            work.measure(work, compiled, server, WARM_UP)
    with pytest.raises(Failed, match="KeyError: 'none'"):
        compiled.server("reqtable-state", "none")


# The most that a request may take in Python 3.11: bytecodes, instructions if 50 clients send at once, and instructions
# if one client sends alone. A change that makes a request cheaper lowers its bounds. `-pure` is without the C module.
BOUNDS: dict[tuple[str, str], tuple[int, int, int]] = {
    # kind of work, server                   bytecodes, instructions, alone
    ("lines", "reqtable-state"): (34, 6_000, 18_300),
    ("lines", "reqtable-state-pure"): (370, 19_000, 31_500),
    ("lines", "reqtable-async"): (134, 12_300, 25_200),
    ("lines", "reqtable-async-pure"): (434, 24_400, 37_000),
    ("lines", "reqtable-greenlet"): (348, 24_600, 37_200),
    ("lines", "reqtable-greenlet-pure"): (348, 24_800, 38_300),
    ("redis", "reqtable-state"): (716, 55_300, 56_200),
    ("redis", "reqtable-state-pure"): (787, 56_600, 57_400),
    ("hello", "reqtable-wsgi-inline"): (1_302, 101_500, 114_000),
    ("file", "reqtable-http"): (1_617, 177_000, 190_000),
}
HAS_C_MODULE = find_spec("reqtable._lean") is not None
only_3_11 = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bounds are those of Python 3.11")


@pytest.mark.slow
@pytest.mark.timeout(COUNTING_S)
def test_bytecodes_are_counted_and_not_sampled() -> None:
    bytecodes = profile.all_bytecodes()
    assert bytecodes == profile.all_bytecodes()
    own = {"reqtable-state": "State.echo", "reqtable-async": "Async.handle", "reqtable-greenlet": "Blocking.handle"}
    for peer, functions in bytecodes["lines"].items():
        assert functions[own[peer.removesuffix("-pure")]] >= 4
    assert 4 <= bytecodes["redis"]["reqtable-state"]["MiniRedis.get"] <= 16, "of one GET, though sixteen came at once"


@only_3_11
@pytest.mark.timeout(COUNTING_S)
def test_a_request_takes_at_most_so_many_bytecodes() -> None:
    counted = profile.all_bytecodes()
    for (kind, peer), (most, *_) in BOUNDS.items():
        if HAS_C_MODULE or peer.endswith("-pure"):
            assert sum(counted[kind][peer].values()) <= most, peer


@only_3_11
@pytest.mark.slow
@pytest.mark.timeout(_TRIES * COUNTING_S)
@pytest.mark.parametrize(("kind", "peer"), BOUNDS)
def test_a_request_takes_at_most_so_many_instructions(kind: str, peer: str) -> None:
    if why_not := instructions.missing():
        pytest.skip(why_not)
    if not HAS_C_MODULE and not peer.endswith("-pure"):
        pytest.skip("the C module is not built here")
    _, *bounds = BOUNDS[kind, peer]
    least = [inf, inf]
    for _ in range(_TRIES):
        found = instructions.instructions(kind, peer, core=CORES[0])
        least = [min(least[0], found["together"]), min(least[1], found["alone"])]
        if least[0] <= bounds[0] and least[1] <= bounds[1]:
            break
    assert least[0] <= bounds[0]
    assert least[1] <= bounds[1]


@pytest.mark.usefixtures("unchecked")
def test_calls_are_counted_and_not_sampled() -> None:
    found = trace.traced("inline")
    assert found == trace.traced("inline")
    calls = {phase: trace.figures(found[phase]) for phase in trace.PHASES}
    for count, files, across in calls.values():
        assert 0 < across < count
        assert 0 < files < count
    assert calls["line"][0] <= 20 < calls["accept"][0]


def test_what_children_take_is_their_parents() -> None:
    """One child has been reaped, and another child lives."""
    burn = "import time\nwhile time.process_time() < 0.1: pass\n"
    program = (
        f"import os, sys, time\nif not os.fork():\n exec({burn!r}); os._exit(0)\nos.wait()\n"
        f"if not os.fork():\n exec({burn!r}); print('burnt', flush=True); time.sleep(60)\nos.wait()"
    )
    with Process([sys.executable, "-c", program], sorted(os.sched_getaffinity(0))[0]) as process:
        assert process.line() == "burnt"
        cpu = cpu_of(process.pid)
    assert cpu.total >= 0.19
    assert cpu.user + cpu.system >= 0.1, "sampled: coarse"


def test_rounds_are_interleaved_and_who_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = "reqtable-state", "socketserver-threading", "asyncio-streams"
    done: list[str] = []
    told: list[str] = []

    class NoTools(Tools):
        @contextlib.contextmanager
        def server(self, peer: str, kind: str) -> Iterator[Any]:  # type: ignore[override]
            yield peer

    def measured(work: Work, compiled: Tools, peer: Any, effort: Effort) -> Figures:
        if effort is not WARM_UP:
            done.append(peer)
            if peer == two and done.count(two) == 2:
                raise Failed("it is tired")
        return figures(1)

    monkeypatch.setattr(bench, "tools", lambda: contextlib.nullcontext(NoTools("", "")))
    work = Work("some", "Some", measured, only=(one, two, three))
    found = bench.measure([work], list(PEERS), Effort(0, rounds=3), told.append)
    assert done == [one, two, three, two, three, one, three, one], "its third round is not begun"
    assert len(told) == 9
    assert {name: len(rounds) for name, rounds in found["works"]["some"].items()} == {one: 3, two: 1, three: 3}
    assert found["skipped"] == [f"some, {two}: it is tired"]


# -- reported ---------------------------------------------------------------------------------------------------------


def figures(cpu_s: float, load_s: float = 0.1) -> Figures:
    return {"requests": 1000, "wall_s": 1.0, "load_s": load_s, "cpu_s": cpu_s, "user_s": cpu_s, "system_s": 0.0}


def test_a_ratio_is_that_of_the_same_round() -> None:
    found = ratio([figures(1), figures(20), figures(3)], [figures(2), figures(20), figures(1)], "cpu_us")
    assert (found.median, found.least, found.most) == (1.0, 0.5, 3.0)


def test_where_the_load_works_as_much_as_the_server_the_run_says_so() -> None:
    busy = [figures(0.1, load_s=0.2)]
    assert is_limited_by_load(busy)
    assert not is_limited_by_load([figures(0.3, load_s=0.2)])
    run = {"works": {"echo-50": {"reqtable-state": busy, FLOOR: busy}}}
    assert limited(run) == ["* echo-50, reqtable-state: the load took as much processor time as the server"]


def test_goals_name_works_and_peers_that_there_are() -> None:
    for goal in GOALS:
        assert goal.peer in WORKS[goal.work].names
        assert not goal.over or goal.over in WORKS or goal.over in WORKS[goal.work].names
    assert all(work.baseline in work.names for work in WORKS.values())


def test_names_choose_works_and_peers() -> None:
    works, peers = bench.chosen(["echo-*", "reqtable-state"])
    assert [work.name for work in works] == ["echo-1", "echo-50", "echo-500"]
    assert peers == ["reqtable-state", "uvloop-protocol"], "the baseline comes with it"
    with pytest.raises(SystemExit, match="nobody is no work and no peer"):
        bench.chosen(["nobody"])


def test_the_page_is_what_its_figures_give() -> None:
    """If this fails, `make bench-page` writes the page again."""
    assert bench.DOCUMENT.read_text() == page(MEASURED)
    assert {each.goal for each in outcomes(MEASURED)} == set(GOALS)


def test_each_missed_goal_has_a_reason() -> None:
    """If this fails, add the reason to REASONS in tests/benchmarks/work.py."""
    assert [each.goal for each in outcomes(MEASURED) if each.missed and not each.goal.reason] == []
    places = [(goal.work, goal.peer, goal.over) for goal in GOALS]
    for key in REASONS:
        assert any(all(map(fnmatch, place, key)) for place in places), key


def test_no_goal_is_below_what_the_floor_reaches() -> None:
    below = [each.goal for each in outcomes(MEASURED) if each.floor and each.goal.most and each.goal.most < each.floor]
    assert below == []


def test_works_of_a_later_run_are_added_to_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "plot", lambda *_: "the chart")
    for name, text in (("FIGURES", written(MEASURED)), ("DOCUMENT", "")):
        monkeypatch.setattr(bench, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    later = tmp_path / "later"
    for commit in ("first", "second"):
        works = {"forward-lines": {"reqtable-state": [figures(1)], "asyncio-streams": [figures(2)]}}
        later.write_text(json.dumps(MEASURED | {"works": works, "commit": commit}))
        assert bench.add(later) == 0
    text = bench.DOCUMENT.read_text()
    assert "| reqtable-state | asyncio-streams | 0.6 × | 0.5 (0.5–0.5) × | met |" in text
    assert "| measured apart: forward-lines | " in text
    assert "at commit second" in text
    assert "at commit first" not in text
    assert set(json.loads(bench.FIGURES.read_text())["works"]) == {*MEASURED["works"], "forward-lines"}


def test_a_goal_that_is_not_met_is_said_so() -> None:
    goal = next(goal for goal in GOALS if goal.work == "echo-50" and goal.over == "uvloop-protocol")
    by_peer = {"reqtable-state": [figures(2)], "uvloop-protocol": [figures(1)], "asyncio-streams": [figures(4)]}
    run: dict[str, Any] = MEASURED | {"works": {"echo-50": by_peer}}
    text = page(run)
    assert "A state machine serves lines at 2 × the CPU of a uvloop protocol, and at 0.5 × the CPU of asyncio's" in text
    assert f"| {goal.text} | reqtable-state | uvloop-protocol | 0.8 × | 2 (2–2) × | **missed** (1) | – |" in text
    assert f"\n1. {goal.reason}\n" in text


def test_growth_is_held_against_the_growth_of_the_floor() -> None:
    goal = next(goal for goal in GOALS if goal.most is None)
    for own, is_met in ((3, True), (5, False)):
        by_size = ((goal.over, 1, 1), (goal.work, own, 4))
        works = {name: {"reqtable-state": [figures(one)], FLOOR: [figures(floor)]} for name, one, floor in by_size}
        found = outcome({"works": works}, goal)
        assert (found.floor, found.met, found.missed) == (4, is_met, not is_met)
