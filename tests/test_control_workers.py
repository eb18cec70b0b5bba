"""The control API with workers: the supervisor asks all of them, and shows the one that is stuck."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reqtable.control.joining import summed
from tests.control import Operator, UnixConnection
from tests.service import Service
from tests.support import Client

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers without fork()")


@contextlib.contextmanager
def supervised(folder: Path, workers: int = 3) -> Iterator[tuple[Service, Operator]]:
    """Serve with workers and a control socket, once all workers are ready."""
    path = str(folder / "c.sock")
    environment = {**os.environ, "REQTABLE_CONTROL": path}
    with Service(workers=workers, handler="tests/stuck.py:Stuck", env=environment) as service:
        service.wait_for(f"{workers} of {workers} workers are ready")
        yield service, Operator(path)


@contextlib.contextmanager
def spread(service: Service, operator: Operator, workers: int) -> Iterator[dict[int, tuple[int, Client]]]:
    """Connect clients until each worker has one. Yields, for each worker, the id of a request and its client."""
    with contextlib.ExitStack() as stack:
        found: dict[int, tuple[int, Client]] = {}
        made: dict[str, Client] = {}
        while len(found) < workers:
            client = stack.enter_context(Client(service.address))
            client.ask(b"hello\n")
            made[f"127.0.0.1:{client.socket.getsockname()[1]}"] = client
            for row in operator.get("/v1/requests"):
                found.setdefault(row["worker"], (row["id"], made[row["peer"]]))
        yield found


def test_rows_of_all_workers_have_ids_of_their_own(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator), spread(service, operator, 3) as found:
        rows = operator.get("/v1/requests?sort=age")
        assert {row["worker"] for row in rows} == set(service.workers())
        ids = [row["id"] for row in rows]
        assert len({*ids}) == len(ids)
        assert all(id < 2**53 for id in ids)
        assert {id // 10**10 for id in ids} == {1, 2, 3}
        ages = [row["age_s"] for row in rows]
        assert ages == sorted(ages, reverse=True)
        assert [row["id"] for row in operator.get("/v1/requests?sort=id&limit=2")] == sorted(ids)[:2]
        assert len(operator.get("/v1/requests?limit=2")) == 2
        assert {row["server"] for row in rows} == {"Stuck"}
        worker = rows[0]["worker"]
        assert {row["worker"] for row in operator.get(f"/v1/requests?worker={worker}")} == {worker}
        assert operator.get("/v1/requests?by=handler_state") == [
            {"handler_state": "command", "count": len(rows), "buffered": 0}
        ]
        assert operator.get("/v1/stats")["entries"] == len(rows)
        for worker, (id, _) in found.items():
            assert operator.get(f"/v1/requests/{id}")["worker"] == worker
        assert operator.ask("/v1/requests/1")[0] == 404


def test_the_figures_of_one_worker_and_of_none(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1) as (service, operator), Client(service.address) as client:
        client.ask(b"hello\n")
        found = operator.get("/v1/stats")
        assert [each["worker"] for each in found["workers"]] == service.workers()
        assert (found["entries"], found["workers"][0]["entries"]) == (1, 1)
        release = tmp_path / "release"
        client.send(b"stick %b\n" % os.fsencode(release))
        try:
            while (found := operator.get("/v1/stats"))["workers"]:
                pass  # the line has not reached the worker yet
            assert (found["entries"], found["loop"]["passes"], found["servers"]) == (0, 0, [])
        finally:
            release.touch()


def test_one_request_is_cancelled_and_only_it(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator), spread(service, operator, 3) as found:
        [(id, client), *others] = found.values()
        assert operator.post("/v1/requests/cancel", {"ids": [id, 17]}) == {
            "cancelled": [id],
            "missing": [17],
            "goes_on": [],
            "call_threads": None,
        }
        assert client.rest() == b""
        for _, other in others:
            assert other.ask(b"still\n") == b"still\n"


def test_a_stuck_worker_is_shown_with_its_stack_and_the_others_answer(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator), spread(service, operator, 3) as found:
        worker, (id, client) = next(iter(found.items()))
        release = tmp_path / "release"
        client.send(b"stick %b\n" % os.fsencode(release))
        try:
            while not (stuck := [each for each in operator.get("/v1/workers") if each["is_stuck"]]):
                pass  # the line has not reached the worker yet
            assert [each["worker"] for each in stuck] == [worker]
            while (request := stuck[0]["request"]) is None:
                [stuck[0]] = [each for each in operator.get("/v1/workers") if each["is_stuck"]]
            peer = "{}:{}".format(*client.socket.getsockname())
            assert request == {"id": id, "peer": peer, "handler": "Stuck"}
            assert any("tests/stuck.py" in text and "in command" in text for text in stuck[0]["stack"])
            assert {row["worker"] for row in operator.get("/v1/requests")} == set(found) - {worker}
            for own, (_, other) in found.items():
                if own != worker:
                    assert other.ask(b"still\n") == b"still\n"
            stacks = operator.get("/v1/stacks")
            assert {each["worker"] for each in stacks} == set(found) - {worker}
            assert all(any("MainThread" in name for name in each["threads"]) for each in stacks)
            connection = UnixConnection(operator.path)
            connection.request("GET", "/v1/events")
            with contextlib.closing(connection), connection.getresponse() as answer:
                assert answer.readline() == b":\n"  # without the stuck one
        finally:
            release.touch()
        assert client.line().startswith(b"stick")
        assert [(each["is_stuck"], each["request"]) for each in operator.get("/v1/workers")] == [(False, None)] * 3


def test_a_change_reaches_all_workers_and_those_that_start_later(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator):
        shown = operator.post("/v1/config", {"limits.entries_max": 50}, "PATCH")
        assert {"key": "limits.entries_max", "value": 50, "origin": "reqtable set"} in shown
        assert [each["entries_max"] for each in operator.get("/v1/stats")["workers"]] == [50] * 3
        first = service.workers()[0]
        os.kill(first, signal.SIGKILL)
        service.wait_for(f"worker {first} was killed by SIGKILL")
        service.wait_for("3 of 3 workers are ready", times=2)
        assert [each["entries_max"] for each in operator.get("/v1/stats")["workers"]] == [50] * 3
        status, body = operator.ask("/v1/config", "PATCH", {"limits.entries_max": -1})
        assert status == 409
        assert b"entries_max must be" in body


def test_one_worker_is_drained_and_replaced(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator):
        first = operator.get("/v1/workers")[0]["worker"]
        assert operator.post("/v1/drain", {"worker": first}) == {"worker": first}
        service.wait_for("3 of 3 workers are ready", times=2)
        workers = {each["worker"] for each in operator.get("/v1/workers")}
        assert len(workers - {first}) == 3
        status, body = operator.ask("/v1/drain", "POST", {"worker": 1})
        assert status == 400
        assert b"worker=1: the workers are" in body


def test_a_reload_replaces_no_worker_if_nothing_has_changed(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator), spread(service, operator, 3) as found:
        before = service.workers()
        assert operator.post("/v1/reload") == []
        service.wait_for("nothing has changed, so no worker is replaced")
        assert [each["phase"] for each in operator.get("/v1/workers")] == ["serving"] * 3
        assert service.workers() == before
        for _, client in found.values():
            assert client.ask(b"still\n") == b"still\n"


def test_a_server_that_accepts_no_more_stays_so_after_a_reload(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=2) as (service, operator):
        operator.post("/v1/drain", {"stay": True})
        service.reload()
        service.wait_for("2 of 2 workers are ready", times=2)
        stats = operator.get("/v1/stats")
        assert [each["is_draining"] for each in stats["workers"]] == [True, True]
        with Client(service.address) as client:  # the kernel takes it, and no worker does
            assert operator.get("/v1/requests") == []
            client.send(b"x\n")
            assert operator.get("/v1/stats")["entries"] == 0


def test_the_sums_are_those_of_all_workers() -> None:
    one = {"worker": 1, "entries_max": 500, "is_draining": True, "loop": {"lag_s_max": 0.5}}
    other = {"worker": 2, "entries_max": 100, "is_draining": False, "loop": {"lag_s_max": 0.7}}
    whole = summed([[one], [other]])
    assert (whole["entries_max"], whole["is_draining"], whole["loop"]["lag_s_max"]) == (600, False, 0.7)
    assert whole["workers"] == [one, other]
    assert not summed([[other], [one]])["is_draining"]
    assert summed([[one], [one]])["is_draining"]


def test_drain_ends_all_workers_and_the_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path) as (service, operator):
        operator.post("/v1/drain")
        assert service.wait() == 0
        assert not os.path.exists(operator.path)


def test_events_come_from_workers_that_start_later(tmp_path: Path) -> None:
    with supervised(tmp_path, workers=1) as (service, operator):
        connection = UnixConnection(operator.path)
        connection.request("GET", "/v1/events")
        answer = connection.getresponse()
        try:
            assert answer.readline() == b":\n"
            with Client(service.address) as client:
                client.ask(b"x\n")
                assert next_event(answer)["id"] == 10**10 + 1
            assert next_event(answer)["event"] == "ended"
            [worker] = service.workers()
            os.kill(worker, signal.SIGKILL)
            service.wait_for("1 of 1 workers are ready", times=2)
            operator.get("/v1/stats")  # the new worker has taken what was asked of it before
            with Client(service.address) as client:
                client.ask(b"x\n")
            assert next_event(answer)["id"] == 2 * 10**10 + 1
        finally:
            answer.close()
            connection.close()


def next_event(answer: http.client.HTTPResponse) -> dict[str, Any]:
    while not (text := answer.readline()).startswith(b"data: "):
        assert text
    return dict(json.loads(text[6:]))
