"""The load of `make moving` loses no failure: servers that fail in each way, and the figures that must say so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.moving import clients, restarts
from tests.moving.clients import KINDS, Shared
from tests.moving.load import Group, Load
from tests.moving.restarts import faults
from tests.moving.servers import StoppedReqtable
from tests.moving.tally import Tally
from tests.service import state_of

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def seen(kind: str, serve: Serve | None, requests: int = 3, **options: Any) -> Tally:
    """Run one client until it has made some requests. Returns what it has seen."""

    async def run() -> Tally:
        connections = set()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(writer)
            assert serve is not None
            await serve(reader, writer)

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if serve is None:
            server.close()
        shared = Shared(port, asyncio.Event(), asyncio.Semaphore(1), options={"pause_s": 0, **options})
        client = KINDS[kind](shared, "only", 1)

        async def converse() -> None:
            await KINDS[kind].converse(client)

        client.converse = counting(shared, converse, requests)  # type: ignore[method-assign]
        await client.run()
        for writer in connections:
            writer.transport.abort()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)
        return shared.tally

    return asyncio.run(run())


def counting(shared: Shared, converse: Callable[[], Awaitable[None]], most: int) -> Callable[[], Awaitable[None]]:
    async def count() -> None:
        try:
            await converse()
        finally:
            if shared.tally.asked >= most or shared.tally.closed:
                shared.over.set()

    return count


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "AFTER_FAILURE_S", 0)


def found(tally: Tally) -> dict[str, int]:
    figures = tally.figures()
    assert figures["unaccounted"] == 0
    return figures["failures"]


def replying(reply: bytes, then_closes: bool = True) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(reply)
        if then_closes:
            writer.close()

    return serve


async def resetting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)  # the rest is unread: the close is a reset
    writer.transport.abort()


LINE_KINDS = ["ping", "talk", "churn", "pipeline"]


@pytest.mark.parametrize("kind", [*LINE_KINDS, "upload", "download", "half", "http-talk", "http-churn", "websocket"])
def test_a_server_that_is_not_there_refuses(kind: str) -> None:
    assert found(seen(kind, None)) == {"refused": 3}


@pytest.mark.parametrize("kind", LINE_KINDS)
@pytest.mark.parametrize("reply", [b"", b"1 2"])
def test_an_end_without_a_whole_answer_is_seen(kind: str, reply: bytes) -> None:
    failures = found(seen(kind, replying(reply)))
    assert failures.get("eof", 0) + failures.get("reset", 0) >= 1
    assert set(failures) <= {"eof", "reset"}


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_a_reset_is_seen(kind: str) -> None:
    assert set(found(seen(kind, resetting))) <= {"eof", "reset"}


@pytest.mark.parametrize("kind", LINE_KINDS)
def test_another_answer_is_wrong(kind: str) -> None:
    assert set(found(seen(kind, replying(b"2 7 7 1\n", then_closes=False)))) == {"wrong"}


def test_bytes_after_the_last_answer_are_wrong() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = (await reader.readline()).split()[1]
        writer.write(b"1 %b %b 1\nmore" % (number, number))
        writer.close()

    assert found(seen("churn", serve)) == {"wrong": 3}


def test_a_version_that_goes_back_is_wrong() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        total, last, version = 0, [], 5
        while line := await reader.readline():
            last.append(int(line.split()[1]))
            total += last[-1]
            writer.write(b"%d %d %s %d\n" % (len(last), total, ",".join(map(str, last)).encode(), version))
            version -= 1

    tally = seen("ping", serve)
    assert found(tally) == {"wrong": 1}
    assert "version b'4' came after 5" in tally.examples[0]


def test_a_server_that_does_not_answer_stalls_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "WAIT_S", 0.05)
    tally = seen("ping", replying(b"", then_closes=False))
    assert set(found(tally)) == {"stalled"}


def test_a_kept_connection_that_ends_between_requests_loses_none() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        text = path.rpartition(b"/")[2]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        writer.close()

    tally = seen("http-talk", serve, pause_s=0.1)
    assert found(tally) == {}
    assert (tally.closed, tally.asked, tally.answered) == (1, 1, 1)


def test_a_mistake_of_a_client_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a mistake")

    monkeypatch.setattr(clients.LineClient, "check", fail)
    assert found(seen("ping", replying(b"", then_closes=False), requests=2)) == {"other: LookupError('a mistake')": 1}


def test_a_request_that_nobody_counts_is_seen() -> None:
    tally = Tally()
    tally.asked += 1
    assert faults({"ping": tally.figures()}) == ["ping: 1 unaccounted", "ping: no answer"]


@pytest.mark.slow
def test_the_load_notices_that_a_server_was_stopped_and_started(tmp_path: Path) -> None:
    with StoppedReqtable(tmp_path) as server, Load(server.port, restarts.MIXED, 1) as load:
        server.restart()
        figures = load.end()
        pids = server.processes()
    assert {each.partition(":")[0] for each in faults(figures)} >= {
        kind for kind, _, _ in restarts.MIXED if kind != "churn"
    }
    assert [state_of(pid) for pid in pids] == ["X"]


@pytest.mark.slow
def test_the_load_finds_nothing_wrong_with_a_server_that_stays(tmp_path: Path) -> None:
    with StoppedReqtable(tmp_path) as server, Load(server.port, [*restarts.MIXED, Group("half", 20)], 1) as load:
        figures = load.end()
    assert faults(figures) == []
    assert all(own["answered"] == own["asked"] > 0 for own in figures.values())
