"""What an operator sees of calls: which wait for a thread, which run, and which run though nobody waits for them."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ControlOptions, Limits, StateRequestHandler, call, either, line, sleep, state
from reqtable.control.underway import counts_of
from reqtable.dispatch import calls
from tests.control import Operator
from tests.support import WAIT_S, Client, serving, wait_until

_begun, _release = threading.Semaphore(0), threading.Event()


def hang() -> bytes:
    _begun.release()
    assert _release.wait(WAIT_S)
    return b"hung\n"


def quick() -> bytes:
    return b"quick\n"


FUNCTIONS = {b"hang\n": hang, b"quick\n": quick}


class Asks(StateRequestHandler):
    @state(line())
    def ask(self, text: bytes) -> Any:
        wanted = call(FUNCTIONS[text.rpartition(b" ")[2]])
        return self.answered, either(wanted, sleep(60)) if text.startswith(b"either ") else wanted

    @state()
    def answered(self, found: Any) -> Any:
        self.send(found if isinstance(found, bytes) else found.item)
        return self.ask


@contextlib.contextmanager
def hung(folder: Path, dispatch: str = "inline", ask: bytes = b"hang\n", **limits: Any) -> Iterator[Any]:
    """Serve a request whose call hangs, with one thread for calls."""
    _release.clear()
    path = str(folder / "c.sock")
    config = Config(control=ControlOptions(socket=path), limits=Limits(calls_max=1, **limits))
    with (
        serving(reqtable.TCPServer(("127.0.0.1", 0), Asks, dispatch=dispatch, config=config)) as server,
        Client(server.server_address) as client,
    ):
        client.send(ask)
        try:
            assert _begun.acquire(timeout=WAIT_S)
            yield Operator(path), client, server
        finally:
            _release.set()


@pytest.mark.parametrize("ask", [b"hang\n", b"either hang\n"])
@pytest.mark.parametrize("dispatch", ["inline", "pool", "thread"])
def test_the_detail_has_the_stack_of_a_call_and_the_state_that_made_it(
    tmp_path: Path, dispatch: str, ask: bytes
) -> None:
    with hung(tmp_path, dispatch, ask) as (operator, client, _):
        found = operator.get("/v1/requests/1")
        assert any(each.endswith(" hang") for each in found["stack"])
        assert found["thread"].startswith("reqtable-call")
        [made] = found["calls"]
        assert (made["call"], made["on"], made["phase"]) == ("call(hang)", "thread", "running")
        assert made["asked_by"].startswith("Asks.ask (")
        _release.set()
        assert client.line() == b"hung\n"


def test_a_call_that_waits_for_a_thread_is_told_from_one_that_runs(tmp_path: Path) -> None:
    with hung(tmp_path) as (operator, client, server), Client(server.server_address) as second:
        second.send(b"quick\n")
        operator.rows_once(lambda rows: [row["waits_for"] for row in rows] == ["call(hang)", "call(quick), queued"])
        found = operator.get("/v1/requests/2")
        assert found["waits_for"] == "call(quick), queued"
        assert (found["calls"][0]["phase"], found["thread"], found["stack"]) == ("queued", None, [])
        _release.set()
        assert (client.line(), second.line()) == (b"hung\n", b"quick\n")


def test_a_cancel_says_that_a_call_goes_on_and_the_figures_count_it(tmp_path: Path) -> None:
    with hung(tmp_path) as (operator, client, server), Client(server.server_address) as second:
        second.send(b"quick\n")
        assert operator.get("/v1/stats")["servers"][0]["calls"]["thread"]["running"] == 1
        operator.rows_once(lambda rows: len(rows) == 2 and rows[1]["state"] == "OFFLOADED")
        assert operator.post("/v1/requests/1/cancel") == {
            "cancelled": [1],
            "missing": [],
            "goes_on": [1],
            "call_threads": {"busy": 1, "most": 1},
        }
        assert client.rest() == b""
        counts = {"most": 1, "running": 0, "given_up": 1, "queued": 1}
        assert operator.get("/v1/stats")["servers"][0]["calls"] == {"thread": counts}
        _, metrics = operator.ask("/metrics")
        assert b'reqtable_calls{executor="thread",state="given_up"} 1.0' in metrics
        assert operator.post("/v1/requests/2/cancel")["goes_on"] == [], "a queued call never runs"
        assert second.rest() == b""
        _release.set()
        nothing = {"most": 1, "running": 0, "given_up": 0, "queued": 0}
        wait_until(server, lambda: counts_of(server) == {"thread": nothing})
        assert operator.get("/v1/stats")["servers"][0]["calls"] == {"thread": nothing}


def test_other_threads_are_there_after_the_limit_is_changed(tmp_path: Path) -> None:
    with (
        hung(tmp_path) as (operator, _, server),
        Client(server.server_address) as second,
        Client(server.server_address) as third,
    ):
        assert operator.post("/v1/requests/1/cancel")["goes_on"] == [1]
        second.send(b"quick\n")
        operator.rows_once(lambda rows: rows and rows[0]["waits_for"] == "call(quick), queued")
        assert operator.ask("/v1/config", "PATCH", {"limits.calls_max": 2})[0] == 200
        with Client(server.server_address) as third:
            assert third.ask(b"quick\n") == b"quick\n"
        counts = {"most": 3, "running": 0, "given_up": 1, "queued": 1}
        assert operator.get("/v1/stats")["servers"][0]["calls"] == {"thread": counts}


def test_a_call_that_waits_for_long_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "LATE_S", 0.05)
    caplog.set_level(logging.WARNING, "reqtable")
    look, seen = calls.Calls._look, []  # how many warnings there were after each look

    def warnings() -> list[str]:
        return [each for each in caplog.messages if "limits.calls_max" in each]

    def look_and_count(self: calls.Calls) -> None:
        look(self)
        seen.append(len(warnings()))

    monkeypatch.setattr(calls.Calls, "_look", look_and_count)
    with hung(tmp_path) as (operator, client, server), Client(server.server_address) as second:
        operator.post("/v1/requests/1/cancel")
        assert client.rest() == b""
        second.send(b"quick\n")
        wait_until(server, lambda: bool(warnings()))
        said = re.sub(r"for \d+ s:", "for 0 s:", warnings()[0])
        assert said == (
            "call(quick) has waited for 0 s: all 1 threads for calls (limits.calls_max) are busy with "
            "call(hang) ×1; 1 of these calls were given up, but still run"
        )
        wait_until(server, lambda: len(seen) - seen.count(0) > 3)
        assert seen[-1] == 1
        _release.set()
        assert second.line() == b"quick\n"
