"""What an operator sees of the threads that run steps and WSGI applications, and what a cancel leaves running."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reqtable
from reqtable import Config, ControlOptions, PoolOptions, StateRequestHandler, line, state
from reqtable.http import wsgi_handler
from tests.control import Operator
from tests.support import WAIT_S, Client, serving

_begun, _release = threading.Semaphore(0), threading.Event()


def wait_for_release() -> None:
    _begun.release()
    assert _release.wait(WAIT_S)


class Waits(StateRequestHandler):
    @state(line())
    def command(self, item: bytes) -> Any:
        wait_for_release()
        self.send(item)
        return self.command


def application(environ: Any, start_response: Any) -> Any:
    wait_for_release()
    start_response("200 OK", [])
    return [b"done"]


ASKS = {"step": (Waits, b"wait\n"), "wsgi": (wsgi_handler(application), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")}


@contextlib.contextmanager
def stuck(folder: Path, kind: str, dispatch: str = "pool", size: int = 2) -> Iterator[tuple[Operator, Client]]:
    """Serve a request whose code waits in a thread."""
    _release.clear()
    handler, ask = ASKS[kind]
    path = str(folder / "c.sock")
    config = Config(pool=PoolOptions(size=size), control=ControlOptions(socket=path))
    with (
        serving(reqtable.TCPServer(("127.0.0.1", 0), handler, dispatch=dispatch, config=config)) as server,
        Client(server.server_address) as client,
    ):
        client.send(ask)
        try:
            assert _begun.acquire(timeout=WAIT_S)
            yield Operator(path), client
        finally:
            _release.set()


@pytest.mark.parametrize("kind", ASKS)
@pytest.mark.parametrize("dispatch", ["pool", "thread"])
def test_the_detail_has_the_stack_of_the_thread(tmp_path: Path, kind: str, dispatch: str) -> None:
    with stuck(tmp_path, kind, dispatch) as (operator, _):
        found = operator.get("/v1/requests/1")
        assert any(each.endswith(" wait_for_release") and "test_control_threads" in each for each in found["stack"])
        [process] = operator.get("/v1/stacks")
        stack = process["threads"][found["thread"]]
        assert any(each.endswith(" wait_for_release") for each in stack)


def test_a_request_that_waits_for_its_client_has_no_thread(tmp_path: Path) -> None:
    with stuck(tmp_path, "wsgi") as (operator, client):
        _release.set()
        assert client.socket.recv(4096).startswith(b"HTTP/1.1 200")
        operator.rows_once(lambda rows: rows and rows[0]["state"] == "READING")
        found = operator.get("/v1/requests/1")
        assert (found["thread"], found["stack"]) == (None, [])


@pytest.mark.parametrize("kind", ASKS)
def test_a_cancel_says_whose_thread_goes_on(tmp_path: Path, kind: str) -> None:
    with stuck(tmp_path, kind) as (operator, client):
        assert operator.post("/v1/requests/1/cancel") == {
            "cancelled": [1],
            "missing": [],
            "goes_on": [1],
            "call_threads": None,
        }
        client.rest()


def test_the_figures_have_the_pool(tmp_path: Path) -> None:
    with stuck(tmp_path, "wsgi", size=1) as (operator, client), Client(client.socket.getpeername()) as second:
        second.send(ASKS["wsgi"][1])
        operator.rows_once(lambda rows: len(rows) == 2 and all(row["state"] == "OFFLOADED" for row in rows))
        [server] = operator.get("/v1/stats")["servers"]
        assert server["pool"] == {"size": 1, "busy": 1, "idle": 0, "queued": 1}
        _release.set()
        assert second.socket.recv(4096).startswith(b"HTTP/1.1 200")


def test_the_figures_have_the_bytes_of_unfinished_requests(tmp_path: Path) -> None:
    with stuck(tmp_path, "step", "inline") as (operator, client):
        _release.set()
        assert client.line() == b"wait\n"
        [server] = operator.get("/v1/stats")["servers"]
        assert (server["bytes_in"], server["bytes_out"], server["pool"]) == (5, 5, None)
